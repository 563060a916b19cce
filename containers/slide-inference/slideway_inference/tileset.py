"""A tileset: a slide's kept tiles, encoded, in Silver. It belongs to the slide's checksum and the parameters that
make tiles, not to a run or a model, so that the same slide is tiled once. `tileset.json` is written last, says
everything about it, and alone says that it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from slideway_inference.contracts import Place, Shard, ShardSlide, TileSize, Tiling
from slideway_inference.encode import SUFFIXES
from slideway_inference.errors import SlidewayError, TilesetMissing
from slideway_inference.grid import TileGeometry
from slideway_inference.packs import Packer
from slideway_inference.parquet import Column, read_plain, write_plain
from slideway_inference.results import slide_facts, tile_columns, tissue_facts
from slideway_inference.store import Listed
from slideway_inference.survey import Survey

TILER = 2
"""What a tileset is made by and looks like. Raise it with every change to which tiles there are, what is in them,
or how they are written: tilesets made before are then not used again."""
CONTENT_TYPES = {
    "index.parquet": "application/vnd.apache.parquet",
    "tissue.geojson": "application/geo+json",
    "thumbnail.jpg": "image/jpeg",
    "tileset.json": "application/json",
}
_EXPIRY_MARGIN = timedelta(days=2)
"""A tileset that expires sooner than this is not used again: it must last to the end of the run."""


def shard_tiling(shard: Shard) -> tuple[TileSize, Tiling, Place]:
    """Raises KeyError for a shard that is not one of transform mode."""
    if shard.tile is None or shard.tiling is None or shard.tiled is None:
        raise KeyError("tile, tiling or tiled")
    return shard.tile, shard.tiling, shard.tiled


def parameters_of(shard: Shard, slide: ShardSlide) -> dict[str, Any]:
    """All that decides what a slide's tileset is, but for the slide."""
    tile, tiling, _ = shard_tiling(shard)
    return {
        "slideMpp": slide.mpp,
        "px": tile.px,
        "mpp": tile.mpp,
        "overlap": tile.overlap,
        **shard.parameters.document(),
        "format": tiling.format,
        "quality": tiling.quality,
        "packBytes": tiling.pack_bytes,
        "objects": tiling.objects,
        "tiler": TILER,
    }


def tileset_id(shard: Shard, slide: ShardSlide) -> str:
    document = {"slideChecksum": slide.checksum, **parameters_of(shard, slide)}
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class PackRef:
    key: str
    bytes: int
    tiles: int

    def document(self) -> dict[str, Any]:
        return {"key": self.key, "bytes": self.bytes, "tiles": self.tiles}


@dataclass(frozen=True)
class Tileset:
    """What tileset.json says, as far as others need it. `files` are the bytes of what lies beside it, `objects` how
    many single tiles there are and their bytes together; None where they were not asked for."""

    id: str
    place: Place
    packs: tuple[PackRef, ...]
    files: dict[str, int]
    objects: tuple[int, int] | None
    tiles: dict[str, int]
    created_at: datetime
    made_for: str
    document: Mapping[str, Any]

    def whole(self, there: Mapping[str, Listed]) -> bool:
        """Whether `there`, what is listed by key, has everything as it was written. The ETag tells of an object
        that was written over, also with as many bytes."""
        beside = {f"{self.place.prefix}{name}": told for name, told in self.document["files"].items()}
        for key, told in ({pack["key"]: pack for pack in self.document["packs"]} | beside).items():
            found = there.get(key)
            if found is None or (found.bytes, found.etag) != (told["bytes"], told.get("etag", found.etag)):
                return False
        if self.objects is None:
            return True
        objects = [found.bytes for key, found in there.items() if key.startswith(f"{self.place.prefix}objects/")]
        return (len(objects), sum(objects)) == self.objects

    def young(self, keep_days: int) -> bool:
        """Whether it lasts long enough to be used again."""
        return datetime.now(UTC) - self.created_at < timedelta(days=keep_days) - _EXPIRY_MARGIN

    def survey(self, slide: ShardSlide, columns: Mapping[str, Column], geojson: bytes, thumbnail: bytes) -> Survey:
        """The survey that it was made from. Raises TilesetMissing."""
        try:
            return _survey(self.document, slide, columns, geojson, thumbnail)
        except (KeyError, TypeError, ValueError) as error:
            raise TilesetMissing(f"tileset.json or index.parquet is not what the tiler writes: {error}.") from error


