"""A tile as its parts: the compressed native tiles that it is cut from, and where the cut lies. A GPU that decodes
JPEG gets tiles so, in the very room that their pixels would take; device_decoder.py makes pixels of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]

_HEAD = np.dtype(
    [
        ("stream", "<i8"),
        ("columns", "<i4"),
        ("rows", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("box", "<f8", 4),
        ("copied", "<i4"),
        ("size", "<i4"),
    ]
)
_PART = np.dtype([("native", "<i8"), ("length", "<i4")])


@dataclass(frozen=True)
class NativePart:
    """A native tile: its number in its level, and its bytes as a JPEG that stands by itself."""

    native: int
    data: U8


@dataclass(frozen=True)
class Parts:
    """`parts` lie row by row in `columns`, each width × height pixels. The tile is `box` (x0, y0, x1, y1; pixels
    from the first part's corner) of them, taken as they are where it is `copied` or else resampled by area.
    `stream` tells apart what is read of different slides and levels."""

    stream: int
    columns: int
    width: int
    height: int
    box: Box
    copied: bool
    parts: Sequence[NativePart]


def put_parts(tile: Parts, out: U8) -> int:
    """Writes it into `out`, any contiguous array; how many bytes it takes, 0 where it does not fit."""
    total = _HEAD.itemsize + len(tile.parts) * _PART.itemsize
    total += sum(part.data.size for part in tile.parts)
    if total > out.size:
        return 0
    flat = out.reshape(-1)
    head = np.zeros(1, _HEAD)
    rows = len(tile.parts) // tile.columns
    head[0] = (tile.stream, tile.columns, rows, tile.width, tile.height, tile.box, tile.copied, total)
    table = np.array([(part.native, part.data.size) for part in tile.parts], dtype=_PART)
    at = 0
    for piece in (head.view(np.uint8), table.view(np.uint8), *(part.data for part in tile.parts)):
        flat[at : at + piece.size] = piece
        at += piece.size
    return total


def get_parts(data: U8) -> Parts:
    """What `put_parts` has written, whose data are views of `data`."""
    flat = data.reshape(-1)
    head = flat[: _HEAD.itemsize].view(_HEAD)[0]
    count = int(head["columns"]) * int(head["rows"])
    at = _HEAD.itemsize + count * _PART.itemsize
    parts = []
    for native, length in flat[_HEAD.itemsize : at].view(_PART).tolist():
        parts.append(NativePart(native, flat[at : at + length]))
        at += length
    x0, y0, x1, y1 = head["box"].tolist()
    return Parts(
        stream=int(head["stream"]),
        columns=int(head["columns"]),
        width=int(head["width"]),
        height=int(head["height"]),
        box=(x0, y0, x1, y1),
        copied=bool(head["copied"]),
        parts=parts,
    )
