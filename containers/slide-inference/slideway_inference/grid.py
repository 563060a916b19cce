"""Where tiles lie: a model's tile, given in pixels at exact µm per pixel, on a slide with its levels.

Magnification plays no part. The footprint of a tile at level 0 is px × mpp / slide mpp on each axis, read from
the deepest level that is not coarser than wanted. Where a level's own mpp is within the tolerance of the
model's, its pixels are taken as they are and the mpp on record is the level's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Level:
    """A level of the pyramid: its size in pixels and its downsample of level 0, per axis."""

    width: int
    height: int
    downsample_x: float
    downsample_y: float


@dataclass(frozen=True)
class TileGeometry:
    """How a model's tile is read from a slide. Footprint and stride are in level-0 pixels."""

    px: int
    mpp: float
    overlap: int
    level: int
    native: bool
    footprint_x: float
    footprint_y: float
    stride_x: float
    stride_y: float


def plan_tiles(
    levels: Sequence[Level],
    mpp: tuple[float, float],
    px: int,
    tile_mpp: float,
    overlap: int,
    tolerance: float,
) -> TileGeometry:
    """`mpp` is the slide's µm per pixel at level 0 in x and y; `tile_mpp` the model's."""

    def deviation(level: Level) -> float:
        return max(abs(level.downsample_x * mpp[0] / tile_mpp - 1), abs(level.downsample_y * mpp[1] / tile_mpp - 1))

    nearest = min(range(len(levels)), key=lambda index: deviation(levels[index]))
    native = deviation(levels[nearest]) <= tolerance
    if native:
        index = nearest
        footprint = (px * levels[index].downsample_x, px * levels[index].downsample_y)
        mpp_x, mpp_y = levels[index].downsample_x * mpp[0], levels[index].downsample_y * mpp[1]
        true_mpp = mpp_x if mpp_x == mpp_y else math.sqrt(mpp_x * mpp_y)
    else:
        fine = [
            index
            for index, level in enumerate(levels)
            if level.downsample_x * mpp[0] <= tile_mpp and level.downsample_y * mpp[1] <= tile_mpp
        ]
        index = max(fine, key=lambda index: levels[index].downsample_x) if fine else 0
        footprint = (px * tile_mpp / mpp[0], px * tile_mpp / mpp[1])
        true_mpp = tile_mpp
    share = (px - overlap) / px
    return TileGeometry(
        px=px,
        mpp=true_mpp,
        overlap=overlap,
        level=index,
        native=native,
        footprint_x=footprint[0],
        footprint_y=footprint[1],
        stride_x=footprint[0] * share,
        stride_y=footprint[1] * share,
    )


def grid_axis(length: int, footprint: float, stride: float) -> npt.NDArray[np.int64]:
    """Starts of the tiles wholly inside 0…length: round(i × stride), from the product, so errors never add up."""
    if footprint > length:
        return np.zeros(0, np.int64)
    starts: npt.NDArray[np.int64] = np.floor(
        np.arange(int((length - footprint) / stride) + 2) * stride + 0.5
    ).astype(np.int64)
    inside: npt.NDArray[np.int64] = starts[starts + footprint <= length + 1e-6]
    return inside
