"""`join`: puts the predictions that Transform jobs left for packs together by slide, and leaves the slide's results
as `process` does. Every line is checked against the index: nothing is matched by luck."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from slideway_inference.contracts import Place, Shard, ShardSlide
from slideway_inference.errors import (
    ModelError,
    PackFailed,
    ShardInvalid,
    SlidewayError,
    Stopped,
    TilesetMissing,
    by_name,
)
from slideway_inference.features import import_h5py
from slideway_inference.job import Job
from slideway_inference.memory import Room, memory_limit
from slideway_inference.model.package import open_package
from slideway_inference.model.spec import ModelSpec
from slideway_inference.parquet import Column
from slideway_inference.pipeline import PROGRESS_SECONDS, SlideWork, check_readable, shares, tell_end, tell_progress
from slideway_inference.remote import Watch
from slideway_inference.results import Written, completion, is_done, result_key, write_marker, write_slide
from slideway_inference.store import Store
from slideway_inference.tileset import (
    PackRef,
    Tiled,
    Tileset,
    parse_tiled,
    parse_tileset,
    read_index,
    rows_by_pack,
    tile_names,
    tiled_key,
)

if TYPE_CHECKING:
    from slideway_inference.model.head import Head  # it imports PyTorch, which only slides with a head need

_SLIDES = 2
"""Slides at once, as far as memory goes: one is written while another comes."""
_MEMORY_SHARE = 0.6
_COPIES = 2.5
"""Of a slide's numbers in memory: themselves, the file that is being written, and what is on its way there."""
_STREAMS = 8
_CHUNK = 1 << 20
_POLL = 0.2
_OUTPUT = ".out"
_TEXT = 200
"""Most characters of a message that came from elsewhere."""

T = TypeVar("T")


