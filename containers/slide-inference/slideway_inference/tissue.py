"""Finds tissue on an overview of the slide at about 8 µm per pixel.

A pixel is tissue when it is coloured (saturation) or dense (optical density), each against Otsu's threshold held
within sane bounds: the lower bound keeps an empty slide empty, the upper keeps pale tissue beside dark. Ink is
told by hue and saturation that no stain has, found in its core and grown into its pale rim. Then specks go and
small holes close. Bounds were set by looking at outlines over slides, and are the same for every slide."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slideway_inference.outline import Piece, fill, pieces_of, smooth
from slideway_inference.reader import Overview

TISSUE_MPP = 8.0
"""µm per pixel of the overview on which tissue is found."""

Bool = npt.NDArray[np.bool_]
F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

_SATURATION = (0.06, 0.12)
_DENSITY = (0.05, 0.12)
_DARK = 0.30
"""Optical density above which colour is not asked for: anthracotic or heavily stained tissue is nearly neutral."""
_GLASS = (215.0, 255.0)
"""Bounds of what unstained glass can measure; scanners differ in their white."""
_SMALLEST_PIECE_MM2 = 0.01
_SMALLEST_HOLE_MM2 = 0.01
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
        total = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1))
        total[1:, 1:] = (self.mask | self.doubtful).cumsum(axis=0, dtype=np.float64).cumsum(axis=1)

        def between(
            table: npt.NDArray[np.float64], starts: npt.NDArray[np.float64], length: float
        ) -> npt.NDArray[np.float64]:
            return _interpolate(table, starts + length) - _interpolate(table, starts)

        height, width = footprint[1] / self.scale_y, footprint[0] / self.scale_x
        rows = between(total, ys / self.scale_y, height)
        both = between(rows.T, xs / self.scale_x, width).T
        return np.clip(both / (height * width), 0, 1).astype(np.float32)


def _interpolate(table: npt.NDArray[np.float64], at: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
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
    # Colour by colour: sums over the last axis of three are slow, and a table has the 256 logarithms there are.
    colours = [np.ascontiguousarray(overview.rgb[..., colour]) for colour in range(3)]
    high = np.maximum(np.maximum(colours[0], colours[1]), colours[2])
    low = np.minimum(np.minimum(colours[0], colours[1]), colours[2])
    saturation: F32 = (high - low).astype(np.float32)
    saturation /= np.maximum(high, 1)
    density = np.zeros(scanned.shape, np.float32)
    for colour in colours:
        glass = np.float32(np.clip(_percentile(colour[scanned], 98), *_GLASS))
        light = np.maximum(np.arange(256, dtype=np.float32), 1) / glass
        density += np.clip(-np.log10(light), 0, None).take(colour)
    density /= 3
    ink = _ink(colours, high, low, saturation)
    counted = scanned & ~ink
    coloured = saturation > _threshold(saturation[counted], 1.0, _SATURATION)
    dense = density > _threshold(density[counted], 1.5, _DENSITY)
    pale = coloured & (density > _DENSITY[0])
    deep = dense & (saturation > _SATURATION[0])
    stained: Bool = (pale | deep | (density > _DARK)) & counted
    return stained


def _threshold(values: F32, top: float, bounds: tuple[float, float]) -> float:
    """Otsu's threshold over 256 bins of 0…top, held within bounds."""
    counts = np.histogram(values, bins=256, range=(0, top))[0].astype(np.float64)
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
    counts = np.bincount(values, minlength=256).cumsum()
    at = share / 100 * (len(values) - 1)
    below, above = np.searchsorted(counts, [int(at), min(int(at) + 1, len(values) - 1)], side="right")
    return float(below + (above - below) * (at - int(at)))


def _ink(colours: list[U8], high: U8, low: U8, saturation: F32) -> Bool:
    """Pen marks: blue, green, red and black. Hue in degrees; stains keep clear of these hues at these saturations
    (haematoxylin is 230–290°, eosin 310–350°, DAB 15–40°)."""
    # All rules ask for some saturation; where there is none, hue is not worked out.
    coloured = np.flatnonzero(saturation > _LEAST_INK)
    red, green, blue = (colour.ravel()[coloured].astype(np.float32) for colour in colours)
    top = high.ravel()[coloured]
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
    neutral = (high - low) < 30
    ink |= _grow(neutral & (high < 75), neutral & (high < 190))
    return ink


def _within(hue: F32, bounds: tuple[int, int]) -> Bool:
    return (hue - bounds[0]) % 360 <= bounds[1] - bounds[0]


def _grow(core: Bool, into: Bool) -> Bool:
    """The core and what of `into` is connected with it, up to a limit; alone standing pixels are no pen."""
    grown = core & (_box_mean(core, 2) > 0.2)
    if not grown.any():
        return grown
    for _ in range(_INK_STEPS):
        wider = (_box_mean(grown, 1) > 0) & into | grown
        if np.array_equal(wider, grown):
            break
        grown = wider
    return _box_mean(grown, 1) > 0


def _majority(mask: Bool) -> Bool:
    """Smooths without moving borders; thin strands stay, scattered pixels go."""
    share = _box_mean(mask, 2)
    return (share >= 0.45) | (mask & (share >= 0.3))


def _box_mean(mask: Bool, radius: int) -> F32:
    """Mean over a square window; beyond the edge the edge repeats."""
    size = 2 * radius + 1
    padded = np.pad(mask, radius, mode="edge")
    table = np.zeros((padded.shape[0] + 1, padded.shape[1] + 1), np.int32)
    np.cumsum(np.cumsum(padded, axis=0, dtype=np.int32), axis=1, out=table[1:, 1:])
    total = table[size:, size:] - table[:-size, size:] - table[size:, :-size] + table[:-size, :-size]
    return (total / np.float32(size * size)).astype(np.float32)


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
