"""What is left in Silver for a slide: tiles.parquet, tissue.geojson, thumbnail.jpg, and complete.json, which is
written last and alone says that the slide is done. The marker is `completionSchema` of core/contracts.ts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from slideway_inference.contracts import Shard, ShardSlide
from slideway_inference.errors import SlideQuarantined, SlidewayError
from slideway_inference.log import now
from slideway_inference.model import ModelSpec
from slideway_inference.parquet import Column, write_parquet
from slideway_inference.store import Requests, Store
from slideway_inference.survey import Survey

CONTENT_TYPES = {
    "tiles.parquet": "application/vnd.apache.parquet",
    "tissue.geojson": "application/geo+json",
    "thumbnail.jpg": "image/jpeg",
    "complete.json": "application/json",
}


def result_key(shard: Shard, slide: ShardSlide, name: str) -> str:
    return f"{shard.output_prefix}{slide.slide_id}/{shard.model.name}/{name}"


def tiles_parquet(
    shard: Shard,
    slide: ShardSlide,
    model: ModelSpec,
    survey: Survey,
    readable: npt.NDArray[np.bool_],
    values: npt.NDArray[np.float32],
) -> bytes:
    """`readable` (n,) and `values` (n, outputs) go with the survey's positions; unreadable tiles become NaN."""
    count = len(survey.positions)
    geometry = survey.geometry
    columns: dict[str, Column] = {
        "minx": np.ascontiguousarray(survey.positions[:, 0]),
        "miny": np.ascontiguousarray(survey.positions[:, 1]),
        "width": np.full(count, round(geometry.footprint_x), np.int32),
        "height": np.full(count, round(geometry.footprint_y), np.int32),
        "mpp": np.full(count, geometry.mpp, np.float32),
        "tissue_fraction": survey.fractions,
        "status": ["ok" if ok else "unreadable" for ok in readable],
    }
    for index, column in enumerate(model.columns):
        columns[column] = np.where(readable, values[:, index], np.float32(np.nan))
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
    error: SlidewayError | None,
    survey: Survey | None,
    model: ModelSpec,
    readable: npt.NDArray[np.bool_] | None,
    files: Mapping[str, bytes],
    timings: Mapping[str, float],
    bound: Mapping[str, float],
    requests: Requests,
) -> dict[str, Any]:
    """The marker. `requests` counts what was made until now; the marker's own put is added."""
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
    }
    if survey is not None:
        marker["slide"] = {
            "width": survey.width,
            "height": survey.height,
            "mppX": survey.mpp[0],
            "mppY": survey.mpp[1],
            "mppSource": survey.mpp_source,
            "levels": survey.levels,
            "vendor": survey.vendor,
            "reader": survey.reader,
        }
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
            "tissue": {"areaMm2": survey.tissue_mm2, "mpp": survey.tissue_mpp},
        }
    marker |= {
        "outputs": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for name, data in sorted(files.items())
        },
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


def write_results(
    store: Store, shard: Shard, slide: ShardSlide, files: Mapping[str, bytes], requests: Requests
) -> None:
    """Raises OutputFailed."""
    for name, data in sorted(files.items()):
        store.put(shard.output_bucket, result_key(shard, slide, name), data, CONTENT_TYPES[name], requests)