def join(job: Job) -> None:
    """Raises ShardInvalid, what opening the model package raises, and Stopped."""
    package = open_package(job.package, job.shards[0].model, job.scratch / "model")
    if package.spec.task == "embedding":
        import_h5py()
    if any(shard.tiled is None or shard.transformed is None for shard in job.shards):
        raise ShardInvalid("The shards lack tiled or transformed: they are not of transform mode.")
    slides = [(shard, slide) for shard in job.shards for slide in shard.slides]
    with ThreadPoolExecutor(_STREAMS, "pack") as packs, ThreadPoolExecutor(_SLIDES, "slide") as pool:
        joiner = _Joiner(job, Store(), package.spec, package.head(), packs)
        running = [pool.submit(joiner.slide, *pair) for pair in slides]
        try:
            for future in running:
                joiner.wait(future)
        except BaseException:
            job.stop.set()  # what is under way ends soon
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Joiner:
    def __init__(
        self, job: Job, store: Store, model: ModelSpec, head: Head | None, packs: ThreadPoolExecutor
    ) -> None:
        self._job = job
        self._store = store
        self._model = model
        self._head = head
        self._packs = packs
        self._room = Room(memory_limit(_MEMORY_SHARE))
        self._outputs: dict[Place, dict[str, list[str]]] = {}
        self._listing = threading.Lock()

    def wait(self, future: Future[T]) -> T:
        """Raises Stopped, and what the future raises."""
        while not future.done():
            self._check_stop()
            wait([future], _POLL)
        return future.result()

    def _check_stop(self) -> None:
        if self._job.stop.is_set():
            raise Stopped("The job was told to stop.")

    def slide(self, shard: Shard, slide: ShardSlide) -> None:
        """Joins one slide and marks its end. Raises Stopped."""
        self._check_stop()
        started = time.monotonic()
        joined = _Joined(shard, slide, self._job.scratch)
        try:
            ended = self._ended(joined)
            if ended is not None:
                self._job.tally.count("SKIPPED")
                self._job.log.event("slide-skipped", slideId=slide.slide_id, state=ended)
                return
            self._job.log.event("slide-started", slideId=slide.slide_id)
            watch = Watch()
            tileset = self._tileset(joined, watch)
            columns = self._survey(joined, tileset, watch)
            numbers = len(joined.readable) * len(self._model.outputs) * np.dtype(np.float32).itemsize
            with self._room.held(int(_COPIES * numbers), self._check_stop):
                values = self._fill(joined, tileset, columns, watch)
                self._write(joined, values)
                del values
        except Stopped:
            raise
        except Exception as error:
            joined.fail(error)
        joined.timings["total"] = time.monotonic() - started
        try:
            self._mark(joined)
        except SlidewayError as error:
            joined.fail(error)
        tell_end(self._job.log, self._job.tally, joined, "INFERRED", joined.timings["total"])

    def _ended(self, joined: _Joined) -> str | None:
        """The state of a slide for which nothing is to be done: joined before, or ended by the tiler."""
        shard, slide, requests = joined.shard, joined.slide, joined.requests
        key = result_key(shard, slide, "complete.json")
        previous = self._store.get_if_there(shard.output_bucket, key, requests)
        done = is_done(previous, shard, slide) if previous is not None else None
        if done is not None:
            return done
        assert shard.tiled is not None
        text = self._store.get_if_there(shard.tiled.bucket, tiled_key(shard.tiled, slide), requests)
        if text is None:
            raise TilesetMissing("Nothing tells what tiling made of it: the tiling job did not come to it.")
        joined.tiled = tiled = parse_tiled(text)
        if tiled.state == "TILED":
            return None
        error = by_name(tiled.error or "", tiled.message or "")
        if previous is not None and _state_of(previous) == (tiled.state, error.name):
            return tiled.state
        raise error

    def _write(self, joined: _Joined, values: npt.NDArray[np.float32]) -> None:
        check_readable(joined.readable)
        began = time.monotonic()
        joined.written = write_slide(
            self._store,
            joined.shard,
            joined.slide,
            self._model,
            self._head,
            joined.surveyed,
            joined.readable,
            values,
            joined.requests,
        )
        joined.timings["write"] = time.monotonic() - began

    def _survey(self, joined: _Joined, tileset: Tileset, watch: Watch) -> dict[str, Column]:
        """Gets all of the tileset but its packs; the index's columns."""
        columns = read_index(self._part(joined, tileset, "index.parquet", watch))
        joined.survey = tileset.survey(
            joined.slide,
            columns,
            self._part(joined, tileset, "tissue.geojson", watch),
            self._part(joined, tileset, "thumbnail.jpg", watch),
        )
        joined.readable = np.array([status == "ok" for status in columns["status"]], np.bool_)
        return columns

    def _fill(
        self, joined: _Joined, tileset: Tileset, columns: dict[str, Column], watch: Watch
    ) -> npt.NDArray[np.float32]:
        """Gets the predictions: `values` (n, outputs) that go with `readable`, NaN where there is none."""
        values = np.full((len(joined.readable), len(self._model.outputs)), np.nan, np.float32)
        names = tile_names(joined.surveyed.positions)
        processor = time.thread_time()
        outputs = self._listed(joined)
        running = [
            self._packs.submit(self._pack, joined, values, pack, rows, [names[row] for row in rows], outputs, watch)
            for pack, rows in zip(tileset.packs, rows_by_pack(columns, tileset.packs), strict=True)
        ]
        try:
            for future in running:
                joined.timings["join"] += self.wait(future)
        finally:
            for future in running:
                future.cancel()
            joined.timings["join"] += time.thread_time() - processor
            joined.timings["fetch"] = watch.seconds
        return values

    def _tileset(self, joined: _Joined, watch: Watch) -> Tileset:
        assert joined.tiled is not None
        place = joined.tiled.place
        assert place is not None
        with watch:
            text = self._store.get_if_there(place.bucket, f"{place.prefix}tileset.json", joined.requests)
        if text is None:
            raise TilesetMissing("Its tileset is not there any more: run it again.")
        joined.tileset = parse_tileset(text, place.bucket, place.prefix)
        return joined.tileset

    def _part(self, joined: _Joined, tileset: Tileset, name: str, watch: Watch) -> bytes:
        with watch:
            key = f"{tileset.place.prefix}{name}"
            data = self._store.get_if_there(tileset.place.bucket, key, joined.requests)
        if data is None or len(data) != tileset.files.get(name):
            raise TilesetMissing(f"Its tileset's {name} is not there, or not as it was written.")
        return data

    def _listed(self, joined: _Joined) -> dict[str, list[str]]:
        """The keys of all outputs by their pack's base name, the newest first; listed once. Raises
        SlideFetchFailed."""
        place = joined.shard.transformed
        assert place is not None
        with self._listing:
            if place not in self._outputs:
                found: dict[str, list[str]] = {}
                there = self._store.listed(place.bucket, place.prefix, joined.requests)
                for key in sorted(there, key=lambda key: there[key].written, reverse=True):
                    if key.endswith(_OUTPUT):
                        found.setdefault(PurePosixPath(key).name.removesuffix(_OUTPUT), []).append(key)
                self._outputs[place] = found
            return self._outputs[place]

    def _pack(
        self,
        joined: _Joined,
        values: npt.NDArray[np.float32],
        pack: PackRef,
        rows: npt.NDArray[np.intp],
        names: Sequence[str],
        outputs: dict[str, list[str]],
        watch: Watch,
    ) -> float:
        """Takes the predictions for one pack, from the newest output that is one; seconds of the processor. Raises
        PackFailed, ModelError, SlideFetchFailed, Stopped."""
        began = time.thread_time()
        base = PurePosixPath(pack.key).name
        assert joined.shard.transformed is not None
        bucket = joined.shard.transformed.bucket
        failed: PackFailed | None = None
        for key in outputs.get(base, ()):
            self._check_stop()
            reader = _Lines(names, rows, values, joined.readable)
            try:
                with watch:
                    self._store.stream(bucket, key, joined.requests, self._job.stop, reader.take)
            except PackFailed as error:
                failed = failed or PackFailed(f"Pack {base}: {error}")
                continue
            joined.done += len(rows)
            self._progress(joined)
            return time.thread_time() - began
        raise failed or PackFailed(f"Pack {base} has no predictions: no Transform job answered for it.")

    def _progress(self, joined: _Joined) -> None:
        now = time.monotonic()
        if now - joined.progress_at >= PROGRESS_SECONDS:
            joined.progress_at = now
            tell_progress(self._job.log, joined, joined.done, now - joined.started)

    def _mark(self, joined: _Joined) -> None:
        timings = joined.timings
        # The lines are read as they come, so that network and join overlap.
        seconds = {"network": timings["fetch"], "join": timings["join"], "write": timings["write"]}
        joined.bound = shares(seconds)
        self._job.tally.add(seconds)
        if joined.tiled is not None:
            joined.requests.count(**joined.tiled.requests)  # the slide's tiling was for this run too
        written = joined.written if joined.error is None else Written()
        marker = completion(
            joined.shard,
            joined.slide,
            self._job.name,
            "cpu",
            mode="transform",
            tileset=joined.told_tileset(),
            error=joined.error,
            survey=joined.survey,
            readable=joined.readable,
            files=written.files,
            head=written.head,
            timings=timings,
            bound=joined.bound,
            requests=joined.requests,
        )
        write_marker(self._store, joined.shard, joined.slide, marker, joined.requests)


