"""What is left in Silver for a slide: tiles.parquet, features.h5 of an embedding, tissue.geojson, thumbnail.jpg,
and complete.json, which is written last and alone says that the slide is done. The marker is `completionSchema` of
core/contracts.ts. Both modes write through here, from arrays and a survey, however they came by them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from slideway_inference.contracts import Shard, ShardSlide
from slideway_inference.errors import SlideQuarantined, SlidewayError
from slideway_inference.features import features_h5
from slideway_inference.log import now
from slideway_inference.parquet import Column, write_parquet
from slideway_inference.store import Requests, Store
from slideway_inference.survey import Survey

if TYPE_CHECKING:
    from slideway_inference.model.head import Head  # the tiler has no model, and no PyTorch
    from slideway_inference.model.spec import ModelSpec

CONTENT_TYPES = {
    "tiles.parquet": "application/vnd.apache.parquet",
    "features.h5": "application/x-hdf5",
    "tissue.geojson": "application/geo+json",
    "thumbnail.jpg": "image/jpeg",
    "complete.json": "application/json",
}


def result_key(shard: Shard, slide: ShardSlide, name: str) -> str:
    return f"{shard.output_prefix}{slide.slide_id}/{shard.model.name}/{name}"


def tile_columns(survey: Survey, readable: npt.NDArray[np.bool_]) -> dict[str, Column]:
    """The columns that tiles.parquet and a tileset's index begin with; `readable` (n,) goes with the positions."""
    count = len(survey.positions)
    geometry = survey.geometry
    return {
        "minx": np.ascontiguousarray(survey.positions[:, 0]),
        "miny": np.ascontiguousarray(survey.positions[:, 1]),
        "width": np.full(count, round(geometry.footprint_x), np.int32),
        "height": np.full(count, round(geometry.footprint_y), np.int32),
        "mpp": np.full(count, geometry.mpp, np.float32),
        "tissue_fraction": survey.fractions,
        "status": ["ok" if ok else "unreadable" for ok in readable],
    }


def slide_facts(survey: Survey) -> dict[str, Any]:
    """`slide` of complete.json and of tileset.json."""
    return {
        "width": survey.width,
        "height": survey.height,
        "mppX": survey.mpp[0],
        "mppY": survey.mpp[1],
        "mppSource": survey.mpp_source,
        "levels": survey.levels,
        "vendor": survey.vendor,
        "reader": survey.reader,
    }


def tissue_facts(survey: Survey) -> dict[str, Any]:
    """`tissue` of the same."""
    return {
        "areaMm2": survey.tissue_mm2,
        "mpp": survey.tissue_mpp,
        "inkFraction": round(survey.ink_fraction, 4),
    }


def tiles_parquet(
    shard: Shard,
    slide: ShardSlide,
    model: ModelSpec,
    survey: Survey,
    readable: npt.NDArray[np.bool_],
    values: npt.NDArray[np.float32],
    attention: npt.NDArray[np.float32] | None = None,
) -> bytes:
    """`readable` (n,), `values` (n, outputs; of unreadable tiles NaN) and a head's `attention` (n,) go with the
    survey's positions."""
    columns = tile_columns(survey, readable)
    for index, column in enumerate(model.columns):
        columns[column] = values[:, index]
    if attention is not None:
        columns["attention"] = attention
    metadata = {
        "slideId": slide.slide_id,
        "slideChecksum": slide.checksum,
        "modelName": shard.model.name,
        "modelVersion": shard.model.version,
        "modelDigest": shard.model.digest,
        "parameters": json.dumps(shard.parameters.document(), sort_keys=True, separators=(",", ":")),
        "codeVersion": shard.code_version,
    }
    return write_parquet(columns, metadata)


