"""Whole-slide DICOM files, written with just what a reader of them looks at."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal

_UID = "1.2.826.0.1.3680043.8.498"
JPEG, JPEG_2000, PLAIN = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.1"
_LONG = {"OB", "OV", "SQ", "UN"}


def element(tag: int, kind: str, value: bytes | str | int | Sequence[bytes], *, endless: bool = False) -> bytes:
    """An element; of a sequence `value` is its items. `endless`: items and sequence end by delimiters."""
    head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, kind.encode())
    if kind == "SQ":
        assert isinstance(value, Sequence)
        body = b"".join(item(part, endless=endless) for part in value if isinstance(part, bytes))
        if endless:
            return head + b"\0\0\xff\xff\xff\xff" + body + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    elif isinstance(value, int):
        body = struct.pack({"US": "<H", "UL": "<I", "SL": "<i"}[kind], value)
    else:
        body = value if isinstance(value, bytes) else str(value).encode()
        body += (b"\0" if kind in ("UI", "OB") else b" ") * (len(body) % 2)
    size = struct.pack("<HI", 0, len(body)) if kind in _LONG else struct.pack("<H", len(body))
    return head + size + body


def item(body: bytes, *, endless: bool = False) -> bytes:
    if endless:
        return struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + body + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(body)) + body


def save_level(
    path: Path,
    frames: Sequence[bytes],
    *,
    size: tuple[int, int],
    tile: tuple[int, int],
    syntax: str = JPEG,
    colours: str = "YBR_FULL_422",
    kind: str = "ORIGINAL\\PRIMARY\\VOLUME\\NONE",
    table: Literal["none", "basic", "extended"] = "basic",
    positions: Sequence[tuple[int, int]] | None = None,
    part: tuple[int, int] | None = None,
    fragments: int = 1,
    endless: bool = False,
    planes: int = 1,
    paths: int = 1,
    spacing: float = 0.0005,
    instance: str = "1",
    series: str = "7",
) -> Path:
    """A level, or the part of it that begins with frame `part[0]` as instance `part[1]`. `size` and `tile` are
    (width, height); `positions` are the frames' places in pixels, for a sparse level."""
    meta = element(0x00020002, "UI", "1.2.840.10008.5.1.4.1.1.77.1.6") + element(0x00020010, "UI", syntax)
    own = f"{_UID}.{instance}.{part[1]}" if part else f"{_UID}.{instance}"
    measures = element(0x00280030, "DS", f"{spacing}\\{spacing * 1.1:.7f}")
    data = [
        element(0x00080008, "CS", kind),
        element(0x00080016, "UI", "1.2.840.10008.5.1.4.1.1.77.1.6"),
        element(0x00080018, "UI", own),
        element(0x00100010, "PN", "Name^No"),
        element(0x0020000E, "UI", f"{_UID}.{series}"),
        element(0x00200228, "UL", part[0]) if part else b"",
        element(0x00200242, "UI", f"{_UID}.{instance}") if part else b"",
        element(0x00209311, "CS", "TILED_SPARSE" if positions else "TILED_FULL"),
        element(0x00280002, "US", 3),
        element(0x00280004, "CS", colours),
        element(0x00280006, "US", 0),
        element(0x00280008, "IS", str(len(frames))),
        element(0x00280010, "US", tile[1]),
        element(0x00280011, "US", tile[0]),
        element(0x00280100, "US", 8),
        element(0x00280101, "US", 8),
        element(0x00280102, "US", 7),
        element(0x00280103, "US", 0),
        element(0x00480006, "UL", size[0]),
        element(0x00480007, "UL", size[1]),
        element(0x00480105, "SQ", [element(0x00480106, "SH", "1")] * paths, endless=endless),
        element(0x00480302, "UL", paths),
        element(0x00480303, "UL", planes),
        element(0x52009229, "SQ", [element(0x00289110, "SQ", [measures], endless=endless)], endless=endless),
    ]
    if positions:
        places = [element(0x0048021E, "SL", x + 1) + element(0x0048021F, "SL", y + 1) for x, y in positions]
        groups = [element(0x0048021A, "SQ", [place], endless=endless) for place in places]
        data.append(element(0x52009230, "SQ", groups, endless=endless))
    if syntax == PLAIN:
        pixels = element(0x7FE00010, "OB", b"".join(frames))
    else:
        stored = [_fragments(frame, fragments) for frame in frames]
        starts = [0, *accumulate(map(len, stored[:-1]))]
        basic = struct.pack(f"<{len(starts)}I", *starts) if table == "basic" else b""
        if table == "extended":
            data.append(element(0x7FE00001, "OV", struct.pack(f"<{len(starts)}Q", *starts)))
            data.append(element(0x7FE00002, "OV", struct.pack(f"<{len(starts)}Q", *map(len, frames))))
        pixels = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF) + item(basic) + b"".join(stored)
        pixels += struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    group = element(0x00020000, "UL", len(meta))
    path.write_bytes(bytes(128) + b"DICM" + group + meta + b"".join(data) + pixels)
    return path


def _fragments(frame: bytes, count: int) -> bytes:
    step = -(-len(frame) // count // 2) * 2
    parts = [frame[start : start + step] for start in range(0, len(frame), step)]
    return b"".join(item(part + b"\0" * (len(part) % 2)) for part in parts)
