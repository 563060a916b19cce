"""`tile`: what it does with a slide's tiles. They are encoded, or passed through where the slide's own JPEG tile is
the wanted one, put into packs that are uploaded while the slide is read, and described by an index. Tilesets that
are there already are used again."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from slideway_inference.claims import Claimed, Claims
from slideway_inference.contracts import Place, Shard, ShardSlide, Tiling
from slideway_inference.encode import CONTENT_TYPES as TILE_TYPES
from slideway_inference.encode import encode
from slideway_inference.errors import ShardInvalid, SlideQuarantined, TilesetMissing, by_name
from slideway_inference.fast import Form
from slideway_inference.job import Job, work_slides
from slideway_inference.packs import Packer
from slideway_inference.pipeline import (
    Answers,
    Later,
    Lengths,
    SlideWork,
    Task,
    Tiles,
    processors,
    readers_for,
    rounded,
)
from slideway_inference.results import completion, is_done, result_key, write_marker
from slideway_inference.store import Requests, Store
from slideway_inference.tileset import (
    CONTENT_TYPES,
    Tileset,
    index_parquet,
    made_for,
    member_names,
    pack_key,
    parameters_of,
    parse_tileset,
    shard_tiling,
    slide_document,
    tiled_document,
    tiled_key,
    tileset_id,
)
from slideway_inference.uploads import SlideUploads, Uploads

_BATCH = 64
_CLAIM_SECONDS = 180.0
_LOOKS = 20
"""How often a slide that another job tiles is looked at within the time after which a claim is stale."""
_TELL_SECONDS = 60.0


def tile(job: Job) -> None:
    """Tiles the job's slides. Raises ShardInvalid, Stopped."""
    store = Store()
    uploads = Uploads(store, job.stop)
    cores = processors()
    tiler = Tiler(store, uploads, job, cores)
    try:
        work_slides(job, store, tiler, readers_for(cores))
    finally:
        uploads.close()
        tiler.close()


