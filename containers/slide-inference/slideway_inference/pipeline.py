"""Works through the slides of a shard so that no part waits for another without need:

    prepare   opens and surveys the next slides while those before are worked on. Those that the fast reader knows
              stay in S3; the others are fetched to disk, two at most, and evicted when they are read
    feed      deals out room for tiles, slide after slide: a slide's last batch is filled up by the next slide's
              first tiles, so that batches are full
    stream    a thread per slide in S3 hears what the reader process has filled
    read      a thread per reader process asks for batches of slides on disk
    work      one thread per worker gives batches to the task, and deals the answers back by slide
    write     leaves the results in Silver and marks the slide complete

What is made of tiles, and what is left of a slide, is the task's: `process` infers them (inference.py), `tile`
encodes them into packs (tiler.py). Everything between is bounded by the slots of the tile arena. A tile that the
fast reader cannot give is tried once more from disk by the other. Whatever goes wrong with a slide is that slide's
outcome, and the others go on."""

from __future__ import annotations

import os
import queue
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from slideway_inference.contracts import Shard, ShardSlide, TileSize
from slideway_inference.errors import (
    InternalError,
    ModelHangs,
    SlideFailed,
    SlideQuarantined,
    SlideUnopenable,
    SlideUnreadable,
    SlidewayError,
    Stopped,
    TilesUnreadable,
    by_name,
)
from slideway_inference.fast import Form, NotFast, PlanesNotSupported
from slideway_inference.log import Log
from slideway_inference.reader_process import Filled, ReadRequest
from slideway_inference.reading import Arena, Nursery, ReaderProcess
from slideway_inference.remote import Usage
from slideway_inference.store import Requests, Store
from slideway_inference.survey import Survey, SurveyRequest

_SLIDES_ON_DISK = 2
_LANES = 3
"""Reader processes for slides in S3: one streams, the next slides are surveyed in the others."""
_PREPARING = 2
_SLOT_BYTES = 32 << 20
_POLL = 0.2
_MUCH_INK = 0.5
"""Of what is dense on a slide: it may be a stain that looks like ink."""
PROGRESS_SECONDS = 1.0

T = TypeVar("T")


class Later(Exception):
    """A slide is not to be worked on now. It comes again after all others, no sooner than after `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


@dataclass
class Tally:
    """What became of the slides: how many in each state or SKIPPED, and why not, in order. `busy` are the seconds
    of each part of the pipeline."""

    states: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    busy: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, state: str, reason: str | None = None) -> None:
        with self._lock:
            self.states[state] += 1
            if reason is not None:
                self.reasons.append(reason)

    def add(self, seconds: Mapping[str, float]) -> None:
        with self._lock:
            self.busy.update(seconds)


Tiles = npt.NDArray[np.uint8]
Lengths = npt.NDArray[np.int32]
Answers = npt.NDArray[np.float32] | list[bytes]
"""What a worker makes of tiles, one for each."""


class Worker(Protocol):
    """One device or processor, used by one thread. `in_flight` is how many batches may be submitted before the
    first of their answers is asked for, `decoding` the seconds that it has decoded tiles in so far."""

    @property
    def on_gpu(self) -> bool: ...

    @property
    def in_flight(self) -> int: ...

    @property
    def decoding(self) -> float: ...

    def submit(self, tiles: Tiles, stored: Lengths) -> Callable[[], Answers]:
        """Begins with tiles (n, px, px, 3), which may be overwritten afterwards; the answers are waited for by
        calling. Where `stored` (n,) is not 0, a tile's first so many bytes are the task's other form in place of
        pixels; of which of those are damaged TilesUnreadable tells. What else either raises is the error of the
        slides whose tiles they are."""
        ...


class Target(Protocol):
    """Where a slide's answers go, from several threads, each tile's once."""

    def put(self, indices: npt.NDArray[np.intp], answers: Answers) -> None: ...

    def close(self) -> None:
        """Nothing of it is needed any more."""
        ...


@dataclass
class SlideWork:
    """A slide on its way, as its task knows it. `readable` (n,) goes with the survey's positions; `surveying` are
    the processor's seconds for the survey."""

    shard: Shard
    slide: ShardSlide
    folder: Path
    requests: Requests = field(default_factory=Requests)
    timings: dict[str, float] = field(default_factory=dict)
    surveying: float = 0.0
    bound: dict[str, float] = field(default_factory=dict)
    survey: Survey | None = None
    readable: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    target: Target | None = None
    error: SlidewayError | None = None

    def fail(self, error: Exception) -> None:
        """The first error is the slide's; what follows from it is not told."""
        if not isinstance(error, SlideQuarantined | SlideFailed):
            error = InternalError(f"{type(error).__name__} in {threading.current_thread().name}: {error}"[:500])
        if self.error is None:
            self.error = error

    @property
    def surveyed(self) -> Survey:
        assert self.survey is not None
        return self.survey