@dataclass
class _Joined(SlideWork):
    """A slide that is joined."""

    timings: dict[str, float] = field(default_factory=lambda: {"fetch": 0.0, "join": 0.0, "write": 0.0})
    tiled: Tiled | None = None
    tileset: Tileset | None = None
    written: Written = field(default_factory=Written)
    started: float = field(default_factory=time.monotonic)
    progress_at: float = field(default_factory=time.monotonic)
    done: int = 0

    def told_tileset(self) -> dict[str, Any] | None:
        """As the marker has it."""
        if self.tileset is None or self.tiled is None:
            return None
        parameters = self.tileset.document["parameters"]
        told = {"id": self.tileset.id, "reused": self.tiled.reused, "format": parameters["format"]}
        return told if parameters["quality"] is None else {**told, "quality": parameters["quality"]}


class _Lines:
    """Reads the lines of one pack's predictions into its slide's arrays."""

    def __init__(
        self,
        names: Sequence[str],
        rows: npt.NDArray[np.intp],
        values: npt.NDArray[np.float32],
        readable: npt.NDArray[np.bool_],
    ) -> None:
        """`names` (n,) are the pack's tiles in their order, `rows` (n,) which of the slide's they are; `values`
        (m, outputs) and `readable` (m,) are the slide's."""
        self._names = names
        self._rows = rows
        self._values = values
        self._readable = readable

    def take(self, body: Any) -> None:  # noqa: ANN401
        """Raises PackFailed where the lines are not those of the pack, ModelError where the model failed."""
        count = 0
        for line in body.iter_lines(_CHUNK):
            if not line.strip():
                continue
            if count == len(self._names):
                raise PackFailed(f"it has predictions for more than its {count} tiles.")
            self._line(line, count)
            count += 1
        if count != len(self._names):
            raise PackFailed(f"it has predictions for {count} of its {len(self._names)} tiles.")

    def _line(self, line: bytes, place: int) -> None:
        name, row = self._names[place], int(self._rows[place])
        try:
            answer = json.loads(line)
            tile, values, error = answer["tile"], answer.get("values"), answer.get("error")
        except (ValueError, KeyError, TypeError, AttributeError) as reason:
            raise PackFailed(f"line {place + 1} is no prediction.") from reason
        if tile != name:
            raise PackFailed(f"line {place + 1} is for tile {str(tile)[:_TEXT]} where {name} was asked for.")
        if error is not None:
            self._readable[row] = False
            if not isinstance(error, dict) or error.get("error") != "TileUnreadable":
                message = error.get("message") if isinstance(error, dict) else error
                raise ModelError(f"Tile {name}: {str(message)[:_TEXT]}")
            return
        outputs = self._values.shape[1]
        if not isinstance(values, list) or len(values) != outputs:
            found = len(values) if isinstance(values, list) else "no"
            raise ModelError(f"The model answered with {found} numbers for tile {name}, not {outputs}.")
        try:
            with np.errstate(over="ignore"):  # what is too large becomes infinite, and is told below
                numbers = np.array(values, np.float64).astype(np.float32)
        except (ValueError, TypeError, OverflowError) as reason:
            raise ModelError(f"The model answered with something else than numbers for tile {name}.") from reason
        if not np.isfinite(numbers).all():
            raise ModelError("The model answered with numbers that are not finite.")
        self._values[row] = numbers


def _state_of(marker: bytes) -> tuple[str, str] | None:
    try:
        document = json.loads(marker)
        return document["state"], document["error"]
    except (ValueError, KeyError, TypeError):
        return None