class Tiler(Task):
    batch = _BATCH
    state = "TILED"
    timing = "encode"
    part = "encode"
    decoder = ""
    worker_seconds = math.inf

    def __init__(self, store: Store, uploads: Uploads, job: Job, workers: int) -> None:
        try:
            tile, tiling, _ = shard_tiling(job.shards[0])
            same = all(shard_tiling(shard)[:2] == (tile, tiling) for shard in job.shards)
        except KeyError as error:
            raise ShardInvalid(f"The shards lack {error.args[0]}: they are not of transform mode.") from error
        if not same:
            raise ShardInvalid("The shards of one job ask for different tiles.")
        self.tile = tile
        self.form: Form = "stored" if tiling.format == "jpeg" else "pixels"
        self.workers = [_Encoder(tiling) for _ in range(workers)]
        self._store = store
        self._uploads = uploads
        self._job = job
        self._tiling = tiling
        self._claim_seconds = float(os.environ.get("SLIDEWAY_CLAIM_SECONDS") or _CLAIM_SECONDS)
        self._claims = Claims(store, tiling.place.bucket, job.name, self._claim_seconds)
        self._waits: dict[str, _Wait] = {}

    def close(self) -> None:
        """Leaves the slides that it has not tiled to others."""
        self._claims.close()

    def earlier(self, shard: Shard, slide: ShardSlide, requests: Requests) -> str | None:
        """A quarantine holds for every attempt of the run, a tileset for every run. A slide that another job tiles
        comes again later."""
        key = result_key(shard, slide, "complete.json")
        previous = self._store.get_if_there(shard.output_bucket, key, requests)
        if previous is not None and is_done(previous, shard, slide) == "QUARANTINED":
            told = json.loads(previous)
            error = by_name(told["error"], told["message"])
            self._tell(
                shard, slide, tiled_document(slide, None, reused=False, error=error, state="QUARANTINED"), requests
            )
            return "QUARANTINED"
        tileset = self._usable(shard, slide, requests) or self._claim(shard, slide, requests)
        if tileset is None:
            return None
        reused = tileset.made_for != made_for(shard)
        self._tell(shard, slide, tiled_document(slide, tileset, reused=reused, error=None, state="TILED"), requests)
        return "TILED"

    def _claim(self, shard: Shard, slide: ShardSlide, requests: Requests) -> Tileset | None:
        """Claims the slide's tileset for this job. Where who claimed it before has made it, that. Raises Later."""
        key = f"{self._place(shard, slide).prefix}claim.json"
        try:
            before = self._claims.take(key, slide.slide_id, requests)
        except Claimed as claimed:
            wait = self._waits.setdefault(slide.slide_id, _Wait())
            seconds = time.monotonic() - wait.since
            if seconds >= wait.told:
                wait.told = seconds + _TELL_SECONDS
                self._job.log.event(
                    "slide-waits", slideId=slide.slide_id, holder=claimed.holder, seconds=round(seconds, 1)
                )
            raise Later(self._claim_seconds / _LOOKS) from None
        tileset = self._usable(shard, slide, requests) if before else None
        if tileset is not None:
            self._claims.free(slide.slide_id)
        return tileset

    def _usable(self, shard: Shard, slide: ShardSlide, requests: Requests) -> Tileset | None:
        place = self._place(shard, slide)
        text = self._store.get_if_there(place.bucket, f"{place.prefix}tileset.json", requests)
        if text is None:
            return None
        try:
            tileset = parse_tileset(text, place.bucket, place.prefix)
        except TilesetMissing:
            return None
        if not tileset.young(self._tiling.keep_days):
            return None
        there = self._store.listed(place.bucket, place.prefix, requests, below=self._tiling.objects)
        return tileset if tileset.whole(there) else None

    def _place(self, shard: Shard, slide: ShardSlide) -> Place:
        return Place(self._tiling.place.bucket, f"{self._tiling.place.prefix}{tileset_id(shard, slide)}/")

    def _tell(self, shard: Shard, slide: ShardSlide, document: dict[str, Any], requests: Requests) -> None:
        _, _, tiled = shard_tiling(shard)
        document["requests"] = {"get": requests.get, "put": requests.put + 1}
        body = json.dumps(document, ensure_ascii=False, indent=2).encode()
        self._store.put(tiled.bucket, tiled_key(tiled, slide), body, "application/json", requests)

    def begin(self, work: SlideWork) -> _Packing:
        place = self._place(work.shard, work.slide)
        uploads = SlideUploads(self._uploads, place.bucket, work.requests)
        identifier = tileset_id(work.shard, work.slide)
        return _Packing(identifier, place, self._tiling, work.surveyed.positions, uploads, self._job.scratch)

    def write(self, work: SlideWork) -> None:
        packing = cast(_Packing, work.target)
        work.timings["write"] += packing.uploads.watch.seconds  # until now; waiting from here on is counted anyway
        packing.packer.finish(work.readable)
        survey = work.surveyed
        metadata = {"slideChecksum": work.slide.checksum, "tilesetId": packing.identifier}
        files = {
            "index.parquet": index_parquet(survey, work.readable, packing.packer, metadata),
            "tissue.geojson": survey.geojson,
            "thumbnail.jpg": survey.thumbnail,
        }
        for name, data in files.items():
            packing.uploads.put(f"{packing.place.prefix}{name}", data, CONTENT_TYPES[name])
            packing.files[name] = len(data)
        packing.uploads.wait()

    def complete(self, work: SlideWork) -> None:
        try:
            self._complete(work)
        finally:
            self._claims.free(work.slide.slide_id)

    def _complete(self, work: SlideWork) -> None:
        if work.error is not None:
            self._give_up(work)
            return
        packing = cast(_Packing, work.target)
        document = self._document(work, packing)
        place = packing.place
        body = json.dumps(document, ensure_ascii=False, indent=2).encode()
        key = f"{place.prefix}tileset.json"
        self._store.put(place.bucket, key, body, CONTENT_TYPES["tileset.json"], work.requests)
        tileset = parse_tileset(body, place.bucket, place.prefix)
        told = tiled_document(work.slide, tileset, reused=False, error=None, state="TILED")
        self._tell(
            work.shard, work.slide, told | {"timings": rounded(work.timings), "bound": work.bound}, work.requests
        )

    def _document(self, work: SlideWork, packing: _Packing) -> dict[str, Any]:
        ok = int(work.readable.sum())
        objects = {"count": ok, "bytes": int(packing.packer.length.sum())}
        written = packing.uploads.written
        keys = [pack_key(packing.place, packing.identifier, n) for n in range(len(packing.packer.packs))]
        return {
            "tilesetId": packing.identifier,
            "slideChecksum": work.slide.checksum,
            "parameters": parameters_of(work.shard, work.slide),
            **slide_document(work.surveyed),
            "tiles": {
                "grid": work.surveyed.grid,
                "kept": len(work.readable),
                "ok": ok,
                "unreadable": len(work.readable) - ok,
                "passedThrough": packing.passed_through,
            },
            "packs": [
                {"key": key, "bytes": pack.bytes, "tiles": pack.tiles, **written[key]}
                for key, pack in zip(keys, packing.packer.packs, strict=True)
            ],
            "files": {
                name: {"bytes": size, **written[f"{packing.place.prefix}{name}"]}
                for name, size in packing.files.items()
            },
            **({"objects": objects} if self._tiling.objects else {}),
            "createdAt": packing.begun.isoformat(timespec="milliseconds"),
            "madeFor": made_for(work.shard),
            "jobName": self._job.name,
            "codeVersion": work.shard.code_version,
            "timings": rounded(work.timings),
            "bound": work.bound,
        }

    def _give_up(self, work: SlideWork) -> None:
        """The slide ends here: its marker is what the run goes by, as in processing mode."""
        marker = completion(
            work.shard,
            work.slide,
            self._job.name,
            "cpu",
            mode="transform",
            error=work.error,
            survey=work.survey,
            readable=work.readable,
            files={},
            timings=work.timings,
            bound=work.bound,
            requests=work.requests,
        )
        write_marker(self._store, work.shard, work.slide, marker, work.requests)
        state = "QUARANTINED" if isinstance(work.error, SlideQuarantined) else "FAILED"
        told = tiled_document(work.slide, None, reused=False, error=work.error, state=state)
        self._tell(work.shard, work.slide, told, work.requests)


