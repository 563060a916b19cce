"""Finds tissue on an overview of the slide at about 8 µm per pixel.

A pixel is tissue when it is coloured (saturation) or dense (optical density), each against Otsu's threshold held
within sane bounds: the lower bound keeps an empty slide empty, the upper keeps pale tissue beside dark. Ink is
told by hue and saturation that no stain has, found in its core and grown into its pale rim. Then specks go and
small holes close. Bounds were set by looking at outlines over slides, and are the same for every slide."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from slideway_inference.outline import Piece, fill, pieces_of, smooth
from slideway_inference.reader import Overview

TISSUE_MPP = 8.0
"""µm per pixel of the overview on which tissue is found."""

Bool = npt.NDArray[np.bool_]
F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
T = TypeVar("T", bound=np.generic)

_SATURATION = (0.06, 0.12)
_DENSITY = (0.05, 0.12)
_DARK = 0.30
"""Optical density above which colour is not asked for: anthracotic or heavily stained tissue is nearly neutral."""
_GLASS = (215.0, 255.0)
"""Bounds of what unstained glass can measure; scanners differ in their white."""
_SMALLEST_PIECE_MM2 = 0.01
_SMALLEST_HOLE_MM2 = 0.01
_BLOCK_PIXELS = 1 << 17
_INK_STEPS = 30
_LEAST_INK = 0.1
_GREEN = (142, 197, 63)


@dataclass(frozen=True)
class Tissue:
    """`mask` is (h, w) over the whole slide, each pixel `scale_x` × `scale_y` level-0 pixels. `doubtful` pixels
    could not be read: tiles there are tried, but the area is not counted as tissue."""

    mask: Bool
    doubtful: Bool
    scale_x: float
    scale_y: float
    area_mm2: float
    pieces: tuple[Piece, ...]

    def fractions(
        self, xs: npt.NDArray[np.int64], ys: npt.NDArray[np.int64], footprint: tuple[float, float]
    ) -> F32:
        """Share of tissue in each tile of a grid, (len(ys), len(xs)), exactly over the tiles' footprints."""
        down = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1]), np.int32)
        np.cumsum(self.mask | self.doubtful, axis=0, out=down[1:])

        def between(
            table: npt.NDArray[np.generic], starts: npt.NDArray[np.float64], length: float
        ) -> npt.NDArray[np.float64]:
            return _interpolate(table, starts + length) - _interpolate(table, starts)

        height, width = footprint[1] / self.scale_y, footprint[0] / self.scale_x
        rows = between(down, ys / self.scale_y, height)
        across = np.pad(rows.cumsum(axis=1), ((0, 0), (1, 0)))
        both = between(across.T, xs / self.scale_x, width).T
        return np.clip(both / (height * width), 0, 1).astype(np.float32)