class Task(ABC):
    """What tiles are read for."""

    tile: TileSize
    batch: int
    """Tiles that a worker gets at once, at most."""
    form: Form
    """What tiles may come as, where the fast reader reads them."""
    decoder: str
    """What decodes those that come as parts; on record with the reader."""
    state: Literal["INFERRED", "TILED"]
    """Of a slide that went well."""
    timing: str
    part: str
    """What the workers do, among a slide's timings and in `bound`."""
    workers: Sequence[Worker]
    worker_seconds: float
    """A worker that is silent for longer hangs."""

    @abstractmethod
    def earlier(self, shard: Shard, slide: ShardSlide, requests: Requests) -> str | None:
        """The state of an earlier attempt that still holds; None when the slide is to be worked on. Raises Later
        when it is not to be now."""

    @abstractmethod
    def begin(self, work: SlideWork) -> Target:
        """The slide is surveyed, and its tiles will come."""

    @abstractmethod
    def write(self, work: SlideWork) -> None:
        """All its tiles have come. Raises SlidewayError, which then is the slide's."""

    @abstractmethod
    def complete(self, work: SlideWork) -> None:
        """Marks the slide's end, also after an error. Raises SlidewayError."""


@dataclass
class _Work(SlideWork):
    """`todo` are the tiles to read from disk; it is not begun before `not_before`."""

    not_before: float = 0.0
    started: float = field(default_factory=time.monotonic)
    lane: ReaderProcess | None = None
    path: Path | None = None
    granted: dict[int, _Segment] = field(default_factory=dict)
    streaming: bool = False
    strips: Sequence[int] = ()
    todo: npt.NDArray[np.intp] = field(default_factory=lambda: np.zeros(0, np.intp))
    next_todo: int = 0
    unread: int = 0
    unsettled: int = 0
    again: int = 0
    in_parts: bool = False
    bytes_read: int = 0
    done: int = 0
    reading_from: float = 0.0
    progress_at: float = 0.0
    on_disk: bool = False


@dataclass
class _Segment:
    """The tiles of one slide within a batch: from row `first` on, which of the slide's they are, which of them
    could be read, and how many bytes those take that lie there in another form. No `indices`: nothing came."""

    batch: _Batch
    work: _Work
    first: int
    count: int
    streamed: bool
    indices: npt.NDArray[np.intp] | None = None
    readable: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    stored: Lengths = field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass
class _Batch:
    """What lies in a slot of the arena: tiles of one or more slides, `count` in all. Sealed when no more will be
    added; ready for a worker when then nothing is awaited."""

    slot: int
    segments: list[_Segment] = field(default_factory=list)
    count: int = 0
    awaited: int = 0
    sealed: bool = False

    def add(self, work: _Work, count: int, streamed: bool) -> _Segment:
        segment = _Segment(self, work, self.count, count, streamed)
        self.segments.append(segment)
        self.count += count
        self.awaited += 1
        return segment


@dataclass
class _Flying:
    """A batch on a device: its parts that the worker sees, what answers for them, and the seconds so far, those of
    decoding apart."""

    batch: _Batch
    live: list[_Segment]
    answer: Callable[[], Answers] | None
    seconds: float
    decoding: float