@dataclass
class _Wait:
    """For another job's tiling: since when, and from which second on it is told again."""

    since: float = field(default_factory=time.monotonic)
    told: float = 0.0


class _Encoder:
    """What a processor does with a batch."""

    on_gpu = False
    in_flight = 1
    decoding = 0.0

    def __init__(self, tiling: Tiling) -> None:
        self._format = tiling.format
        self._quality = tiling.quality

    def submit(self, tiles: Tiles, stored: Lengths) -> Callable[[], Answers]:
        made = [
            _AsStored(tile.reshape(-1)[:size]) if size else encode(tile, self._format, self._quality)
            for tile, size in zip(tiles, stored.tolist(), strict=True)
        ]
        return lambda: made


class _AsStored(bytes):
    """A tile with the bytes that the slide itself has for it."""


class _Packing:
    """A slide's tiles on their way into packs and up."""

    def __init__(
        self,
        identifier: str,
        place: Place,
        tiling: Tiling,
        positions: npt.NDArray[np.int32],
        uploads: SlideUploads,
        scratch: Path,
    ) -> None:
        self.identifier = identifier
        self.place = place
        self.uploads = uploads
        self.begun = datetime.now(UTC)
        self.passed_through = 0
        self.files: dict[str, int] = {}
        self._names = member_names(positions, tiling)
        self._objects = TILE_TYPES[tiling.format] if tiling.objects else None
        self._lock = threading.Lock()
        self.packer = Packer(self._names, tiling.pack_bytes, scratch, self._upload)

    def put(self, indices: npt.NDArray[np.intp], answers: Answers) -> None:
        for index, data in zip(indices.tolist(), cast(list[bytes], answers), strict=True):
            self.packer.put(index, data)
            if self._objects:
                key = f"{self.place.prefix}objects/{self._names[index]}"
                self.uploads.put(key, data, self._objects, digest=False)
        with self._lock:
            self.passed_through += sum(isinstance(data, _AsStored) for data in cast(list[bytes], answers))

    def _upload(self, number: int, body: bytes) -> None:
        self.uploads.put(pack_key(self.place, self.identifier, number), body, "application/x-tar")

    def close(self) -> None:
        self.packer.close()
