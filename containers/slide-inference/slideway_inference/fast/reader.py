"""Reads tiles at the speed of the decoder. A grid of wanted tiles is planned ahead: which native tiles it needs, in
which order, and which bytes those are. The bytes are fetched in large windows while earlier ones are decoded; each
native tile is decoded once, by whichever thread needs it first, at reduced size where the wanted µm per pixel
allows, and is dropped after the last tile that is cut from it. Memory depends on the slide's width, not its size;
where even that is too much, the grid is worked in vertical strips."""

from __future__ import annotations

import queue
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from slideway_inference.fast.codecs import TileError
from slideway_inference.fast.parts import NativePart, Parts, put_parts
from slideway_inference.fast.pyramid import NativeLevel, Part, Pyramid
from slideway_inference.fast.resample import AreaResampler
from slideway_inference.fast.source import Data
from slideway_inference.grid import Level, TileGeometry
from slideway_inference.reader import (
    NOT_SCANNED,
    Bool,
    Overview,
    Region,
    RegionUnreadable,
    SlideReader,
    levels_of,
)
from slideway_inference.resolution import mpp_of_file

U8 = npt.NDArray[np.uint8]
_T = TypeVar("_T")
Form = Literal["pixels", "stored", "parts"]
"""What tiles come as: always as pixels; as the slide stores them where they are exactly a native JPEG tile; or as
the native tiles that they are cut from (parts.py) where those are JPEG and wanted at their full size."""

_CHUNK, _CHUNK_NATIVES = 32, 128
"""Tiles that a thread works on at a time: so many, or fewer that need so many native ones."""
_CHUNK_BYTES = 256 << 20
"""Decoded native tiles of what all threads work on, besides those that are held; and of spare ones."""
_FIRST_WINDOW, _WINDOW = 2 << 20, 32 << 20
"""Compressed bytes fetched at once; the first window is small, so that decoding starts at once."""
_WINDOWS = 2
"""Windows being fetched or waiting to be decoded, besides the one that is."""
_HELD_BYTES = 640 << 20
"""Decoded native tiles held for tiles still to come."""
_OVERVIEW_PIXELS = 2 << 20
"""Most pixels held at once while an overview is made."""
_POLL = 0.1
_ENLARGED = 1.02
"""By how much a tile may be enlarged so that it can be decoded at reduced size: 0.253 µm per pixel for 0.5."""


@dataclass(frozen=True)
class Unread:
    """Why a tile could not be read. `retry`: OpenSlide may be able to; otherwise its data is bad."""

    reason: str
    retry: bool


_NOT_SCANNED = Unread(NOT_SCANNED, retry=False)
"""More than half of the tile is not in the file: lost, or never scanned. White, it would pass for glass."""


@dataclass
class Batch:
    """Tiles that are ready: `tiles` (n, px, px, 3), a view of `buffer`, are those at `indices` (n,) of the
    positions asked for. `unread` maps those that could not be read, by their place in the batch, to the reason;
    what `tiles` holds for them means nothing. Where `stored` (n,) is not 0 a tile begins with so many bytes of
    another form instead of pixels."""

    indices: npt.NDArray[np.int64]
    tiles: U8
    buffer: U8
    stored: npt.NDArray[np.int32]
    unread: dict[int, Unread] = field(default_factory=dict)


