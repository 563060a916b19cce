"""Works through the slides of a shard so that no part waits for another without need:

    prepare   fetches a slide and surveys it while the one before is still worked on
    read      one thread per reader process asks for batches of tiles, slide after slide without a gap
    infer     one thread per device runs the model
    write     leaves the results in Silver and marks the slide complete

Queues between them are bounded by the slots of the tile arena, and slides on disk by two. Whatever goes wrong with
a slide is that slide's outcome, and the others go on."""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from slideway_inference.contracts import Shard, ShardSlide
from slideway_inference.errors import (
    InternalError,
    SlideFailed,
    SlideQuarantined,
    SlideUnreadable,
    SlidewayError,
    Stopped,
)
from slideway_inference.log import Log
from slideway_inference.model import ModelSpec, Predictor
from slideway_inference.reader_process import ReadRequest
from slideway_inference.reading import Arena, ReaderProcess
from slideway_inference.results import completion, is_done, result_key, tiles_parquet, write_results
from slideway_inference.store import Requests, Store
from slideway_inference.survey import Survey, SurveyRequest

_SLIDES_ON_DISK = 2
_SLOT_BYTES = 32 << 20
_POLL = 0.2
_PROGRESS_SECONDS = 1.0

T = TypeVar("T")


@dataclass
class Tally:
    """What became of the slides: how many in each state or SKIPPED, and why not, in order."""

    states: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)


@dataclass
class _Work:
    """A slide on its way. `readable` and `values` fill batch by batch."""

    shard: Shard
    slide: ShardSlide
    folder: Path
    requests: Requests = field(default_factory=Requests)
    timings: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    path: Path | None = None
    survey: Survey | None = None
    readable: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    values: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    error: SlidewayError | None = None
    unread: int = 0
    unsettled: int = 0
    next_tile: int = 0
    done: int = 0
    reading_from: float = 0.0
    progress_at: float = 0.0
    on_disk: bool = False


@dataclass(frozen=True)
class _Batch:
    work: _Work
    start: int
    stop: int
    slot: int


