"""Reads TIFF directories by ranges: classic and BigTIFF, both byte orders. Strict, because files come damaged:
every count, type, size and link is checked before it is followed, and nothing is read that was not asked for."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from slideway_inference.errors import SlideUnopenable
from slideway_inference.fast.source import Blocks, ByteSource

_DIRECTORIES = 512
_ENTRIES = 1024
_ARRAY_BYTES = 64 << 20
_TEXT_BYTES = 16 << 20
_ALL_BYTES = 192 << 20
"""Most that all values together may take: many directories can point to one long array."""

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}


class TiffDamaged(SlideUnopenable):
    """The TIFF's directories cannot be followed."""


class NotTiff(Exception):
    """The bytes do not begin as a TIFF does."""


@dataclass(frozen=True)
class _Entry:
    type: int
    count: int
    at: int
    """Where its value lies in the file."""


class Directory:
    """One image of a TIFF. Values are read when they are asked for."""

    def __init__(self, tiff: Tiff, entries: dict[int, _Entry]) -> None:
        self._tiff = tiff
        self._entries = entries

    def __contains__(self, tag: int) -> bool:
        return tag in self._entries

    def count(self, tag: int) -> int:
        entry = self._entries.get(tag)
        return entry.count if entry else 0

    def integers(self, tag: int, count: int | None = None) -> npt.NDArray[np.int64]:
        """A tag's whole numbers, `count` of them at most; empty where it is not there. Raises TiffDamaged."""
        entry = self._entries.get(tag)
        if entry is None:
            return np.zeros(0, np.int64)
        kind = _INTEGERS.get(entry.type)
        wanted = entry.count if count is None else min(count, entry.count)
        if kind is None:
            raise TiffDamaged(f"TIFF tag {tag} is no whole number.")
        data = self._tiff.bytes(entry.at, wanted * _SIZES[entry.type], _ARRAY_BYTES)
        values = np.frombuffer(data, np.dtype(kind).newbyteorder(self._tiff.order))
        if values.dtype.itemsize == 8 and len(values) and int(values.max()) > 1 << 62:
            raise TiffDamaged(f"TIFF tag {tag} holds an absurd number.")
        return values.astype(np.int64)

    def integer(self, tag: int, default: int | None = None) -> int:
        """Raises TiffDamaged where the tag is missing and there is no default."""
        values = self.integers(tag, 1)
        if len(values):
            return int(values[0])
        if default is None:
            raise TiffDamaged(f"TIFF tag {tag} is missing.")
        return default

    def rational(self, tag: int) -> float | None:
        entry = self._entries.get(tag)
        if entry is None or entry.count < 1:
            return None
        if entry.type == 5:
            above, below = struct.unpack(self._tiff.order + "II", self._tiff.bytes(entry.at, 8, 8))
            return above / below if below else None
        if entry.type in (11, 12):
            size = _SIZES[entry.type]
            code = "f" if entry.type == 11 else "d"
            (value,) = struct.unpack(self._tiff.order + code, self._tiff.bytes(entry.at, size, size))
            return float(value)
        return float(self.integer(tag, 0)) or None

    def text(self, tag: int) -> str:
        return self.data(tag).split(b"\0", 1)[0].decode("utf-8", "replace")

    def data(self, tag: int) -> bytes:
        """The bytes of a text or opaque tag; empty where it is not there. Raises TiffDamaged."""
        entry = self._entries.get(tag)
        if entry is None:
            return b""
        if _SIZES[entry.type] != 1:
            raise TiffDamaged(f"TIFF tag {tag} is of the wrong kind.")
        return self._tiff.bytes(entry.at, entry.count, _TEXT_BYTES)

    def children(self) -> list[Directory]:
        """The directories that tag SubIFDs points to."""
        return [self._tiff.directory(int(at))[0] for at in self.integers(330, _DIRECTORIES)]


class Tiff:
    """Raises NotTiff, TiffDamaged."""

    def __init__(self, source: ByteSource) -> None:
        self._blocks = Blocks(source)
        self._read = 0
        if source.size < 8:
            raise NotTiff
        head = self._blocks.read(0, min(16, source.size))
        if head[:2] not in (b"II", b"MM"):
            raise NotTiff
        self.order: Literal["<", ">"] = "<" if head[:2] == b"II" else ">"
        (magic,) = struct.unpack(self.order + "H", head[2:4])
        if magic == 42:
            self.big = False
            (first,) = struct.unpack(self.order + "I", head[4:8])
        elif magic == 43 and len(head) == 16 and struct.unpack(self.order + "HH", head[4:8]) == (8, 0):
            self.big = True
            (first,) = struct.unpack(self.order + "Q", head[8:16])
        else:
            raise NotTiff
        self.directories: Sequence[Directory] = list(self._chain(first))
        if not self.directories:
            raise TiffDamaged("The TIFF has no directory.")

    def bytes(self, at: int, size: int, limit: int) -> bytes:
        self._read += size
        if size > limit or self._read > _ALL_BYTES:
            raise TiffDamaged(f"A TIFF tag of {size} bytes is absurd.")
        try:
            return self._blocks.read(at, size)
        except EOFError as error:
            raise TiffDamaged("A TIFF tag points outside the file: it is cut short or damaged.") from error

    def _chain(self, at: int) -> Iterator[Directory]:
        seen: set[int] = set()
        while at:
            if at in seen:
                raise TiffDamaged("The TIFF's directories run in a circle.")
            if len(seen) == _DIRECTORIES:
                raise TiffDamaged(f"The TIFF has more than {_DIRECTORIES} directories.")
            seen.add(at)
            directory, at = self.directory(at)
            yield directory

    def directory(self, at: int) -> tuple[Directory, int]:
        """The directory at an offset, and the offset of the next."""
        head, size, inline = (8, 20, 8) if self.big else (2, 12, 4)
        (count,) = struct.unpack(self.order + ("Q" if self.big else "H"), self.bytes(at, head, head))
        if not 0 < count <= _ENTRIES:
            raise TiffDamaged(f"A TIFF directory of {count} entries is absurd.")
        body = self.bytes(at + head, count * size, _ENTRIES * size)
        entries: dict[int, _Entry] = {}
        layout = self.order + ("HHQ8s" if self.big else "HHI4s")
        for index, (tag, kind, number, _) in enumerate(struct.iter_unpack(layout, body)):
            if kind not in _SIZES:
                continue
            where = at + head + index * size + size - inline
            if number * _SIZES[kind] > inline:
                (where,) = struct.unpack(
                    self.order + ("Q" if self.big else "I"), body[(index + 1) * size - inline : (index + 1) * size]
                )
            entries.setdefault(tag, _Entry(kind, number, where))
        pointer = 8 if self.big else 4
        try:
            link = self._blocks.read(at + head + count * size, pointer)
        except EOFError as error:
            raise TiffDamaged("A TIFF directory is cut short.") from error
        (following,) = struct.unpack(self.order + ("Q" if self.big else "I"), link)
        return Directory(self, entries), int(following)