def _interpolate(table: npt.NDArray[np.generic], at: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rows of `table` at fractional positions."""
    at = np.clip(at, 0, table.shape[0] - 1)
    low = np.minimum(at.astype(np.intp), table.shape[0] - 2)
    share = (at - low)[:, None]
    between: npt.NDArray[np.float64] = table[low] * (1 - share) + table[low + 1] * share
    return between


def find_tissue(overview: Overview, size: tuple[int, int], mpp: tuple[float, float]) -> Tissue:
    """`size` is the slide's width and height in level-0 pixels, `mpp` its µm per pixel."""
    height, width = overview.scanned.shape
    scale_x, scale_y = size[0] / width, size[1] / height
    pixel_mm2 = scale_x * mpp[0] * scale_y * mpp[1] * 1e-6
    mask = _majority(_stained(overview))
    pieces = []
    for piece in pieces_of(mask):
        holes = tuple(hole for hole in piece.holes if hole.area * pixel_mm2 >= _SMALLEST_HOLE_MM2)
        if piece.area * pixel_mm2 >= _SMALLEST_PIECE_MM2:
            pieces.append(Piece(piece.outer, holes))
    return Tissue(
        mask=fill(pieces, (height, width)),
        doubtful=overview.unreadable,
        scale_x=scale_x,
        scale_y=scale_y,
        area_mm2=sum(piece.area for piece in pieces) * pixel_mm2,
        pieces=tuple(pieces),
    )


def _stained(overview: Overview) -> Bool:
    scanned = overview.scanned
    if not scanned.any():
        return np.zeros_like(scanned)
    tables = [_densities(overview.rgb[..., colour][scanned]) for colour in range(3)]
    saturation = np.empty(scanned.shape, np.float32)
    density = np.empty(scanned.shape, np.float32)
    for rows in _blocks(scanned.shape):
        # Colour by colour: sums over the last axis of three are slow, and a table has the 256 logarithms there are.
        colours = [np.ascontiguousarray(overview.rgb[rows, :, colour]) for colour in range(3)]
        high, low = _high(*colours), _low(*colours)
        np.divide(high - low, np.maximum(high, 1), out=saturation[rows], dtype=np.float32)
        total = tables[0].take(colours[0])
        total += tables[1].take(colours[1])
        total += tables[2].take(colours[2])
        np.divide(total, 3, out=density[rows])
    counted = scanned & ~_ink(overview.rgb, saturation)
    saturated = _threshold(saturation, counted, 1.0, _SATURATION)
    dense = _threshold(density, counted, 1.5, _DENSITY)
    for rows in _blocks(scanned.shape):
        colour, depth = saturation[rows], density[rows]
        pale = (colour > saturated) & (depth > _DENSITY[0])
        deep = (depth > dense) & (colour > _SATURATION[0])
        counted[rows] &= pale | deep | (depth > _DARK)
    return counted


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows, as many at a time as a processor's cache holds."""
    step = max(1, _BLOCK_PIXELS // shape[1])
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _high(red: npt.NDArray[T], green: npt.NDArray[T], blue: npt.NDArray[T]) -> npt.NDArray[T]:
    found: npt.NDArray[T] = np.maximum(np.maximum(red, green), blue)
    return found


def _low(red: npt.NDArray[T], green: npt.NDArray[T], blue: npt.NDArray[T]) -> npt.NDArray[T]:
    found: npt.NDArray[T] = np.minimum(np.minimum(red, green), blue)
    return found


def _densities(colour: U8) -> F32:
    """The optical density of each of a colour's 256 values, against the glass of these pixels."""
    glass = np.float32(np.clip(_percentile(colour, 98), *_GLASS))
    light = np.maximum(np.arange(256, dtype=np.float32), 1) / glass
    return np.clip(-np.log10(light), 0, None)


def _threshold(values: F32, counted: Bool, top: float, bounds: tuple[float, float]) -> float:
    """Otsu's threshold over 256 bins of 0…top, held within bounds."""
    counts = np.zeros(256)
    for rows in _blocks(values.shape):
        part = values[rows]
        bins = np.minimum(part * np.float32(256 / top), 255).astype(np.uint8)
        counts += np.bincount(bins[counted[rows] & (part <= top)], minlength=256)
    if not counts.sum():
        return bounds[1]
    centres = (np.arange(256) + 0.5) / 256 * top
    below, sums = counts.cumsum(), (counts * centres).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(np.clip(centres[int(np.argmax(np.nan_to_num(between)))], *bounds))


def _percentile(values: U8, share: float) -> float:
    """numpy's percentile, from the counts."""
    counts = np.bincount(values.ravel(), minlength=256).cumsum()
    at = share / 100 * (values.size - 1)
    below, above = np.searchsorted(counts, [int(at), min(int(at) + 1, values.size - 1)], side="right")
    return float(below + (above - below) * (at - int(at)))


def _ink(rgb: U8, saturation: F32) -> Bool:
    """Pen marks: blue, green, red and black. Hue in degrees; stains keep clear of these hues at these saturations
    (haematoxylin is 230–290°, eosin 310–350°, DAB 15–40°)."""
    candidates = np.empty(saturation.shape, np.bool_)
    black, dull = np.empty_like(candidates), np.empty_like(candidates)
    for rows in _blocks(saturation.shape):
        colours = [np.ascontiguousarray(rgb[rows, :, colour]) for colour in range(3)]
        high, low = _high(*colours), _low(*colours)
        neutral = (high - low) < 30
        black[rows], dull[rows] = neutral & (high < 75), neutral & (high < 190)
        # Hue is worked out only where it can be ink's: in colour, and not with the least of green, as stains have.
        slack = ((high - low) >> 3) + 1
        greenish = np.maximum(colours[0], colours[1]) - colours[1] <= slack
        reddish = (colours[0] == high) & (np.maximum(colours[1], colours[2]) - low <= 3 * slack)
        candidates[rows] = (greenish | reddish) & (saturation[rows] > _LEAST_INK)
    coloured = np.flatnonzero(candidates)
    red, green, blue = rgb.reshape(-1, 3)[coloured].T.astype(np.float32)
    top = _high(red, green, blue)
    strong = saturation.ravel()[coloured]
    chroma = np.maximum(strong * top, 1e-3)
    hue: F32 = (
        np.where(
            top == red,
            ((green - blue) / chroma) % 6,
            np.where(top == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
        )
        * 60
    )

    def where(found: Bool) -> Bool:
        mask = np.zeros(saturation.shape, np.bool_)
        mask.ravel()[coloured[found]] = True
        return mask

    ink = np.zeros(saturation.shape, np.bool_)
    rules = (
        ((185, 238), 0.60, (175, 245), 0.20, 0),
        ((75, 185), 0.35, (70, 195), 0.10, 0),
        ((-12, 12), 0.80, (-12, 18), 0.20, 120),
    )
    for core_hue, core_saturation, rim_hue, rim_saturation, least in rules:
        core = (strong > core_saturation) & (top > least) & _within(hue, core_hue)
        if core.any():
            rim = (strong > rim_saturation) & _within(hue, rim_hue)
            ink |= _grow(where(core), where(rim))
    if black.any():
        ink |= _grow(black, dull)
    return ink


def _within(hue: F32, bounds: tuple[int, int]) -> Bool:
    return (hue - bounds[0]) % 360 <= bounds[1] - bounds[0]


def _grow(core: Bool, into: Bool) -> Bool:
    """The core and what of `into` is connected with it, up to a limit; alone standing pixels are no pen."""
    grown = core & (_box_sum(core, 2) > 5)
    if not grown.any():
        return grown
    for _ in range(_INK_STEPS):
        wider = (_box_sum(grown, 1) > 0) & into | grown
        if np.array_equal(wider, grown):
            break
        grown = wider
    return _box_sum(grown, 1) > 0


def _majority(mask: Bool) -> Bool:
    """Smooths without moving borders; thin strands stay, scattered pixels go."""
    around = _box_sum(mask, 2)
    return (around >= 12) | (mask & (around >= 8))


def _box_sum(mask: Bool, radius: int) -> U8:
    """How many are set in a square window; beyond the edge the edge repeats."""
    padded = np.pad(mask.view(np.uint8), radius, mode="edge")
    height, width = mask.shape
    down = sum((padded[i : i + height] for i in range(1, 2 * radius + 1)), padded[:height])
    return sum((down[:, i : i + width] for i in range(1, 2 * radius + 1)), down[:, :width])


def tissue_geojson(tissue: Tissue, mpp: tuple[float, float], slide_key: str) -> bytes:
    """The tissue as QuPath reads it: a FeatureCollection of annotations, one per piece, in level-0 pixels.
    Ids are made from `slide_key` (the slide's checksum), so the same slide gives the same bytes."""
    pixel_mm2 = tissue.scale_x * mpp[0] * tissue.scale_y * mpp[1] * 1e-6
    features = []
    for index, piece in enumerate(tissue.pieces):
        rings = []
        for loop in (piece.outer, *piece.holes):
            points = smooth(loop) * (tissue.scale_x, tissue.scale_y)
            rings.append([[round(float(x), 1), round(float(y), 1)] for x, y in [*points, points[0]]])
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"slideway tissue {slide_key} {index}")),
                "geometry": {"type": "Polygon", "coordinates": rings},
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": "Tissue", "color": list(_GREEN)},
                    "isLocked": True,
                    "measurements": {"Area mm^2": round(piece.area * pixel_mm2, 6)},
                },
            }
        )
    return json.dumps({"type": "FeatureCollection", "features": features}, separators=(",", ":")).encode()