class FastReader(SlideReader):
    """An open slide. `read_batches` may be used by one thread at a time, and reads with threads of its own."""

    def __init__(self, pyramid: Pyramid, *, threads: int, close: Callable[[], None]) -> None:
        self.name = f"fast ({pyramid.note})" if pyramid.note else "fast"
        self.vendor = pyramid.vendor
        self.properties = pyramid.properties
        self.native = pyramid.levels
        self.levels = levels_of([(level.width, level.height) for level in pyramid.levels])
        self.mpp = mpp_of_file(pyramid.properties)
        self.threads = threads
        self._like_openslide = pyramid.like_openslide
        self._close = close

    def close(self) -> None:
        self._close()

    # --- tiles -------------------------------------------------------------------------------------------------

    def read_batches(
        self,
        geometry: TileGeometry,
        positions: npt.NDArray[np.int32],
        batch: int,
        buffers: queue.Queue[U8],
        first: int | None = None,
        form: Form = "pixels",
    ) -> Iterator[Batch]:
        """Reads the tiles at `positions` (n, 2; level-0 x, y, row by row), `batch` at a time, into arrays taken
        from `buffers`, each at least (batch, px, px, 3); put them back there when a batch is done with. Batches
        come in the order of the positions, unless the slide is so wide that it is worked in strips. Work goes on
        ahead while there are buffers. With `first`, the first batch has so many; each strip begins by filling up
        the batch that the one before left. Closing the iterator ends it. Raises SlideFetchFailed, SlideChanged,
        Stopped."""
        plan = _Plan(self.native[geometry.level], self.levels[geometry.level], geometry, positions)
        retry = self._like_openslide or geometry.level == 0
        room = first or batch
        for strip in plan.strips(_HELD_BYTES):
            yield from _Run(plan, strip, batch, buffers, self.threads, retry, room, form).batches()
            room = (room - len(strip)) % batch or batch

    def strips(self, geometry: TileGeometry, positions: npt.NDArray[np.int32]) -> list[int]:
        """How many of the tiles each strip has in which `read_batches` works."""
        plan = _Plan(self.native[geometry.level], self.levels[geometry.level], geometry, positions)
        return [len(strip) for strip in plan.strips(_HELD_BYTES)]

    def read_tiles(self, geometry: TileGeometry, positions: npt.NDArray[np.int32], out: U8) -> Bool:
        readable = np.ones(len(positions), np.bool_)
        if len(positions) == 0:
            return readable
        plan = _Plan(self.native[geometry.level], self.levels[geometry.level], geometry, positions)
        buffers: queue.Queue[U8] = queue.Queue()
        buffers.put(out)
        order = np.arange(len(positions))
        for batch in _Run(plan, order, len(positions), buffers, self.threads, retry=False).batches():
            readable[list(batch.unread)] = False
        return readable

    # --- regions -----------------------------------------------------------------------------------------------

    def read_region(self, level: int, x: int, y: int, width: int, height: int) -> Region:
        native = self.native[level]
        rgb = np.full((height, width, 3), 255, np.uint8)
        scanned: Bool | None = None
        columns = range(x // native.tile_width, (x + width - 1) // native.tile_width + 1)
        for row in range(y // native.tile_height, (y + height - 1) // native.tile_height + 1):
            indices = [row * native.columns + column for column in columns]
            tiles = [_Native(index) for index in indices]
            _fetch(native, tiles)
            for column, tile in zip(columns, tiles, strict=True):
                pixels = _decode(native, tile, 1)
                if tile.error is not None:
                    raise RegionUnreadable(tile.error.reason)
                left, top = column * native.tile_width, row * native.tile_height
                x0, x1 = max(x, left), min(x + width, left + native.tile_width)
                y0, y1 = max(y, top), min(y + height, top + native.tile_height)
                if pixels is None:
                    if scanned is None:
                        scanned = np.ones((height, width), np.bool_)
                    scanned[y0 - y : y1 - y, x0 - x : x1 - x] = False
                else:
                    rgb[y0 - y : y1 - y, x0 - x : x1 - x] = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
        return Region(rgb, scanned, x, y)

    def overview(self, width: int, height: int) -> Overview:
        """The slide as width × height pixels, from the smallest pictures that are not coarser: a level, decoded at
        reduced size where its codec can. Each pixel is the mean over its footprint, of which what was not
        scanned is white; a pixel is unreadable where half of it is."""
        fine = [i for i, level in enumerate(self.levels) if level.width >= width and level.height >= height]
        index = max(fine, key=lambda i: self.levels[i].downsample_x) if fine else 0
        return _overview(self.native[: index + 1], width, height, self.threads)


# --- the plan ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Places:
    """Where some tiles lie, as plain lists, since a tile's numbers are looked up one by one: their reductions; by
    reduced pixels, x then y, what they cover exactly and in whole pixels; their first and last native tiles;
    whether they are copied without resampling; and whether each is exactly one native tile."""

    reductions: list[int]
    start: list[list[float]]
    stop: list[list[float]]
    low: list[list[int]]
    high: list[list[int]]
    first: list[list[int]]
    last: list[list[int]]
    copied: list[bool]
    whole: list[bool]


class _Plan:
    """Where each tile lies on the level's native tiles. All arrays have a row per position, 67 bytes in all."""

    def __init__(
        self, native: NativeLevel, level: Level, geometry: TileGeometry, positions: npt.NDArray[np.int32]
    ) -> None:
        self.native = native
        self.px = px = geometry.px
        size = np.array([native.width, native.height])
        at = positions.astype(np.float64) / (level.downsample_x, level.downsample_y)
        if geometry.native:
            start = np.minimum(np.rint(at), size - px).astype(np.float64)
            stop = start + px
        else:
            footprint = np.array(
                [geometry.footprint_x / level.downsample_x, geometry.footprint_y / level.downsample_y]
            )
            start, stop = np.maximum(at, 0), np.minimum(at + footprint, size)
        scale = 1.0 if geometry.native else float(min(footprint) / px)
        self.reduction = _reduction(native, scale, scale)
        # The last reduced pixels of a level that it does not divide are made of padding too.
        whole = size - size % self.reduction
        reductions = np.where((stop > whole + 1e-6).any(axis=1), 1, self.reduction)
        divisor = reductions[:, None]
        start, stop = start / divisor, stop / divisor
        low = np.floor(start + 1e-6).astype(np.int64)
        high = np.minimum(np.ceil(stop - 1e-6).astype(np.int64), -(-size // divisor))
        high = np.maximum(high, low + 1)
        exact = np.abs(start - np.rint(start)).max(axis=1, initial=0) < 1e-6
        exact &= np.abs(stop - start - px).max(axis=1, initial=0) < 1e-6
        tile = np.array([native.tile_width, native.tile_height]) // divisor
        self._first, self._last = (low // tile).astype(np.int32), ((high - 1) // tile).astype(np.int32)
        self._reductions = reductions.astype(np.uint8)
        fits = (self._first == self._last).all(axis=1) & (tile == px).all(axis=1) & (low % tile == 0).all(axis=1)
        self._start, self._stop = start, stop
        self._low, self._high = low.astype(np.int32), high.astype(np.int32)
        self._copied, self._whole = exact, exact & fits

    def places(self, indices: npt.NDArray[np.int64]) -> _Places:
        """Of a few tiles at a time: lists take ten times an array's memory."""
        arrays = (
            self._reductions, self._start, self._stop, self._low, self._high, self._first, self._last,
            self._copied, self._whole,
        )  # fmt: skip
        return _Places(*(array[indices].tolist() for array in arrays))

    def uses(self, order: npt.NDArray[np.int64]) -> dict[int, npt.NDArray[np.int32]]:
        """By reduction: how many of the tiles are cut from each native tile, (rows, columns)."""
        counts = {}
        for reduction in set(self._reductions[order].tolist()):
            chosen = order[self._reductions[order] == reduction]
            steps = np.zeros((self.native.rows + 1, self.native.columns + 1), np.int32)
            (left, top), (right, bottom) = self._first[chosen].T, self._last[chosen].T + 1
            for rows, columns, step in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
                np.add.at(steps, (rows, columns), step)
            counts[reduction] = steps.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)
        return counts

    def strips(self, budget: int) -> list[npt.NDArray[np.int64]]:
        """Indices of the positions in the order they are worked, strip by strip."""
        count = len(self._start)
        if count == 0:
            return []
        held = self.native.tile_width * self.native.tile_height * 3 // self.reduction**2
        rows = 1 + int((self._last[:, 1] - self._first[:, 1]).max())
        columns = int(self._last[:, 0].max() - self._first[:, 0].min()) + 1
        parts = -(-columns * rows * held // budget)
        if parts <= 1:
            return [np.arange(count)]
        wide = -(-columns // parts)
        strip = (self._first[:, 0] - self._first[:, 0].min()) // wide
        return [
            np.flatnonzero(strip == number) for number in range(int(strip.max()) + 1) if (strip == number).any()
        ]


def _reduction(native: NativeLevel, scale_x: float, scale_y: float) -> int:
    """The largest divisor not above the scale at which native tiles can be decoded; scanners' pixels are seldom a
    round half of the wanted ones, so it may be above by a little, which is then enlarged again."""
    most = min(scale_x, scale_y) * _ENLARGED
    return max(
        r
        for r in native.codec.reductions
        if r == 1
        or (r <= most and native.tile_width % r == 0 and native.tile_height % r == 0 and not native.ragged)
    )


# --- native tiles ------------------------------------------------------------------------------------------------


class _Native:
    """A native tile on its way from bytes to pixels. `pixels` stays None for what was not scanned, and while `part`
    is there, its bytes for those who decode them elsewhere. `users`: the tiles that a part of it is copied to."""

    __slots__ = ("chunk", "data", "error", "index", "part", "pixels", "place", "reduction", "users", "uses")

    def __init__(self, index: int) -> None:
        self.index = index
        self.reduction = 1
        self.place: int | None = None  # in its batch, where it is decoded straight into
        self.uses = 0
        self.users: list[_User] = []
        self.chunk: _Chunk | None = None
        self.data: Data | None = None
        self.part: U8 | None = None
        self.pixels: U8 | None = None
        self.error: Unread | None = None


def _fetch(native: NativeLevel, tiles: Sequence[_Native]) -> None:
    """Reads the bytes of native tiles; those that are nowhere get their error. Raises SlideFetchFailed."""
    wanted: dict[int, list[_Native]] = {}
    for tile in tiles:
        size, offset = int(native.sizes[tile.index]), int(native.offsets[tile.index])
        source = 0 if native.source is None else int(native.source[tile.index])
        if size == 0:
            continue
        if size < 0:
            tile.error = Unread("it is drawn from other tiles", retry=True)
        elif size > 2 * native.tile_width * native.tile_height * 3 + (64 << 10):
            tile.error = Unread(f"{size} bytes are absurd for a tile", retry=False)
        elif offset < 0 or offset + size > native.sources[source].size:
            tile.error = Unread("the file ends before the tile does", retry=False)
        else:
            wanted.setdefault(source, []).append(tile)
    for source, group in wanted.items():
        ranges = [(int(native.offsets[tile.index]), int(native.sizes[tile.index])) for tile in group]
        for tile, data in zip(group, native.sources[source].read(ranges), strict=True):
            tile.data = data


def _decode(native: NativeLevel, tile: _Native, reduction: int, out: U8 | None = None) -> U8 | None:
    """Decodes a fetched tile into `out`, or memory of its own."""
    data, tile.data = tile.data, None
    if data is None:
        return None
    width, height = native.tile_size(tile.index)
    if out is None:
        out = np.empty((height // reduction, width // reduction, 3), np.uint8)
    try:
        native.codec.decode(data, width, height, reduction, out)
    except TileError as error:
        tile.error = Unread(str(error), error.retry)
        return None
    return out


def _keep(native: NativeLevel, tile: _Native, out: U8) -> int:
    """Puts a fetched tile into `out` as it is stored, and tells its bytes; 0 where it must be decoded."""
    assert tile.data is not None
    stream = native.codec.stored(tile.data, *native.tile_size(tile.index))
    if stream is None or len(stream) > out.size:
        return 0
    out.reshape(-1)[: len(stream)] = np.frombuffer(stream, np.uint8)
    return len(stream)


# --- a run through a grid ----------------------------------------------------------------------------------------


class _Group:
    """A batch while it is filled, and where its tiles lie; `batch` is there once it has a buffer."""

    def __init__(self, indices: npt.NDArray[np.int64], places: _Places) -> None:
        self.indices = indices
        self.places = places
        self.left = len(indices)
        self.batch: Batch | None = None
        self.done = threading.Event()


class _Chunk:
    """Consecutive tiles of a batch, the first at place `start` of it. `own` are the native tiles to decode for it,
    which no chunk before it needs; `needed` those that each tile is cut from, row by row, None for what has been
    copied already. `closes`: it is the last of its window."""

    __slots__ = ("closes", "decoded", "group", "needed", "own", "start")

    def __init__(self, group: _Group, start: int) -> None:
        self.group = group
        self.start = start
        self.own: list[_Native] = []
        self.needed: list[_Needed] = []
        self.decoded = threading.Event()
        self.closes = False


_Needed = list[_Native | None]
_User = tuple[_Group, int, _Needed, int]
"""A tile, by its group and its place there; what it needs, and which of that is meant."""


class _Ended(Exception):
    """The run was ended; its threads leave."""


class _Run:
    """Reads one strip of a plan. A thread plans and fetches windows ahead; workers decode and cut. A chunk's native
    tiles belong to it or to chunks taken earlier, so that a worker which waits for another never waits in a
    circle; buffers are given out in the order of the batches for the same reason."""

    def __init__(
        self,
        plan: _Plan,
        order: npt.NDArray[np.int64],
        batch: int,
        buffers: queue.Queue[U8],
        threads: int,
        retry: bool,
        first: int | None = None,
        form: Form = "pixels",
    ) -> None:
        self._stored = form == "stored"
        # What is decoded at reduced size is less work for the processor than for a GPU that cannot.
        self._parts = form == "parts" and plan.reduction == 1 and not plan.native.ragged
        self._stream = secrets.randbits(63)
        self._decoding = threading.Lock()
        self._plan = plan
        self._order = order
        self._batch = batch
        self._first = first or batch
        self._buffers = buffers
        self._threads = threads
        self._retry = retry
        self._uses = plan.uses(order)
        self._live: dict[tuple[int, int], _Native] = {}
        self._ready: queue.Queue[_Chunk | None] = queue.Queue()
        self._room = threading.Semaphore(_WINDOWS + 1)
        self._groups: queue.Queue[_Group | None] = queue.Queue()
        self._roomless: deque[_Group] = deque()
        self._lock = threading.Lock()
        self._taking = threading.Lock()
        self._stop = threading.Event()
        self._fault: BaseException | None = None
        native = plan.native.tile_width * plan.native.tile_height * 3 // plan.reduction**2
        self._chunk_natives = max(1, min(_CHUNK_NATIVES, _CHUNK_BYTES // (threads * native)))
        self._spare: deque[U8] = deque(maxlen=max(1, min(4 * _CHUNK, _CHUNK_BYTES // native)))

    def batches(self) -> Iterator[Batch]:
        threads = [threading.Thread(target=self._guard, args=(self._feed,), name="fetch", daemon=True)]
        threads += [
            threading.Thread(target=self._guard, args=(self._work,), name=f"decode-{number}", daemon=True)
            for number in range(self._threads)
        ]
        for thread in threads:
            thread.start()
        try:
            while (group := self._get(self._groups)) is not None:
                while not group.done.wait(_POLL):
                    self._check()
                assert group.batch is not None
                yield group.batch
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _guard(self, body: Callable[[], None]) -> None:
        try:
            body()
        except _Ended:
            pass
        except BaseException as error:
            if self._fault is None:
                self._fault = error
            self._stop.set()

    def _check(self) -> None:
        if self._fault is not None:
            raise self._fault
        if self._stop.is_set():
            raise _Ended

    def _get(self, source: queue.Queue[_T]) -> _T:
        while True:
            try:
                return source.get(timeout=_POLL)
            except queue.Empty:
                self._check()

    # --- planning and fetching ---------------------------------------------------------------------------------

    def _feed(self) -> None:
        with ThreadPoolExecutor(_WINDOWS, "window") as pool:
            running: deque[tuple[list[_Chunk], Future[None]]] = deque()
            try:
                for window in self._windows():
                    while not self._room.acquire(timeout=_POLL):
                        self._check()
                    tiles = [tile for chunk in window for tile in chunk.own]
                    running.append((window, pool.submit(_fetch, self._plan.native, tiles)))
                    if len(running) == _WINDOWS:
                        self._deliver(*running.popleft())
                while running:
                    self._deliver(*running.popleft())
            finally:
                for _, fetched in running:
                    fetched.cancel()
        self._groups.put(None)
        for _ in range(self._threads):
            self._ready.put(None)

    def _deliver(self, window: list[_Chunk], fetched: Future[None]) -> None:
        while True:
            try:
                fetched.result(_POLL)
                break
            except TimeoutError:
                self._check()
        window[-1].closes = True
        for chunk in window:
            if chunk.start == 0:
                self._roomless.append(chunk.group)
                self._groups.put(chunk.group)
            self._ready.put(chunk)

    def _windows(self) -> Iterator[list[_Chunk]]:
        sizes = self._plan.native.sizes
        window: list[_Chunk] = []
        held, limit = 0, _FIRST_WINDOW
        ends = [*range(self._first, len(self._order), self._batch), len(self._order)]
        for start, end in zip([0, *ends], ends, strict=False):
            indices = self._order[start:end]
            group = _Group(indices, self._plan.places(indices))
            place = 0
            while place < len(indices):
                chunk = self._chunk(group, place)
                place += len(chunk.needed)
                window.append(chunk)
                held += sum(max(0, int(sizes[tile.index])) for tile in chunk.own)
                if held >= limit:
                    yield window
                    window, held, limit = [], 0, min(4 * limit, _WINDOW)
        if window:
            yield window

    def _chunk(self, group: _Group, start: int) -> _Chunk:
        """The next chunk of a batch."""
        plan, places, chunk = self._plan, group.places, _Chunk(group, start)
        for place in range(start, min(start + _CHUNK, len(group.indices))):
            if len(chunk.own) >= self._chunk_natives:
                break
            reduction = places.reductions[place]
            (left, top), (right, bottom) = places.first[place], places.last[place]
            uses = self._uses[reduction]
            needed: _Needed = []
            for row in range(top, bottom + 1):
                for column in range(left, right + 1):
                    key = row * plan.native.columns + column
                    tile = self._live.get((key, reduction))
                    if tile is None:
                        tile = self._live[key, reduction] = _Native(key)
                        tile.reduction = reduction
                        tile.chunk = chunk
                        tile.uses = int(uses[row, column])
                        if tile.uses == 1 and places.whole[place] and not self._parts:
                            tile.place = place
                        chunk.own.append(tile)
                    if places.copied[place] and not self._parts:
                        tile.users.append((group, place, needed, len(needed)))
                    needed.append(tile)
            chunk.needed.append(needed)
        return chunk

    # --- decoding and cutting ----------------------------------------------------------------------------------

    def _work(self) -> None:
        resample = AreaResampler(self._plan.px)
        while (chunk := self._take()) is not None:
            batch = chunk.group.batch
            assert batch is not None
            for tile in chunk.own:
                self._make(tile, batch)
            chunk.decoded.set()
            for place, needed in enumerate(chunk.needed, chunk.start):
                for part in needed:
                    owner = None if part is None else part.chunk
                    if owner is not None and owner is not chunk:
                        while not owner.decoded.wait(_POLL):
                            self._check()
                self._finish(chunk.group.places, place, needed, batch, resample)
            self._let_go(chunk)

    def _take(self) -> _Chunk | None:
        with self._taking:
            chunk = self._get(self._ready)
            if chunk is None:
                return None
            if chunk.closes:
                self._room.release()
            while chunk.group.batch is None:
                self._give_room(self._get(self._buffers))
            while self._roomless:
                try:
                    self._give_room(self._buffers.get_nowait())
                except queue.Empty:
                    break
            return chunk

    def _give_room(self, buffer: U8) -> None:
        """To the first group that has none: also ahead of time, for what is decoded now and belongs there."""
        group = self._roomless.popleft()
        count = len(group.indices)
        group.batch = Batch(group.indices, buffer[:count], buffer, np.zeros(count, np.int32))

    def _make(self, tile: _Native, batch: Batch) -> None:
        if tile.data is None:
            return
        out: U8 | None = None
        if self._parts:
            stream = self._plan.native.codec.stored(tile.data, *self._plan.native.tile_size(tile.index))
            if stream is not None:
                tile.part = np.frombuffer(stream, np.uint8)
                return
        if tile.place is not None:
            out = batch.tiles[tile.place]
            if self._stored and tile.reduction == 1 and (size := _keep(self._plan.native, tile, out)):
                batch.stored[tile.place] = size
                tile.pixels, tile.data = out, None
                return
        elif tile.reduction == self._plan.reduction:
            try:
                out = self._spare.pop()
            except IndexError:
                out = None
        tile.pixels = _decode(self._plan.native, tile, tile.reduction, out)
        if tile.users and tile.place is None:
            self._copy(tile)

    def _copy(self, tile: _Native) -> None:
        """Copies a native tile to all tiles that have room, while the processor's cache holds it."""
        pixels, native = tile.pixels, self._plan.native
        if pixels is None:
            return
        wide, high = native.tile_width // tile.reduction, native.tile_height // tile.reduction
        row, column = divmod(tile.index, native.columns)
        x, y, copied = column * wide, row * high, 0
        right, bottom = x + wide, y + high
        for group, place, needed, number in tuple(tile.users):
            if group.batch is None:
                continue
            (x0, y0), (x1, y1) = group.places.low[place], group.places.high[place]
            xa, ya = x if x > x0 else x0, y if y > y0 else y0
            xb, yb = x1 if x1 < right else right, y1 if y1 < bottom else bottom
            part = pixels[ya - y : yb - y, xa - x : xb - x]
            group.batch.tiles[place][ya - y0 : yb - y0, xa - x0 : xb - x0] = part
            needed[number] = None
            copied += 1
        tile.users.clear()
        with self._lock:
            self._used(tile, copied)

    def _keep_parts(self, places: _Places, place: int, needed: Sequence[_Native], batch: Batch) -> bool:
        """Puts a tile into its batch as its parts; where one of them has to be decoded here, or there is no room,
        they are decoded, and it is to be cut as any other."""
        native = self._plan.native
        parts = [NativePart(tile.index, tile.part) for tile in needed if tile.part is not None]
        if len(parts) == len(needed):
            first, last = places.first[place], places.last[place]
            start, stop = places.start[place], places.stop[place]
            left, top = first[0] * native.tile_width, first[1] * native.tile_height
            whole = Parts(
                stream=self._stream,
                columns=last[0] - first[0] + 1,
                width=native.tile_width,
                height=native.tile_height,
                box=(start[0] - left, start[1] - top, stop[0] - left, stop[1] - top),
                copied=places.copied[place],
                parts=parts,
            )
            batch.stored[place] = put_parts(whole, batch.tiles[place])
        if batch.stored[place]:
            return True
        for tile in needed:
            with self._decoding:
                if tile.data is not None:
                    tile.pixels = _decode(native, tile, 1)
        return False

    def _finish(self, places: _Places, place: int, needed: _Needed, batch: Batch, resample: AreaResampler) -> None:
        rest = [tile for tile in needed if tile is not None]
        if not rest or (self._parts and self._keep_parts(places, place, rest, batch)):
            return
        for tile in rest:
            if tile.error is not None:
                batch.unread[place] = Unread(tile.error.reason, self._retry and tile.error.retry)
                return
        out = batch.tiles[place]
        if rest[0].place is not None:
            if rest[0].pixels is None:
                batch.unread[place] = _NOT_SCANNED
            return
        plan = self._plan
        (x0, y0), (x1, y1) = places.low[place], places.high[place]
        wide, high = plan.native.tile_width, plan.native.tile_height
        if rest[0].reduction > 1:
            wide, high = wide // rest[0].reduction, high // rest[0].reduction
        left, top = places.first[place][0] * wide, places.first[place][1] * high
        copied, alone = places.copied[place], rest[0].pixels if len(needed) == 1 else None
        blank = 0
        if alone is not None and not copied:
            region = alone[y0 - top : y1 - top, x0 - left : x1 - left]
        else:
            region = out if copied else np.empty((y1 - y0, x1 - x0, 3), np.uint8)
            across = [(x, max(x0, x), min(x1, x + wide)) for x in range(left, x1, wide)]
            parts = iter(needed)
            for y in range(top, y1, high):
                ya, yb = max(y0, y), min(y1, y + high)
                for x, xa, xb in across:
                    part = next(parts)
                    if part is None:
                        continue
                    pixels = part.pixels
                    if pixels is None:
                        region[ya - y0 : yb - y0, xa - x0 : xb - x0] = 255
                        blank += (yb - ya) * (xb - xa)
                    else:
                        region[ya - y0 : yb - y0, xa - x0 : xb - x0] = pixels[ya - y : yb - y, xa - x : xb - x]
        if 2 * blank > (y1 - y0) * (x1 - x0):
            batch.unread[place] = _NOT_SCANNED
        elif not copied:
            (left_at, top_at), (right_at, bottom_at) = places.start[place], places.stop[place]
            resample(region, (left_at - x0, top_at - y0, right_at - x0, bottom_at - y0), out)

    def _let_go(self, chunk: _Chunk) -> None:
        with self._lock:
            for needed in chunk.needed:
                for tile in needed:
                    if tile is not None:
                        self._used(tile, 1)
            chunk.group.left -= len(chunk.needed)
            last = chunk.group.left == 0
        if last:
            chunk.group.done.set()

    def _used(self, tile: _Native, times: int) -> None:
        """A native tile was cut so often; after the last time its memory is there for another. Under the lock."""
        tile.uses -= times
        if tile.uses > 0:
            return
        del self._live[tile.index, tile.reduction]
        tile.chunk = None
        pixels, own = tile.pixels, tile.place is None and not self._plan.native.ragged
        if pixels is not None and own and tile.reduction == self._plan.reduction:
            self._spare.append(pixels)


# --- the overview ------------------------------------------------------------------------------------------------


def _overview(
    levels: Sequence[NativeLevel], width: int, height: int, threads: int, part: Part | None = None
) -> Overview:
    """Of the last level or a part of it; those before it are there to draw from. Works through rows of native
    tiles, and each row some thousand pixels at a time."""
    native = levels[-1] if part is None else levels[-1].part(part)
    reduction = _reduction(native, native.width / width, native.height / height)
    draw = _drawing(levels, part, native.tile_width // reduction, native.tile_height // reduction)
    view = Overview(
        rgb=np.empty((height, width, 3), np.uint8),
        scanned=np.zeros((height, width), np.bool_),
        unreadable=np.zeros((height, width), np.bool_),
    )
    across = _Shares(native.width, width, reduction)
    down = _Shares(native.height, height, reduction)
    sums, marks, top = np.zeros((0, width, 3), np.float32), np.zeros((0, width, 2), np.float32), 0
    group = max(1, _OVERVIEW_PIXELS * reduction**2 // (native.tile_width * native.tile_height))
    with ThreadPoolExecutor(threads, "decode") as pool, ThreadPoolExecutor(1, "fetch") as fetcher:
        strips = _fetched(native, group, fetcher)
        for row, y0, y1 in _spans(native.rows, native.tile_height // reduction, down.length, 1):
            first, rows = down.of(y0, y1)
            more = first + rows.count - top - len(sums)
            if more > 0:
                sums, marks = (np.pad(held, ((0, more), (0, 0), (0, 0))) for held in (sums, marks))
            for _, x0, x1 in _spans(native.columns, native.tile_width // reduction, across.length, group):
                strip, marked = _strip(native, next(strips), reduction, pool, draw)
                left, columns = across.of(x0, x1)
                at = slice(first - top, first - top + rows.count), slice(left, left + columns.count)
                sums[at] += columns.over(rows.over(strip[: y1 - y0, : x1 - x0], 0), 1)
                if len(marked) == 1:
                    marks[at] += rows.over(np.ones((y1 - y0, 1, 1)), 0) * columns.over(marked[:, : x1 - x0], 1)
                else:
                    marks[at] += columns.over(rows.over(marked[: y1 - y0, : x1 - x0], 0), 1)
            done = height if row == native.rows - 1 else down.complete(y1)
            rest = done - top
            view.rgb[top:done] = np.minimum(sums[:rest] + 0.5, 255)
            view.scanned[top:done] = marks[:rest, :, 0] >= 0.5
            view.unreadable[top:done] = marks[:rest, :, 1] >= 0.5
            sums, marks, top = sums[rest:], marks[rest:], done
    return view


def _spans(tiles: int, size: int, length: int, group: int) -> Iterator[tuple[int, int, int]]:
    """Tiles in groups: the first of each, and which pixels of `length` the group covers."""
    for first in range(0, tiles, group):
        yield first, first * size, min((first + group) * size, length)


def _fetched(native: NativeLevel, group: int, fetcher: ThreadPoolExecutor) -> Iterator[list[_Native]]:
    """All tiles, row by row in groups, fetched in windows of which one is under way while another is worked on."""
    strips: list[list[_Native]] = []
    under_way: tuple[list[list[_Native]], Future[None]] | None = None
    held = 0
    for row in range(native.rows):
        for first in range(0, native.columns, group):
            start, stop = row * native.columns + first, row * native.columns + min(first + group, native.columns)
            strips.append([_Native(index) for index in range(start, stop)])
            held += int(np.maximum(native.sizes[start:stop], 0).sum())
            if held < _WINDOW // 2 and stop < len(native.sizes):
                continue
            tiles = [tile for strip in strips for tile in strip]
            following = strips, fetcher.submit(_fetch, native, tiles)
            if under_way is not None:
                under_way[1].result()
                yield from under_way[0]
            under_way, strips, held = following, [], 0
    if under_way is not None:
        under_way[1].result()
        yield from under_way[0]


def _strip(
    native: NativeLevel, tiles: list[_Native], reduction: int, pool: ThreadPoolExecutor, draw: _Draw | None
) -> tuple[U8, U8]:
    """Tiles beside each other: their colours (height, width, 3), white where there are none; and of each column
    whether it was scanned and whether it is unreadable (1, width, 2), or where tiles were drawn, of each pixel
    (height, width, 2)."""
    wide, high = native.tile_width // reduction, native.tile_height // reduction
    drawn = draw is not None and any(native.sizes[tile.index] < 0 for tile in tiles)
    strip = np.full((high, wide * len(tiles), 3), 255, np.uint8)
    marked = np.zeros((high if drawn else 1, wide * len(tiles), 2), np.uint8)

    def place(number: int) -> None:
        tile, columns = tiles[number], slice(number * wide, (number + 1) * wide)
        if draw is not None and native.sizes[tile.index] < 0:
            strip[:, columns], marked[:, columns, 0], marked[:, columns, 1] = draw(tile.index)
            return
        pixels = _decode(native, tile, reduction)
        if pixels is not None:
            strip[: pixels.shape[0], columns] = pixels
            marked[:, columns, 0] = 1
        elif tile.error is not None:
            marked[:, columns, 1] = 1

    list(pool.map(place, range(len(tiles))))
    return strip, marked


_Draw = Callable[[int], tuple[U8, Bool, Bool]]
"""Draws a tile that the level does not have: colours, what was scanned, and what is unreadable."""


def _drawing(levels: Sequence[NativeLevel], part: Part | None, width: int, height: int) -> _Draw | None:
    """What draws tiles of a part of the last level, width × height, from the level before; None where that is no
    finer, tile by tile, so that a damaged file does not have one tile decoded for each pixel."""
    if len(levels) < 2:
        return None
    fine, coarse = levels[-2:]
    scale_x, scale_y = fine.width / coarse.width, fine.height / coarse.height
    if coarse.tile_width * scale_x < fine.tile_width or coarse.tile_height * scale_y < fine.tile_height:
        return None
    (left, right), (top, bottom) = fine.under(coarse)

    def draw(index: int) -> tuple[U8, Bool, Bool]:
        if part is not None:
            row, column = divmod(index, part.right - part.left)
            index = (part.top + row) * coarse.columns + part.left + column
        row, column = divmod(index, coarse.columns)
        under = Part(int(left[column]), int(top[row]), int(right[column]), int(bottom[row]))
        x0, x1 = under.left * fine.tile_width, min(under.right * fine.tile_width, fine.width)
        y0, y1 = under.top * fine.tile_height, min(under.bottom * fine.tile_height, fine.height)
        across, xs = _seen(x0, x1, column * coarse.tile_width * scale_x, coarse.tile_width * scale_x, width)
        down, ys = _seen(y0, y1, row * coarse.tile_height * scale_y, coarse.tile_height * scale_y, height)
        view, at = _overview(levels[:-1], across, down, 1, under), np.ix_(ys, xs)
        return view.rgb[at], view.scanned[at], view.unreadable[at]

    return draw


def _seen(low: int, high: int, start: float, length: float, cells: int) -> tuple[int, npt.NDArray[np.int64]]:
    """Pixels low…high in how many cells of length / cells, and which of those lie where the `cells` from `start` on
    do."""
    count = max(1, min(round((high - low) * cells / length), high - low))
    middles = start + (np.arange(cells) + 0.5) * length / cells
    return count, np.clip((middles - low) / (high - low) * count, 0, count - 1).astype(np.int64)


@dataclass(frozen=True)
class _Taps:
    """`count` cells, each a sum of pixels `index` (taps, count) by `weights` (taps, count); or the pixels as they
    are."""

    count: int
    index: npt.NDArray[np.int64] | None = None
    weights: npt.NDArray[np.float32] | None = None

    def over(self, part: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
        """Of an array (height, width, n) along its first or second axis."""
        if self.index is None or self.weights is None:
            return part
        shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
        total: npt.NDArray[Any] | None = None
        for index, weight in zip(self.index, self.weights, strict=True):
            share = np.multiply(part.take(index, axis=axis), weight.reshape(shape), dtype=np.float32)
            total = share if total is None else np.add(total, share, out=total)
        assert total is not None
        return total


class _Shares:
    """Along one axis: which share of each overview pixel each reduced pixel of the level makes."""

    def __init__(self, pixels: int, cells: int, reduction: int) -> None:
        self.length = -(-pixels // reduction)
        self._scale = pixels / reduction / cells
        self.same = pixels == cells * reduction
        self._cells = cells

    def of(self, start: int, stop: int) -> tuple[int, _Taps]:
        """The first cell that pixels start…stop touch, and what these make of the cells from there on."""
        if self.same:
            return start, _Taps(stop - start)
        first = min(int((start + 1e-9) / self._scale), self._cells - 1)
        last = max(min(int(np.ceil((stop - 1e-9) / self._scale)), self._cells), first + 1)
        edges = np.arange(first, last + 1) * self._scale
        low, high = np.clip(edges[:-1], start, stop), np.clip(edges[1:], start, stop)
        pixels = np.floor(low + 1e-9).astype(np.int64)
        index = pixels + np.arange(int((np.ceil(high - 1e-9) - pixels).max(initial=1)))[:, None]
        weights = np.clip(np.minimum(index + 1, high) - np.maximum(index, low), 0, None) / self._scale
        return first, _Taps(last - first, np.clip(index - start, 0, stop - start - 1), weights.astype(np.float32))

    def complete(self, stop: int) -> int:
        """Cells that no pixel from `stop` on touches."""
        return min(int((stop + 1e-9) / self._scale), self._cells)