def made_for(shard: Shard) -> str:
    """The job of a run that a tileset was made in, whichever attempt."""
    return f"{shard.run_id}/{shard.model.name}"


def parse_tileset(text: bytes, bucket: str, prefix: str) -> Tileset:
    """Raises TilesetMissing."""
    try:
        document = json.loads(text)
        return Tileset(
            id=str(document["tilesetId"]),
            place=Place(bucket, prefix),
            packs=tuple(
                PackRef(str(pack["key"]), int(pack["bytes"]), int(pack["tiles"])) for pack in document["packs"]
            ),
            files={str(name): int(file["bytes"]) for name, file in document["files"].items()},
            objects=_objects(document),
            tiles={name: int(document["tiles"][name]) for name in ("grid", "kept", "ok", "unreadable")},
            created_at=datetime.fromisoformat(document["createdAt"]),
            made_for=str(document["madeFor"]),
            document=document,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TilesetMissing(f"tileset.json is not what the tiler writes: {error}.") from error


def _objects(document: Mapping[str, Any]) -> tuple[int, int] | None:
    if not document["parameters"]["objects"]:
        return None
    told = document.get("objects", {"count": -1, "bytes": -1})  # made before they were counted: never whole
    return int(told["count"]), int(told["bytes"])


def slide_document(survey: Survey) -> dict[str, Any]:
    """What tileset.json keeps of a survey; index.parquet has the rest."""
    geometry = survey.geometry
    return {
        "slide": slide_facts(survey),
        "tile": {
            "px": geometry.px,
            "mpp": geometry.mpp,
            "overlap": geometry.overlap,
            "level": geometry.level,
            "levelWidth": survey.level_size[0],
            "levelHeight": survey.level_size[1],
            "native": geometry.native,
            "footprintX": geometry.footprint_x,
            "footprintY": geometry.footprint_y,
            "strideX": geometry.stride_x,
            "strideY": geometry.stride_y,
        },
        "tissue": tissue_facts(survey),
    }


def _survey(
    document: Mapping[str, Any],
    slide: ShardSlide,
    columns: Mapping[str, Column],
    geojson: bytes,
    thumbnail: bytes,
) -> Survey:
    told, tile, tissue = document["slide"], document["tile"], document["tissue"]
    return Survey(
        width=told["width"],
        height=told["height"],
        levels=told["levels"],
        vendor=told["vendor"],
        reader=told["reader"],
        mpp=(told["mppX"], told["mppY"]),
        # Another run may have given the same number by another hand.
        mpp_source=slide.mpp_source or told["mppSource"],
        geometry=TileGeometry(
            px=tile["px"],
            mpp=tile["mpp"],
            overlap=tile["overlap"],
            level=tile["level"],
            native=tile["native"],
            footprint_x=tile["footprintX"],
            footprint_y=tile["footprintY"],
            stride_x=tile["strideX"],
            stride_y=tile["strideY"],
        ),
        grid=document["tiles"]["grid"],
        positions=np.stack(
            [cast(npt.NDArray[np.int32], columns["minx"]), cast(npt.NDArray[np.int32], columns["miny"])], axis=1
        ),
        fractions=cast(npt.NDArray[np.float32], columns["tissue_fraction"]),
        tissue_mm2=tissue["areaMm2"],
        tissue_mpp=tissue["mpp"],
        ink_fraction=tissue.get("inkFraction", 0.0),
        geojson=geojson,
        thumbnail=thumbnail,
        level_size=(tile["levelWidth"], tile["levelHeight"]),
        seconds=0.0,
    )


def tile_names(positions: npt.NDArray[np.int32]) -> list[str]:
    """What tiles at `positions` (n, 2; level-0 x, y) are called, without suffix."""
    return [f"{x}_{y}" for x, y in positions.tolist()]


def member_names(positions: npt.NDArray[np.int32], tiling: Tiling) -> list[str]:
    return [f"{name}.{SUFFIXES[tiling.format]}" for name in tile_names(positions)]


def pack_key(place: Place, identifier: str, number: int) -> str:
    """`place` is the tileset's own. Its base name is the only one in the bucket: predictions are matched by it."""
    return f"{place.prefix}{identifier}-{number:05}.tar"


def index_parquet(
    survey: Survey, readable: npt.NDArray[np.bool_], packer: Packer, metadata: Mapping[str, str]
) -> bytes:
    """A row for each kept tile. Always by the plain writer, so that it has the same bytes wherever it is made."""
    columns = tile_columns(survey, readable) | {
        "pack": packer.pack,
        "entry": packer.entry,
        "offset": packer.offset,
        "length": packer.length,
    }
    return write_plain(columns, metadata)


def read_index(data: bytes) -> dict[str, Column]:
    """Raises TilesetMissing."""
    try:
        return read_plain(data)
    except ValueError as error:
        raise TilesetMissing(f"index.parquet is not what the tiler writes: {error}.") from error


# --- what tiling made of a slide of a run ------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiled:
    """`tiled/<slideId>.json`. `requests` are those that were made for it."""

    slide_id: str
    state: Literal["TILED", "QUARANTINED", "FAILED"]
    error: str | None
    message: str | None
    identifier: str | None
    place: Place | None
    reused: bool
    requests: dict[str, int]


def tiled_key(tiled: Place, slide: ShardSlide) -> str:
    return f"{tiled.prefix}{slide.slide_id}.json"


def tiled_document(
    slide: ShardSlide, tileset: Tileset | None, *, reused: bool, error: SlidewayError | None, state: str
) -> dict[str, Any]:
    """`tileset` where there is one, else `error`."""
    document: dict[str, Any] = {"slideId": slide.slide_id, "state": state}
    if error is not None:
        document |= {"error": error.name, "message": str(error)}
    if tileset is not None:
        document |= {
            "tileset": {
                "id": tileset.id,
                "bucket": tileset.place.bucket,
                "prefix": tileset.place.prefix,
                "reused": reused,
            },
            "packs": [pack.document() for pack in tileset.packs],
            "tiles": tileset.tiles,
        }
    return document


def parse_tiled(text: bytes) -> Tiled:
    """Raises TilesetMissing."""
    try:
        document = json.loads(text)
        tileset = document.get("tileset")
        state = document["state"]
        if state not in ("TILED", "QUARANTINED", "FAILED") or (state == "TILED") != (tileset is not None):
            raise ValueError(f"state {state}")
        return Tiled(
            slide_id=str(document["slideId"]),
            state=state,
            error=document.get("error"),
            message=document.get("message"),
            identifier=str(tileset["id"]) if tileset else None,
            place=Place(str(tileset["bucket"]), str(tileset["prefix"])) if tileset else None,
            reused=bool(tileset["reused"]) if tileset else False,
            requests={name: int(document.get("requests", {}).get(name, 0)) for name in ("get", "put")},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TilesetMissing(f"What tiling tells of the slide is not what the tiler writes: {error}.") from error


def rows_by_pack(columns: Mapping[str, Column], packs: Sequence[PackRef]) -> list[npt.NDArray[np.intp]]:
    """The index's rows in each pack, in their order there. Raises TilesetMissing where index and packs differ."""
    pack, entry = (np.asarray(columns[name]) for name in ("pack", "entry"))
    rows = np.flatnonzero(pack >= 0)
    rows = rows[np.lexsort((entry[rows], pack[rows]))]
    counts = np.bincount(pack[rows], minlength=len(packs))
    if counts.tolist() != [each.tiles for each in packs]:
        raise TilesetMissing("index.parquet and tileset.json name other packs.")
    return np.split(rows, np.cumsum(counts)[:-1]) if len(packs) else []
