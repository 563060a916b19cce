"""Packs: encoded tiles in plain tar files of bounded size, in the order of the index, as WebDataset and every tar
read them. A pack is the same to the byte whenever the same tiles go into it."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slideway_inference.errors import DiskFull, InternalError, PackTooSmall

BLOCK = 512
_TRAILER = 2 * BLOCK
_HELD_BYTES = 64 << 20
"""Encoded tiles of a slide held in memory while one before them is awaited; more of them wait on disk."""


def member_bytes(size: int) -> int:
    """What a member of `size` bytes takes in a pack."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def header(name: str, size: int) -> bytes:
    """A ustar header: a plain file, no owner, no time."""
    fields = b"".join(
        (
            name.encode().ljust(100, b"\0"),
            b"0000644\0" + b"0000000\0" + b"0000000\0",
            b"%011o\0" % size + b"00000000000\0",
            b" " * 8 + b"0" + bytes(100) + b"ustar\x0000",
        )
    )
    checksum = b"%06o\0 " % sum(fields)
    return (fields[:148] + checksum + fields[156:]).ljust(BLOCK, b"\0")


@dataclass(frozen=True)
class Pack:
    """A pack that was given."""

    bytes: int
    tiles: int


class Packer:
    """Takes a slide's encoded tiles in any order, from several threads, and gives packs in the index's order, each
    as soon as it is full. `entries` say where each tile went: pack (-1: nowhere), place in it, offset, bytes."""

    def __init__(
        self,
        names: Sequence[str],
        limit: int,
        folder: Path,
        give: Callable[[int, bytes], None],
        held: int = _HELD_BYTES,
    ) -> None:
        """`names` are the members', `limit` a pack's most bytes, `folder` where tiles wait that memory has no room
        for; `give` takes the number and the bytes of a pack that is complete."""
        count = len(names)
        self.packs: list[Pack] = []
        self.pack = np.full(count, -1, np.int32)
        self.entry = np.full(count, -1, np.int32)
        self.offset = np.full(count, -1, np.int64)
        self.length = np.zeros(count, np.int32)
        self._names = names
        self._limit = limit
        self._folder = folder
        self._give = give
        self._room = held
        self._next = 0
        self._held: dict[int, bytes] = {}
        self._spilled: dict[int, tuple[int, int]] = {}
        self._spill: int | None = None
        self._spill_end = 0
        self._parts: list[bytes] = []
        self._size = self._members = 0
        self._lock = threading.Lock()

    def put(self, index: int, data: bytes) -> None:
        """Raises PackTooSmall, DiskFull, and what `give` raises."""
        with self._lock:
            if index != self._next:
                self._keep(index, data)
                return
            self._append(index, data)
            self._next += 1
            while (following := self._take(self._next)) is not None:
                self._append(self._next, following)
                self._next += 1

    def finish(self, readable: npt.NDArray[np.bool_]) -> None:
        """All have come that are `readable` (n,). Raises as `put`."""
        with self._lock:
            for index in range(self._next, len(self._names)):
                if readable[index]:
                    data = self._take(index)
                    if data is None:
                        raise InternalError(f"Tile {self._names[index]} was read but never encoded.")
                    self._append(index, data)
            self._next = len(self._names)
            self._end_pack()

    def close(self) -> None:
        if self._spill is not None:
            os.close(self._spill)
            self._spill = None

    def _append(self, index: int, data: bytes) -> None:
        size = member_bytes(len(data))
        if size + _TRAILER > self._limit:
            raise PackTooSmall(f"A tile of {len(data)} bytes does not fit into a pack of {self._limit}.")
        if self._size + size + _TRAILER > self._limit:
            self._end_pack()
        self.pack[index] = len(self.packs)
        self.entry[index] = self._members
        self.offset[index] = self._size + BLOCK
        self.length[index] = len(data)
        self._parts += (header(self._names[index], len(data)), data, bytes(-len(data) % BLOCK))
        self._size += size
        self._members += 1

    def _end_pack(self) -> None:
        if not self._members:
            return
        body = b"".join((*self._parts, bytes(_TRAILER)))
        number = len(self.packs)
        self.packs.append(Pack(len(body), self._members))
        self._parts, self._size, self._members = [], 0, 0
        self._give(number, body)

    # --- tiles that wait for one before them -------------------------------------------------------------------

    def _keep(self, index: int, data: bytes) -> None:
        if self._room >= len(data):
            self._room -= len(data)
            self._held[index] = data
            return
        try:
            if self._spill is None:
                with tempfile.TemporaryFile(dir=self._folder) as file:
                    self._spill = os.dup(file.fileno())
            left = memoryview(data)
            while left:
                left = left[os.pwrite(self._spill, left, self._spill_end + len(data) - len(left)) :]
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise DiskFull("The slide's tiles do not fit on the instance: give the job more volume.") from error
            raise InternalError(f"Storing tiles on the instance failed: {error.strerror}.") from error
        self._spilled[index] = (self._spill_end, len(data))
        self._spill_end += len(data)

    def _take(self, index: int) -> bytes | None:
        data = self._held.pop(index, None)
        if data is not None:
            self._room += len(data)
            return data
        where = self._spilled.pop(index, None)
        if where is None:
            return None
        assert self._spill is not None
        data = os.pread(self._spill, where[1], where[0])
        if len(data) != where[1]:
            raise InternalError("What was stored of a tile on the instance is not all there.")
        return data