class Pipeline:
    def __init__(
        self,
        *,
        store: Store,
        model: ModelSpec,
        predictors: Sequence[Predictor],
        readers: int,
        scratch: Path,
        job_name: str,
        log: Log,
        stop: threading.Event,
        tally: Tally,
    ) -> None:
        self._store = store
        self._model = model
        self._predictors = predictors
        self._scratch = scratch
        self._job_name = job_name
        self._log = log
        self._stop = stop
        many = f"{len(predictors)} × " if len(predictors) > 1 and predictors[0].on_gpu else ""
        self._device = many + predictors[0].device_name
        self._batch = max(1, min(model.batch, _SLOT_BYTES // (model.px**2 * 3)))
        slots = 2 * (readers + len(predictors))
        self._arena = Arena(slots, self._batch * model.px**2 * 3, scratch)
        self._surveyor = ReaderProcess(self._arena, stop)
        self._readers = [ReaderProcess(self._arena, stop) for _ in range(readers)]
        self._free: queue.Queue[int] = queue.Queue()
        for slot in range(slots):
            self._free.put(slot)
        self._prepared: queue.Queue[_Work | None] = queue.Queue(1)
        self._filled: queue.Queue[_Batch | None] = queue.Queue()  # bounded by the slots
        self._finished: queue.Queue[_Work | None] = queue.Queue()
        self._disk = threading.Semaphore(_SLIDES_ON_DISK)
        self._lock = threading.Lock()
        self._feed_lock = threading.Lock()
        self._current: _Work | None = None
        self._fed = False
        self._fault: BaseException | None = None
        self._tally = tally

    def run(self, shards: Sequence[Shard]) -> None:
        """Works through all slides. Raises Stopped when told to stop."""
        prepare = self._thread("prepare", self._prepare_all, shards)
        read = [self._thread(f"read-{i}", self._read, reader) for i, reader in enumerate(self._readers)]
        infer = [self._thread(f"infer-{i}", self._infer, model) for i, model in enumerate(self._predictors)]
        write = self._thread("write", self._write_all)
        _join([prepare, *read])
        for _ in infer:
            self._filled.put(None)
        _join(infer)
        self._finished.put(None)
        _join([write])
        self._surveyor.close()
        for reader in self._readers:
            reader.close()
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

    def _prepare_all(self, shards: Sequence[Shard]) -> None:
        number = 0
        try:
            for shard in shards:
                for slide in shard.slides:
                    self._check_stop()
                    number += 1
                    work = _Work(shard, slide, self._scratch / f"slide-{number}")
                    try:
                        ready = self._prepare(work)
                    except Stopped:
                        raise
                    except Exception as error:
                        self._fail(work, error)
                        self._finish(work)
                        continue
                    if ready:
                        self._put(self._prepared, work)
        finally:
            self._put(self._prepared, None)

    def _prepare(self, work: _Work) -> bool:
        """Fetches and surveys; False when there is nothing left to do for the slide."""
        shard, slide = work.shard, work.slide
        previous = self._store.get_if_there(
            shard.output_bucket, result_key(shard, slide, "complete.json"), work.requests
        )
        state = is_done(previous, shard, slide) if previous is not None else None
        if state is not None:
            self._count("SKIPPED")
            self._log.event("slide-skipped", slideId=slide.slide_id, state=state)
            return False
        self._take_disk(work)
        work.started = started = time.monotonic()
        self._log.event("slide-started", slideId=slide.slide_id, bytes=slide.size, files=len(slide.files))
        work.folder.mkdir()
        work.path = self._store.fetch(slide, work.folder, work.requests, self._stop)
        work.timings["fetch"] = time.monotonic() - started
        try:
            work.survey = self._surveyor.survey(
                SurveyRequest(
                    path=work.path,
                    checksum=slide.checksum,
                    mpp=slide.mpp,
                    mpp_source=slide.mpp_source,
                    px=self._model.px,
                    tile_mpp=self._model.mpp,
                    overlap=self._model.overlap,
                    mpp_tolerance=shard.parameters.mpp_tolerance,
                    tissue_min_fraction=shard.parameters.tissue_min_fraction,
                )
            )
        finally:
            self._surveyor.release()
        count = len(work.survey.positions)
        work.timings["tissue"] = work.survey.seconds
        work.timings |= {"read": 0.0, "infer": 0.0}
        work.readable = np.zeros(count, np.bool_)
        work.values = np.full((count, len(self._model.outputs)), np.nan, np.float32)
        work.unread = work.unsettled = count
        if count == 0:
            self._finish(work)
            return False
        return True

    def _take_disk(self, work: _Work) -> None:
        while not self._disk.acquire(timeout=_POLL):
            self._check_stop()
        work.on_disk = True

    def _evict(self, work: _Work) -> None:
        with self._lock:
            if not work.on_disk:
                return
            work.on_disk = False
        shutil.rmtree(work.folder, ignore_errors=True)
        self._disk.release()

    # --- read --------------------------------------------------------------------------------------------------

    def _read(self, reader: ReaderProcess) -> None:
        reader.start()
        while True:
            slot = self._get(self._free)
            batch = self._next_batch(reader, slot)
            if batch is None:
                return
            work = batch.work
            started = time.monotonic()
            try:
                assert work.survey is not None
                assert work.path is not None
                positions = work.survey.positions[batch.start : batch.stop]
                offset = slot * self._arena.slot_bytes
                work.readable[batch.start : batch.stop] = reader.read(
                    ReadRequest(work.path, work.survey.geometry, positions, offset)
                )
            except Stopped:
                raise
            except Exception as error:
                self._fail(work, error)
            with self._lock:
                work.timings["read"] += time.monotonic() - started
            self._has_read(work, batch.stop - batch.start)
            if work.error is None:
                self._filled.put(batch)
            else:
                self._free.put(slot)
                self._settle(work, batch.stop - batch.start)

    def _next_batch(self, reader: ReaderProcess, slot: int) -> _Batch | None:
        """The next tiles to read, of this slide or the next; None at the end. Where there is nothing to read yet
        the reader lets go of its slide first, so that the slide's space on disk is free."""
        released = False
        while True:
            self._check_stop()
            with self._feed_lock:
                batch = self._cut(slot)
                if batch is not None:
                    return batch
                if self._fed:
                    return None
            if not released:
                self._release(reader)
                released = True
            time.sleep(0.005)

    def _cut(self, slot: int) -> _Batch | None:
        while True:
            work = self._current
            if work is None:
                try:
                    work = self._prepared.get_nowait()
                except queue.Empty:
                    return None
                if work is None:
                    self._fed = True
                    return None
                self._current = work
                work.reading_from = work.progress_at = time.monotonic()
            count = len(work.readable)
            start = work.next_tile
            if work.error is not None:
                self._current = None
                work.next_tile = count
                self._has_read(work, count - start)
                self._settle(work, count - start)
                continue
            work.next_tile = stop = min(start + self._batch, count)
            if stop == count:
                self._current = None
            return _Batch(work, start, stop, slot)

    def _release(self, reader: ReaderProcess) -> None:
        with suppress(SlideUnreadable):  # the process died on closing; the next request starts another
            reader.release()

    def _has_read(self, work: _Work, count: int) -> None:
        with self._lock:
            work.unread -= count
            last = work.unread == 0
        if last:
            self._evict(work)

    # --- infer -------------------------------------------------------------------------------------------------

    def _infer(self, predictor: Predictor) -> None:
        while (batch := self._get(self._filled)) is not None:
            work, count = batch.work, batch.stop - batch.start
            started = time.monotonic()
            try:
                if work.error is None:
                    tiles = self._arena.tiles(batch.slot, count, self._model.px)
                    readable = work.readable[batch.start : batch.stop]
                    if readable.all():
                        work.values[batch.start : batch.stop] = predictor.run(tiles)
                    elif readable.any():
                        work.values[batch.start : batch.stop][readable] = predictor.run(tiles[readable])
            except Exception as error:
                self._fail(work, error)
            self._free.put(batch.slot)
            with self._lock:
                work.timings["infer"] += time.monotonic() - started
                work.done += count
            self._progress(work)
            self._settle(work, count)

    def _progress(self, work: _Work) -> None:
        now = time.monotonic()
        with self._lock:
            if now - work.progress_at < _PROGRESS_SECONDS:
                return
            work.progress_at = now
        self._log.event(
            "slide-progress",
            slideId=work.slide.slide_id,
            tilesDone=work.done,
            tilesTotal=len(work.readable),
            tilesPerSecond=round(work.done / (now - work.reading_from), 1),
        )

    def _settle(self, work: _Work, count: int) -> None:
        """Some tiles have reached their end, inferred or given up; with the last of them the slide is finished."""
        if count == 0:
            return
        with self._lock:
            work.unsettled -= count
            last = work.unsettled == 0
        if last:
            self._finish(work)

    # --- write -------------------------------------------------------------------------------------------------

    def _finish(self, work: _Work) -> None:
        self._evict(work)
        self._finished.put(work)

    def _write_all(self) -> None:
        while (work := self._get(self._finished)) is not None:
            self._write(work)

    def _write(self, work: _Work) -> None:
        shard, slide, survey = work.shard, work.slide, work.survey
        started = time.monotonic()
        files: dict[str, bytes] = {}
        try:
            if work.error is None and survey is not None:
                if len(work.readable) and not work.readable.any():
                    raise SlideUnreadable(
                        f"None of its {len(work.readable)} tiles can be read: scan or copy the file again."
                    )
                tiles = tiles_parquet(shard, slide, self._model, survey, work.readable, work.values)
                files = {
                    "tiles.parquet": tiles,
                    "tissue.geojson": survey.geojson,
                    "thumbnail.jpg": survey.thumbnail,
                }
                write_results(self._store, shard, slide, files, work.requests)
        except Exception as error:
            self._fail(work, error)
            files = {}
        now = time.monotonic()
        work.timings |= {"write": now - started, "total": now - work.started}
        marker = completion(
            shard,
            slide,
            self._job_name,
            self._device,
            error=work.error,
            survey=survey,
            model=self._model,
            readable=work.readable,
            files=files,
            timings=work.timings,
            requests=work.requests,
        )
        try:
            key = result_key(shard, slide, "complete.json")
            body = json.dumps(marker, ensure_ascii=False, indent=2).encode()
            self._store.put(shard.output_bucket, key, body, "application/json", work.requests)
        except SlidewayError as error:
            if work.error is None:
                work.error = error
        self._report(work, marker)

    def _report(self, work: _Work, marker: dict[str, object]) -> None:
        slide_id, error = work.slide.slide_id, work.error
        if error is None:
            self._count("INFERRED")
            seconds = max(time.monotonic() - work.reading_from, 1e-3) if work.reading_from else 0.0
            self._log.event(
                "slide-complete",
                slideId=slide_id,
                tilesDone=len(work.readable),
                tilesTotal=len(work.readable),
                tilesPerSecond=round(len(work.readable) / seconds, 1) if seconds else 0.0,
                tilesUnreadable=int((~work.readable).sum()),
                timings=marker["timings"],
            )
            return
        quarantined = isinstance(error, SlideQuarantined)
        self._count("QUARANTINED" if quarantined else "FAILED")
        self._tally.reasons.append(f"{slide_id}: {error.name}: {error}")
        self._log.event(
            "slide-quarantined" if quarantined else "slide-failed",
            level="warning" if quarantined else "error",
            slideId=slide_id,
            error=error.name,
            message=str(error),
        )

    def _count(self, state: str) -> None:
        with self._lock:
            self._tally.states[state] += 1

    # --- common ------------------------------------------------------------------------------------------------

    def _fail(self, work: _Work, error: Exception) -> None:
        """The first error is the slide's; what follows from it is not told."""
        if not isinstance(error, SlideQuarantined | SlideFailed):
            error = InternalError(f"{type(error).__name__} in {threading.current_thread().name}: {error}"[:500])
        with self._lock:
            if work.error is None:
                work.error = error

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


def _join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        while thread.is_alive():
            thread.join(_POLL)  # in short waits, so that signals are handled


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