def completion(
    shard: Shard,
    slide: ShardSlide,
    job_name: str,
    device: str,
    *,
    mode: Literal["processing", "transform"],
    tileset: Mapping[str, Any] | None = None,
    error: SlidewayError | None,
    survey: Survey | None,
    readable: npt.NDArray[np.bool_] | None,
    files: Mapping[str, Mapping[str, Any]],
    timings: Mapping[str, float],
    bound: Mapping[str, float],
    requests: Requests,
    head: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The marker. `requests` counts what was made until now; the marker's own put is added. `files` and `head` are
    what `write_slide` answered."""
    state = "INFERRED" if error is None else "QUARANTINED" if isinstance(error, SlideQuarantined) else "FAILED"
    marker: dict[str, Any] = {"runId": shard.run_id, "slideId": slide.slide_id, "state": state}
    if error is not None:
        marker |= {"error": error.name, "message": str(error)}
    marker |= {
        "checksum": slide.checksum,
        "model": {"name": shard.model.name, "version": shard.model.version, "digest": shard.model.digest},
        "parameters": shard.parameters.document(),
        "codeVersion": shard.code_version,
        "jobName": job_name,
        "completedAt": now(),
        "mode": mode,
    }
    if tileset is not None:
        marker["tileset"] = dict(tileset)
    if survey is not None:
        marker["slide"] = slide_facts(survey)
    if survey is not None and readable is not None and error is None:
        geometry = survey.geometry
        ok = int(readable.sum())
        marker |= {
            "tile": {
                "px": geometry.px,
                "mpp": geometry.mpp,
                "overlap": geometry.overlap,
                "footprintX": geometry.footprint_x,
                "footprintY": geometry.footprint_y,
                "level": geometry.level,
            },
            "tiles": {"grid": survey.grid, "kept": len(readable), "ok": ok, "unreadable": len(readable) - ok},
            "tissue": tissue_facts(survey),
        }
        if head is not None:
            marker["head"] = dict(head)
    marker |= {
        "outputs": {name: dict(told) for name, told in sorted(files.items())},
        "timings": {name: round(seconds, 3) for name, seconds in timings.items()},
        "bound": dict(bound),
        "requests": {"get": requests.get, "put": requests.put + 1},
        "device": device,
    }
    return marker


def is_done(previous: bytes, shard: Shard, slide: ShardSlide) -> str | None:
    """The state of an earlier attempt that still holds: same slide, model, parameters and code, and nothing that
    trying again would change. None when the slide is to be worked on."""
    try:
        marker = json.loads(previous)
        same = (
            marker["checksum"] == slide.checksum
            and marker["model"]["digest"] == shard.model.digest
            and marker["parameters"] == shard.parameters.document()
            and marker["codeVersion"] == shard.code_version
        )
        state = str(marker["state"])
    except (ValueError, KeyError, TypeError):
        return None
    return state if same and state in ("INFERRED", "QUARANTINED") else None


@dataclass(frozen=True)
class Written:
    """What complete.json says of a slide's files in Silver, by name, and of its head, where it answered."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    head: dict[str, Any] | None = None


def write_slide(
    store: Store,
    shard: Shard,
    slide: ShardSlide,
    model: ModelSpec,
    head: Head | None,
    survey: Survey,
    readable: npt.NDArray[np.bool_],
    values: npt.NDArray[np.float32],
    requests: Requests,
) -> Written:
    """Leaves in Silver what the model made of a slide's tiles, all but the marker. `head` is the package's, loaded.
    The arrays go with the survey's positions; `values` of unreadable tiles are not looked at, and become NaN. Of
    what is written one file at a time is in memory. Raises OutputFailed, and ModelError of the head."""
    files, answered = slide_files(shard, slide, model, head, survey, readable, values)
    written = Written(head=answered)
    for name, make in sorted(files.items()):
        data = make()
        store.put(shard.output_bucket, result_key(shard, slide, name), data, CONTENT_TYPES[name], requests)
        written.files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        del data  # before the next is made
    return written


def slide_files(
    shard: Shard,
    slide: ShardSlide,
    model: ModelSpec,
    head: Head | None,
    survey: Survey,
    readable: npt.NDArray[np.bool_],
    values: npt.NDArray[np.float32],
) -> tuple[dict[str, Callable[[], bytes]], dict[str, Any] | None]:
    """What `write_slide` writes: what makes each file, by name, and what complete.json says of the head. Raises
    ModelError."""
    values[~readable] = np.nan
    answer = attention = None
    if head is not None and readable.any():
        answer = head.run(values if readable.all() else values[readable])
    if head is not None and head.spec.attention:
        attention = np.full(len(readable), np.nan, np.float32)
        if answer is not None:
            attention[readable] = answer.attention
    files: dict[str, Callable[[], bytes]] = {
        "tiles.parquet": lambda: tiles_parquet(shard, slide, model, survey, readable, values, attention),
        "tissue.geojson": lambda: survey.geojson,
        "thumbnail.jpg": lambda: survey.thumbnail,
    }
    if model.task == "embedding":
        folder = result_key(shard, slide, "")
        files["features.h5"] = lambda: features_h5(slide.slide_id, model.name, survey, readable, values, folder)
    if head is None or answer is None:
        return files, None
    return files, {"task": head.spec.task, "outputs": answer.outputs, "tiles": int(np.count_nonzero(readable))}


def write_marker(
    store: Store, shard: Shard, slide: ShardSlide, marker: Mapping[str, Any], requests: Requests
) -> None:
    """Raises OutputFailed."""
    body = json.dumps(marker, ensure_ascii=False, indent=2).encode()
    key = result_key(shard, slide, "complete.json")
    store.put(shard.output_bucket, key, body, CONTENT_TYPES["complete.json"], requests)
