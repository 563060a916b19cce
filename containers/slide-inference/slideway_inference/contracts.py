"""The documents that come in: shards, written by the planner. They mirror `Shard` of core/contracts.ts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from slideway_inference.errors import ShardInvalid

MppSource = Literal["manifest", "catalogue", "file"]
TileFormat = Literal["jpeg", "png", "raw"]

MODEL_SECONDS = 120
"""What a batch may take where neither package nor environment says it; as the stages' `inference.modelSeconds`."""


@dataclass(frozen=True)
class ModelRef:
    """The model package that the run pinned. `digest` is `sha256:<hex>` of model.tar.gz."""

    name: str
    version: str
    digest: str


@dataclass(frozen=True)
class Parameters:
    tissue_min_fraction: float
    mpp_tolerance: float

    def document(self) -> dict[str, float]:
        return {"mppTolerance": self.mpp_tolerance, "tissueMinFraction": self.tissue_min_fraction}


@dataclass(frozen=True)
class BronzeFile:
    key: str
    size: int
    version_id: str | None


@dataclass(frozen=True)
class ShardSlide:
    """A slide in Bronze: `key` is the one of `files` that is opened."""

    slide_id: str
    bucket: str
    key: str
    files: tuple[BronzeFile, ...]
    size: int
    checksum: str
    mpp: float | None
    mpp_source: MppSource | None


@dataclass(frozen=True)
class TileSize:
    """A model's tile: pixels a side, µm per pixel, and pixels that neighbours share."""

    px: int
    mpp: float
    overlap: int


@dataclass(frozen=True)
class Place:
    bucket: str
    prefix: str


@dataclass(frozen=True)
class Tiling:
    """Where tilesets go and how tiles are stored there. `quality` is None where the format has none."""

    place: Place
    format: TileFormat
    quality: int | None
    pack_bytes: int
    objects: bool
    keep_days: int


@dataclass(frozen=True)
class Shard:
    """`tiling`, `tiled` and `transformed` are there in transform mode: how to tile, where what became of each slide
    is told, and where the Transform jobs' outputs lie."""

    run_id: str
    shard: int
    model: ModelRef
    parameters: Parameters
    code_version: str
    output_bucket: str
    output_prefix: str
    slides: tuple[ShardSlide, ...]
    tile: TileSize | None = None
    tiling: Tiling | None = None
    tiled: Place | None = None
    transformed: Place | None = None


def parse_shard(text: str | bytes, name: str) -> Shard:
    """Raises ShardInvalid, naming the document and what is wrong in it."""
    try:
        document = json.loads(text)
        return Shard(
            run_id=_string(document["runId"]),
            shard=int(document["shard"]),
            model=ModelRef(*(_string(document["model"][field]) for field in ("name", "version", "digest"))),
            parameters=Parameters(
                tissue_min_fraction=float(document["parameters"]["tissueMinFraction"]),
                mpp_tolerance=float(document["parameters"]["mppTolerance"]),
            ),
            code_version=_string(document["codeVersion"]),
            output_bucket=_string(document["output"]["bucket"]),
            output_prefix=_string(document["output"]["prefix"]),
            slides=tuple(_slide(slide) for slide in document["slides"]),
            tile=_tile(document["tile"]) if "tile" in document else None,
            tiling=_tiling(document["tiling"]) if "tiling" in document else None,
            tiled=_place(document["tiled"]) if "tiled" in document else None,
            transformed=_place(document["transformed"]) if "transformed" in document else None,
        )
    except KeyError as error:
        raise ShardInvalid(f"{name} lacks {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise ShardInvalid(f"{name}: {error}") from error


def _slide(document: dict[str, Any]) -> ShardSlide:
    bronze = document["bronze"]
    mpp = document.get("mpp")
    slide = ShardSlide(
        slide_id=_string(document["slideId"]),
        bucket=_string(bronze["bucket"]),
        key=_string(bronze["key"]),
        files=tuple(
            BronzeFile(_string(file["key"]), int(file["size"]), file.get("versionId")) for file in bronze["files"]
        ),
        size=int(bronze["size"]),
        checksum=_string(bronze["checksum"]),
        mpp=None if mpp is None else float(mpp),
        mpp_source=document.get("mppSource", "manifest") if mpp is not None else None,
    )
    if slide.key not in {file.key for file in slide.files}:
        raise ValueError(f"slide {slide.slide_id}: bronze.key is not one of bronze.files")
    return slide


def _tile(document: dict[str, Any]) -> TileSize:
    tile = TileSize(int(document["px"]), float(document["mpp"]), int(document.get("overlap", 0)))
    if tile.px < 1 or not tile.mpp > 0 or not 0 <= tile.overlap < tile.px:
        raise ValueError("tile is none")
    return tile


def _place(document: dict[str, Any]) -> Place:
    return Place(_string(document["bucket"]), _string(document["prefix"]))


def _tiling(document: dict[str, Any]) -> Tiling:
    tile_format = document["format"]
    if tile_format not in ("jpeg", "png", "raw"):
        raise ValueError(f"tiling.format is {json.dumps(tile_format)[:80]}")
    return Tiling(
        place=_place(document),
        format=tile_format,
        quality=int(document["quality"]) if tile_format == "jpeg" else None,
        pack_bytes=int(document["packBytes"]),
        objects=bool(document.get("objects", False)),
        keep_days=int(document["keepDays"]),
    )


def _string(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a string, found {json.dumps(value)[:80]}")
    return value