class Pipeline:
    def __init__(
        self,
        *,
        store: Store,
        task: Task,
        readers: int,
        scratch: Path,
        log: Log,
        stop: threading.Event,
        tally: Tally,
    ) -> None:
        self._store = store
        self._task = task
        self._px = task.tile.px
        self._scratch = scratch
        self._log = log
        self._stop = stop
        self._batch = max(1, min(task.batch, _SLOT_BYTES // (self._px**2 * 3)))
        slots = 2 * (readers + len(task.workers))
        self._arena = Arena(slots, self._batch * self._px**2 * 3, scratch)
        self._nursery = Nursery()
        self._surveyor = ReaderProcess(self._arena, self._nursery, stop)
        self._surveying = threading.Lock()
        self._readers = [ReaderProcess(self._arena, self._nursery, stop) for _ in range(readers)]
        self._lanes = [ReaderProcess(self._arena, self._nursery, stop, readers) for _ in range(_LANES)]
        self._threads = readers
        self._idle_lanes: queue.Queue[ReaderProcess] = queue.Queue()
        for lane in self._lanes:
            self._idle_lanes.put(lane)
        self._free: queue.Queue[int] = queue.LifoQueue()  # what was freed last is in the processor's cache
        for slot in range(slots):
            self._free.put(slot)
        self._prepared: queue.Queue[_Work | None] = queue.Queue(1)
        self._on_disk: queue.Queue[_Work] = queue.Queue()  # bounded by the slides on disk
        self._again: queue.Queue[_Work | None] = queue.Queue()
        self._filled: queue.Queue[_Batch | None] = queue.Queue()  # bounded by the slots
        self._finished: queue.Queue[_Work | None] = queue.Queue()
        self._disk = threading.Semaphore(_SLIDES_ON_DISK)
        self._lock = threading.Lock()
        self._cut_lock = threading.Lock()
        self._current: _Work | None = None
        self._left = 0
        self._fault: BaseException | None = None
        self._busy_since: dict[int, float] = {}
        self._tally = tally

    def run(self, shards: Sequence[Shard]) -> None:
        """Works through all slides. Raises Stopped when told to stop, ModelHangs."""
        slides = [(shard, slide) for shard in shards for slide in shard.slides]
        self._left = len(slides)
        works = deque(_Work(*pair, self._scratch / f"slide-{number}") for number, pair in enumerate(slides))
        prepare = [self._thread(f"prepare-{i}", self._prepare_all, works) for i in range(_PREPARING)]
        feed = self._thread("feed", self._feed)
        again = self._thread("again", self._prepare_again)
        read = [self._thread(f"read-{i}", self._read, reader) for i, reader in enumerate(self._readers)]
        work = [self._thread(f"work-{i}", self._work, worker) for i, worker in enumerate(self._task.workers)]
        write = self._thread("write", self._write_all)
        try:
            self._join(prepare)
            with suppress(Stopped):
                self._put(self._prepared, None)
            self._join([feed, *read])
            self._again.put(None)
            for _ in work:
                self._filled.put(None)
            self._join([again, *work])
            self._finished.put(None)
            self._join([write])
        finally:
            for process in (self._surveyor, *self._readers, *self._lanes):
                process.close()
            self._nursery.close()
        self._arena.close()
        if self._fault is not None:
            raise self._fault
        if self._stop.is_set():
            raise Stopped("The job was told to stop.")

    def _thread(self, name: str, body: Callable[..., None], *args: object) -> threading.Thread:
        def guarded() -> None:
            try:
                body(*args)
            except Stopped:
                pass
            except BaseException as error:  # a fault of the pipeline itself: stop everything and tell
                self._fault = error
                self._stop.set()

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    # --- prepare -----------------------------------------------------------------------------------------------

    def _prepare_all(self, works: deque[_Work]) -> None:
        while True:
            with self._lock:
                work = works.popleft() if works else None
            if work is None:
                return
            self._stop.wait(max(0.0, work.not_before - time.monotonic()))
            self._check_stop()
            try:
                ready = self._prepare(work)
            except Stopped:
                raise
            except Later as later:
                work.not_before = time.monotonic() + later.seconds
                works.append(work)
                continue
            except Exception as error:
                self._fail(work, error)
                self._finish(work)
                continue
            if ready:
                self._put(self._prepared, work)

    def _prepare(self, work: _Work) -> bool:
        """Surveys a slide, fetching it first where the fast reader does not know it; False when there is nothing
        left to do for it."""
        slide = work.slide
        state = self._task.earlier(work.shard, slide, work.requests)
        if state is not None:
            self._tally.count("SKIPPED")
            self._log.event("slide-skipped", slideId=slide.slide_id, state=state)
            self._has_ended()
            return False
        work.lane = self._get(self._idle_lanes)
        work.started = time.monotonic()
        self._log.event("slide-started", slideId=slide.slide_id, bytes=slide.size, files=len(slide.files))
        try:
            opened = work.lane.open(self._request(work, slide))
            work.survey, work.strips = opened.survey, opened.strips
            work.timings = self._timings(work.survey, fetched=0.0)
            work.surveying = opened.usage.processor
            self._used(work, replace(opened.usage, processor=0.0))
        except PlanesNotSupported:
            raise
        except (NotFast, SlideUnopenable, SlideUnreadable):
            # Also where the fast reader's process died: what is wrong with the file, if anything, the other tells.
            self._release_lane(work)
            self._survey_from_disk(work)
        count = len(work.surveyed.positions)
        work.readable = np.zeros(count, np.bool_)
        work.target = self._task.begin(work)
        work.unsettled = count
        if count == 0:
            self._finish(work)
            return False
        return True

    def _survey_from_disk(self, work: _Work) -> None:
        started = time.monotonic()
        path = self._fetch(work)
        fetched = time.monotonic() - started
        with self._surveying:
            try:
                work.survey = self._surveyor.survey(self._request(work, path))
            finally:
                self._surveyor.release()
        work.timings = self._timings(work.survey, fetched)
        work.surveying = work.survey.seconds
        self._read_from_disk(work, np.arange(len(work.survey.positions)))

    def _timings(self, survey: Survey, fetched: float) -> dict[str, float]:
        return {"fetch": fetched, "tissue": survey.seconds, "read": 0.0, self._task.timing: 0.0, "write": 0.0}

    def _request(self, work: _Work, slide: Path | ShardSlide) -> SurveyRequest:
        return SurveyRequest(
            slide=slide,
            checksum=work.slide.checksum,
            mpp=work.slide.mpp,
            mpp_source=work.slide.mpp_source,
            px=self._px,
            tile_mpp=self._task.tile.mpp,
            overlap=self._task.tile.overlap,
            mpp_tolerance=work.shard.parameters.mpp_tolerance,
            tissue_min_fraction=work.shard.parameters.tissue_min_fraction,
        )

    def _fetch(self, work: _Work) -> Path:
        while not self._disk.acquire(timeout=_POLL):
            self._check_stop()
        work.on_disk = True
        work.folder.mkdir()
        work.path = self._store.fetch(work.slide, work.folder, work.requests, self._stop)
        return work.path

    def _read_from_disk(self, work: _Work, todo: npt.NDArray[np.intp]) -> None:
        work.todo, work.next_todo, work.unread = todo, 0, len(todo)

    def _prepare_again(self) -> None:
        """Brings slides of which the fast reader has not given all tiles to disk."""
        while (work := self._get(self._again)) is not None:
            try:
                self._fetch(work)
            except Stopped:
                raise
            except Exception as error:
                self._fail(work, error)
            self._on_disk.put(work)  # with an error too, so that its tiles are settled in one place

    def _evict(self, work: _Work) -> None:
        with self._lock:
            if not work.on_disk:
                return
            work.on_disk = False
        shutil.rmtree(work.folder, ignore_errors=True)
        self._disk.release()

    def _release_lane(self, work: _Work) -> None:
        lane, work.lane = work.lane, None
        if lane is not None:
            with suppress(SlideUnreadable):  # the process died on closing; the next request starts another
                lane.release()
            self._idle_lanes.put(lane)

    # --- feed --------------------------------------------------------------------------------------------------

    def _feed(self) -> None:
        """Starts the slides in their order and deals out room to those that are streamed."""
        open_batch: _Batch | None = None
        streams = []
        while True:
            try:
                work = self._prepared.get_nowait()
            except queue.Empty:
                self._seal(open_batch)  # rather a batch that is not full than a model that waits for the next slide
                open_batch = None
                work = self._get(self._prepared)
            if work is None:
                break
            work.reading_from = work.progress_at = time.monotonic()
            if work.lane is None:
                self._on_disk.put(work)
                continue
            work.streaming = True
            work.unsettled += 1  # the stream itself, so that the slide is not finished before
            lane, survey = work.lane, work.surveyed
            room = self._batch - (open_batch.count if open_batch else 0)
            lane.stream(survey.geometry, survey.positions, self._batch, room, self._task.form)
            streams.append(self._thread("stream", self._hear, work, lane))
            open_batch = self._grant(work, lane, open_batch)
        self._seal(open_batch)
        self._join(streams)

    def _grant(self, work: _Work, lane: ReaderProcess, batch: _Batch | None) -> _Batch | None:
        """Grants a stream room for all its tiles. The last batch, where it is not full, is the next slide's too."""
        for left in work.strips:
            while left:
                if batch is None:
                    batch = _Batch(self._get(self._free))
                count = min(left, self._batch - batch.count)
                with self._lock:
                    if not work.streaming or work.error is not None:
                        return batch
                    segment = batch.add(work, count, streamed=True)
                    offset = self._arena.offset(batch.slot, segment.first, self._px)
                    work.granted[offset] = segment
                lane.grant(offset, count)
                left -= count
                if batch.count == self._batch:
                    self._seal(batch)
                    batch = None
        return batch

    def _seal(self, batch: _Batch | None) -> None:
        if batch is None:
            return
        with self._lock:
            batch.sealed = True
            ready = batch.awaited == 0
        if ready:
            self._filled.put(batch)

    def _arrived(self, segment: _Segment) -> None:
        batch = segment.batch
        with self._lock:
            batch.awaited -= 1
            ready = batch.sealed and batch.awaited == 0
        if ready:
            self._filled.put(batch)

    # --- stream ------------------------------------------------------------------------------------------------

    def _hear(self, work: _Work, lane: ReaderProcess) -> None:
        """Takes what the stream has filled until it ends, however it does."""
        missing = np.ones(len(work.readable), np.bool_)
        again = missing.copy()
        error: SlidewayError | None = None

        def waits() -> bool:
            if work.error is not None:
                raise work.error
            return not work.granted

        try:
            while isinstance(reply := lane.streamed(waits), Filled):
                with self._lock:
                    segment = work.granted.pop(reply.offset)
                segment.indices, segment.readable, segment.stored = reply.indices, reply.readable, reply.stored
                work.readable[reply.indices] = reply.readable
                work.in_parts |= self._task.form == "parts" and bool(reply.stored.any())
                missing[reply.indices] = ~reply.readable
                again[reply.indices] = reply.again
                self._arrived(segment)
            self._used(work, reply.usage)
            error = by_name(reply.error.name, reply.error.message) if reply.error else None
        except SlidewayError as reason:
            error = reason
            if isinstance(reason, Stopped):
                raise
            lane.close()
        with self._lock:
            work.streaming = False
            unfilled = list(work.granted.values())
            work.granted.clear()
        for segment in unfilled:
            self._arrived(segment)
        self._release_lane(work)
        if isinstance(error, SlideFailed) and not isinstance(error, InternalError):
            self._fail(work, error)  # the storage failed; what failed in reading, the other reader tries
        todo = np.flatnonzero(missing & again)
        if work.error is not None:
            todo = todo[:0]
        self._settle(work, int(missing.sum()) - len(todo) + 1)
        if len(todo):
            work.again = len(todo)
            self._read_from_disk(work, todo)
            self._again.put(work)

    def _used(self, work: _Work, usage: Usage) -> None:
        work.requests.count(get=usage.requests)
        with self._lock:
            work.bytes_read += usage.bytes
            work.timings["fetch"] += usage.network
            work.timings["read"] += usage.processor

    # --- read --------------------------------------------------------------------------------------------------

    def _read(self, reader: ReaderProcess) -> None:
        while (batch := self._next_batch(reader)) is not None:
            for segment in batch.segments:
                work = segment.work
                started = time.monotonic()
                try:
                    self._read_segment(reader, segment)
                except Stopped:
                    raise
                except Exception as error:
                    if not (work.again and isinstance(error, SlideQuarantined)):
                        self._fail(work, error)
                with self._lock:
                    work.timings["read"] += time.monotonic() - started
                self._has_read(work, segment.count)
                self._arrived(segment)

    def _read_segment(self, reader: ReaderProcess, segment: _Segment) -> None:
        work, indices = segment.work, segment.indices
        assert indices is not None
        segment.readable = np.zeros(segment.count, np.bool_)
        segment.stored = np.zeros(segment.count, np.int32)
        if work.error is not None or work.path is None:
            return
        survey = work.surveyed
        offset = self._arena.offset(segment.batch.slot, segment.first, self._px)
        segment.readable = reader.read(
            ReadRequest(
                work.path,
                survey.geometry,
                survey.positions[indices],
                offset,
                survey.level_size if work.again else None,
            )
        )
        work.readable[indices] = segment.readable

    def _next_batch(self, reader: ReaderProcess) -> _Batch | None:
        """The next tiles to read from disk; None at the end. Where there is nothing to read yet the reader lets go
        of its slide first, so that the slide's space on disk is free."""
        released = False
        slot: int | None = None
        while self._left:
            self._check_stop()
            with self._cut_lock:
                if self._to_read() is not None:
                    if slot is None:
                        with suppress(queue.Empty):
                            slot = self._free.get_nowait()
                    if slot is not None:
                        return self._cut(_Batch(slot))
            if not released:
                self._release(reader)
                released = True
            time.sleep(0.005)
        return None

    def _to_read(self) -> _Work | None:
        """The slide on disk of which tiles are to be read; its errors have no tiles left."""
        while True:
            work = self._current
            if work is None:
                try:
                    work = self._current = self._on_disk.get_nowait()
                except queue.Empty:
                    return None
            left = len(work.todo) - work.next_todo
            if left and work.error is None:
                return work
            self._current = None
            if left:
                work.next_todo = len(work.todo)
                self._has_read(work, left)
                self._settle(work, left)

    def _cut(self, batch: _Batch) -> _Batch:
        while batch.count < self._batch and (work := self._to_read()) is not None:
            stop = min(work.next_todo + self._batch - batch.count, len(work.todo))
            segment = batch.add(work, stop - work.next_todo, streamed=False)
            segment.indices = work.todo[work.next_todo : stop]
            work.next_todo = stop
        batch.sealed = True
        return batch

    def _release(self, reader: ReaderProcess) -> None:
        with suppress(SlideUnreadable):  # the process died on closing; the next request starts another
            reader.release()

    def _has_read(self, work: _Work, count: int) -> None:
        with self._lock:
            work.unread -= count
            last = work.unread == 0
        if last:
            self._evict(work)

    # --- work --------------------------------------------------------------------------------------------------

    def _work(self, worker: Worker) -> None:
        """Keeps as many batches in flight as the device takes; the next one goes there before an answer is waited
        for, if it is there."""
        flying: deque[_Flying] = deque()
        while (batch := self._get(self._filled)) is not None:
            flying.append(self._submit(worker, batch))
            while flying and (len(flying) >= worker.in_flight or self._filled.empty()):
                self._land(worker, flying.popleft())
            self._busy_since.pop(id(worker), None)
        for last in flying:
            self._land(worker, last)
        self._busy_since.pop(id(worker), None)

    def _submit(self, worker: Worker, batch: _Batch) -> _Flying:
        self._busy_since[id(worker)] = time.monotonic()
        began, decoding = _clock(worker), worker.decoding
        live = [part for part in batch.segments if part.work.error is None and part.readable.any()]
        answer: Callable[[], Answers] | None = None
        if live:
            rows = np.concatenate([part.first + np.flatnonzero(part.readable) for part in live])
            stored = np.concatenate([part.stored[part.readable] for part in live])
            tiles = self._arena.tiles(batch.slot, batch.count, self._px)
            with suppress(Exception):  # whose slide it is, is found out when it lands
                answer = worker.submit(tiles if len(rows) == batch.count else tiles[rows], stored)
        decoding = worker.decoding - decoding
        return _Flying(batch, live, answer, _clock(worker) - began - decoding, decoding)

    def _land(self, worker: Worker, flying: _Flying) -> None:
        """Deals the answers back by slide."""
        self._busy_since[id(worker)] = time.monotonic()
        began = _clock(worker)
        batch, live = flying.batch, flying.live
        # Of a stream those that did not come readable are tried again.
        counts = [int(part.readable.sum()) if part.streamed else part.count for part in batch.segments]
        try:
            answers = flying.answer() if flying.answer is not None else None
        except Exception:
            answers = None
        if answers is None:
            self._work_apart(worker, batch, live)
        else:
            start = 0
            for part in live:
                end = start + int(part.readable.sum())
                self._deal(part, answers[start:end])
                start = end
        self._free.put(batch.slot)
        seconds = flying.seconds + _clock(worker) - began
        for part, count in zip(batch.segments, counts, strict=True):
            share = part.count / batch.count
            with self._lock:
                part.work.timings[self._task.timing] += seconds * share
                if flying.decoding:
                    part.work.timings["decode"] = part.work.timings.get("decode", 0.0) + flying.decoding * share
                part.work.done += count
            self._progress(part.work)
            self._settle(part.work, count)

    def _work_apart(self, worker: Worker, batch: _Batch, live: Sequence[_Segment]) -> None:
        """After an error each slide's tiles by themselves, so that it is the error of whose they are."""
        tiles = self._arena.tiles(batch.slot, batch.count, self._px)
        for part in live:
            try:
                answers = self._work_part(worker, part, tiles[part.first : part.first + part.count])
            except Exception as error:
                self._fail(part.work, error)
            else:
                self._deal(part, answers)

    def _work_part(self, worker: Worker, part: _Segment, tiles: Tiles) -> Answers:
        """A slide's readable tiles of a batch; without those that turn out to be damaged, which are marked so."""
        self._busy_since[id(worker)] = time.monotonic()
        try:
            return worker.submit(tiles[part.readable], part.stored[part.readable])()
        except TilesUnreadable as error:
            assert part.indices is not None
            damaged = np.flatnonzero(part.readable)[error.damaged]
            part.readable[damaged] = False
            part.work.readable[part.indices[damaged]] = False
        return self._work_part(worker, part, tiles) if part.readable.any() else []

    def _deal(self, part: _Segment, answers: Answers) -> None:
        assert part.indices is not None
        assert part.work.target is not None
        try:
            part.work.target.put(part.indices[part.readable], answers)
        except Stopped:
            raise
        except Exception as error:
            self._fail(part.work, error)

    def _progress(self, work: _Work) -> None:
        now = time.monotonic()
        with self._lock:
            if now - work.progress_at < PROGRESS_SECONDS:
                return
            work.progress_at = now
        tell_progress(self._log, work, work.done, now - work.reading_from)

    def _settle(self, work: _Work, count: int) -> None:
        """Some tiles have reached their end, worked on or given up; with the last of them the slide is finished."""
        if count == 0:
            return
        with self._lock:
            work.unsettled -= count
            last = work.unsettled == 0
        if last:
            self._finish(work)

    # --- write -------------------------------------------------------------------------------------------------

    def _finish(self, work: _Work) -> None:
        self._release_lane(work)
        self._evict(work)
        self._finished.put(work)

    def _write_all(self) -> None:
        while (work := self._get(self._finished)) is not None:
            self._write(work)
            self._has_ended()

    def _write(self, work: _Work) -> None:
        started = time.monotonic()
        try:
            if work.error is None and work.survey is not None:
                others = [self._task.decoder] if work.in_parts else []
                others += ["openslide"] if work.again and work.readable[work.todo].any() else []
                work.survey = replace(work.survey, reader=", ".join([work.survey.reader, *others]))
                check_readable(work.readable)
                self._task.write(work)
        except Stopped:
            raise
        except Exception as error:
            self._fail(work, error)
        now = time.monotonic()
        work.timings["write"] = work.timings.get("write", 0.0) + now - started
        work.timings["total"] = now - work.started
        work.bound = self._bound(work)
        try:
            self._task.complete(work)
        except SlidewayError as error:
            if work.error is None:
                work.error = error
        if work.target is not None:
            work.target.close()
        self._report(work)

    def _bound(self, work: _Work) -> dict[str, float]:
        """What the slide's time went to: shares of the seconds that each part needs by itself, all of the
        machine's processors or devices working on it. The parts overlap, so that the largest is what bounds."""
        timings = work.timings
        workers = len(self._task.workers)
        seconds = {
            "network": timings.get("fetch", 0.0),
            "tissue": work.surveying / self._threads,
            "decode": timings.get("read", 0.0) / self._threads + timings.get("decode", 0.0) / workers,
            self._task.part: timings.get(self._task.timing, 0.0) / workers,
            "write": timings.get("write", 0.0),
        }
        self._tally.add(seconds)
        return shares(seconds)

    def _report(self, work: _Work) -> None:
        tell_end(
            self._log,
            self._tally,
            work,
            self._task.state,
            time.monotonic() - work.reading_from if work.reading_from else 0.0,
            tilesReadAgain=work.again,
            bytesRead=work.bytes_read + (work.slide.size if work.path is not None else 0),
        )

    def _has_ended(self) -> None:
        with self._lock:
            self._left -= 1

    # --- common ------------------------------------------------------------------------------------------------

    def _join(self, threads: Sequence[threading.Thread]) -> None:
        """Waits for them, in short waits, so that signals are handled; not for a worker that hangs."""
        for thread in threads:
            while thread.is_alive():
                thread.join(_POLL)
                late = time.monotonic() - self._task.worker_seconds
                if any(since < late for since in list(self._busy_since.values())):
                    self._stop.set()
                    raise ModelHangs(
                        f"The model has not answered for a batch for {self._task.worker_seconds:g} s "
                        "(SLIDEWAY_MODEL_SECONDS): try it with `slideway model check`, or raise the limit."
                    )

    def _fail(self, work: _Work, error: Exception) -> None:
        with self._lock:
            work.fail(error)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped("The job was told to stop.")

    def _get(self, source: queue.Queue[T]) -> T:
        while True:
            try:
                return source.get(timeout=_POLL)
            except queue.Empty:
                self._check_stop()

    def _put(self, target: queue.Queue[_Work | None], work: _Work | None) -> None:
        while True:
            try:
                target.put(work, timeout=_POLL)
                return
            except queue.Full:
                self._check_stop()


def tell_progress(log: Log, work: SlideWork, done: int, seconds: float) -> None:
    log.event(
        "slide-progress",
        slideId=work.slide.slide_id,
        tilesDone=done,
        tilesTotal=len(work.readable),
        tilesPerSecond=round(done / seconds, 1),
    )


def tell_end(log: Log, tally: Tally, work: SlideWork, state: str, seconds: float, **told: Any) -> None:  # noqa: ANN401
    """Logs and counts how a slide ended: in `state`, its tiles taking `seconds`, or with its error."""
    slide_id, error = work.slide.slide_id, work.error
    if error is None:
        tally.count(state)
        log.event(
            "slide-complete",
            slideId=slide_id,
            tilesDone=len(work.readable),
            tilesTotal=len(work.readable),
            tilesPerSecond=round(len(work.readable) / max(seconds, 1e-3), 1) if seconds else 0.0,
            tilesUnreadable=int((~work.readable).sum()),
            **told,
            timings=rounded(work.timings),
            bound=work.bound,
        )
        if work.surveyed.ink_fraction > _MUCH_INK:
            log.event(
                "slide-mostly-ink",
                level="warning",
                slideId=slide_id,
                inkFraction=round(work.surveyed.ink_fraction, 4),
                message="Most of what is dense on it was taken for pen marks: look at its thumbnail and tissue.",
            )
        return
    quarantined = isinstance(error, SlideQuarantined)
    tally.count("QUARANTINED" if quarantined else "FAILED", f"{slide_id}: {error.name}: {error}")
    log.event(
        "slide-quarantined" if quarantined else "slide-failed",
        level="warning" if quarantined else "error",
        slideId=slide_id,
        error=error.name,
        message=str(error),
    )


def _clock(worker: Worker) -> float:
    """Seconds that a GPU is waited for; or of the processor, which is shared with reading."""
    return time.perf_counter() if worker.on_gpu else time.thread_time()


def check_readable(readable: npt.NDArray[np.bool_]) -> None:
    """Raises SlideUnreadable when there are tiles and none can be read."""
    if len(readable) and not readable.any():
        raise SlideUnreadable(f"None of its {len(readable)} tiles can be read: scan or copy the file again.")


def rounded(timings: Mapping[str, float]) -> dict[str, float]:
    """Seconds to the millisecond, as markers and logs have them."""
    return {name: round(seconds, 3) for name, seconds in timings.items()}


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each as a share of their sum; none where nothing was done."""
    total = sum(seconds.values())
    return {name: round(value / total, 3) for name, value in seconds.items()} if total > 0 else {}


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def readers_for(cores: int) -> int:
    """Readers only wait when what follows is slower, so there is one per processor that feeds no GPU."""
    return int(os.environ.get("SLIDEWAY_READERS", 0)) or max(1, cores)
