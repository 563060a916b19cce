"""Looks at one slide before its tiles are read: how large a pixel is, where the tissue is, which tiles to keep,
and the pictures for people. Everything that follows works from the survey."""

from __future__ import annotations

import io
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from slideway_inference.contracts import MppSource, ShardSlide
from slideway_inference.errors import SlideUnreadable
from slideway_inference.grid import Level, TileGeometry, grid_axis, plan_tiles
from slideway_inference.reader import Overview
from slideway_inference.resolution import Mpp, resolve_mpp
from slideway_inference.tissue import TISSUE_MPP, find_tissue, tissue_geojson

_THUMBNAIL_PIXELS = 1024
_OVERVIEW_PIXELS = 40 << 20
"""Of the overview at most, so that memory does not grow with the slide: above 50 × 50 mm it is coarser. A survey of
so many takes half a gigabyte."""
_LONGEST = 1 << 20
"""Of a side of the overview, where the slide is absurdly narrow."""


class Surveyed(Protocol):
    """What a survey asks of a slide; every reader has it."""

    name: str
    vendor: str
    levels: tuple[Level, ...]
    mpp: Mpp | None

    def overview(self, width: int, height: int) -> Overview: ...


@dataclass(frozen=True)
class SurveyRequest:
    """`slide` is a file on disk, or one to be read from S3 by the fast reader."""

    slide: Path | ShardSlide
    checksum: str
    mpp: float | None
    mpp_source: MppSource | None
    px: int
    tile_mpp: float
    overlap: int
    mpp_tolerance: float
    tissue_min_fraction: float


@dataclass(frozen=True)
class Survey:
    """`positions` (n, 2) are the kept tiles' level-0 x, y, row by row; `fractions` (n,) their share of tissue;
    `grid` counts all positions of the grid."""

    width: int
    height: int
    levels: int
    vendor: str
    reader: str
    mpp: tuple[float, float]
    mpp_source: MppSource
    geometry: TileGeometry
    grid: int
    positions: npt.NDArray[np.int32]
    fractions: npt.NDArray[np.float32]
    tissue_mm2: float
    tissue_mpp: float
    ink_fraction: float
    """Of all that is dense, the share that was taken for pen marks."""
    geojson: bytes
    thumbnail: bytes
    level_size: tuple[int, int]
    """Width and height of the level that tiles are read from: readers may count levels differently."""
    seconds: float


def survey(slide: Surveyed, request: SurveyRequest) -> Survey:
    """Raises MppMissing, MppImplausible, SlideUnreadable."""
    started = time.monotonic()
    width, height = slide.levels[0].width, slide.levels[0].height
    mpp, source = resolve_mpp(request.mpp, request.mpp_source, slide.mpp)
    geometry = plan_tiles(slide.levels, mpp, request.px, request.tile_mpp, request.overlap, request.mpp_tolerance)
    across, down = width * mpp[0] / TISSUE_MPP, height * mpp[1] / TISSUE_MPP
    shrink = max(1.0, math.sqrt(across * down / _OVERVIEW_PIXELS))
    overview = slide.overview(
        max(1, min(width, _LONGEST, round(across / shrink))), max(1, min(height, _LONGEST, round(down / shrink)))
    )
    if overview.unreadable.all():
        raise SlideUnreadable(
            "It opens, but none of its pixels can be read: the file is damaged; scan or copy it again."
        )
    tissue = find_tissue(overview, (width, height), mpp)

    xs = grid_axis(width, geometry.footprint_x, geometry.stride_x)
    ys = grid_axis(height, geometry.footprint_y, geometry.stride_y)
    fractions = tissue.fractions(xs, ys, (geometry.footprint_x, geometry.footprint_y))
    # A share that float arithmetic leaves a hair below the parameter is not below it.
    rows, columns = np.nonzero(fractions >= request.tissue_min_fraction - 1e-6)
    return Survey(
        width=width,
        height=height,
        levels=len(slide.levels),
        vendor=slide.vendor,
        reader=slide.name,
        mpp=mpp,
        mpp_source=source,
        geometry=geometry,
        grid=len(xs) * len(ys),
        positions=np.stack([xs[columns], ys[rows]], axis=1).astype(np.int32).reshape(-1, 2),
        fractions=fractions[rows, columns],
        tissue_mm2=tissue.area_mm2,
        tissue_mpp=math.sqrt(tissue.scale_x * mpp[0] * tissue.scale_y * mpp[1]),
        ink_fraction=tissue.ink_fraction,
        geojson=tissue_geojson(tissue, mpp, request.checksum),
        thumbnail=_thumbnail(slide, overview.rgb),
        level_size=(slide.levels[geometry.level].width, slide.levels[geometry.level].height),
        seconds=time.monotonic() - started,
    )


def _thumbnail(slide: Surveyed, overview: npt.NDArray[np.uint8]) -> bytes:
    """JPEG of the whole slide with level 0's aspect, from level pixels only."""
    width, height = slide.levels[0].width, slide.levels[0].height
    scale = min(1.0, _THUMBNAIL_PIXELS / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if overview.shape[1] >= size[0] and overview.shape[0] >= size[1]:
        image = Image.fromarray(overview).resize(size, Image.Resampling.BOX)
    else:
        image = Image.fromarray(slide.overview(*size).rgb)
    target = io.BytesIO()
    image.save(target, "JPEG", quality=85, subsampling=0)
    return target.getvalue()
