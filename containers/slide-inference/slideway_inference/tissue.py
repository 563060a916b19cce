"""Finds tissue on an overview of the slide at about 8 µm per pixel.

A pixel is tissue when it is coloured (saturation) or dense (optical density), each against Otsu's threshold held
within sane bounds: the lower bound keeps an empty slide empty, the upper keeps pale tissue beside dark. A slide on
which nothing reaches the lower bounds is looked at once more, blurred, against its own glass. Ink does not count
(ink.py). Then specks go and small holes close. Bounds were set by looking at outlines over slides, and are the same
for every slide."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from slideway_inference.colour import F32, U8, Bool, Glass, apart, bands, box_sum, highest, lowest, saturation
from slideway_inference.ink import find_ink
from slideway_inference.outline import Piece, fill, pieces_of, smooth
from slideway_inference.reader import Overview

TISSUE_MPP = 8.0
"""µm per pixel of the overview on which tissue is found."""

Counts = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]

_SATURATION = (0.06, 0.12)
_DENSITY = (0.05, 0.12)
_PALEST = (0.035, 0.02)
"""Lowest bounds of saturation and density, on a slide where nothing reaches those above."""
_SPREADS = 6
_DEPTHS = 1.5
"""Optical densities that Otsu's threshold looks at."""
_DARK = 0.30
"""Optical density above which colour is not asked for: anthracotic or heavily stained tissue is nearly neutral."""
_STRIP = 512
"""Columns of the mask that are summed at a time."""
_SMALLEST_PIECE_MM2 = 0.01
_SMALLEST_HOLE_MM2 = 0.01
_GREEN = (142, 197, 63)


@dataclass(frozen=True)
class Tissue:
    """`mask` is (h, w) over the whole slide, each pixel `scale_x` × `scale_y` level-0 pixels. `doubtful` pixels
    could not be read: tiles there are tried, but the area is not counted as tissue. `ink_fraction` of all that is
    dense was taken for pen marks, black borders among them."""

    mask: Bool
    doubtful: Bool
    scale_x: float
    scale_y: float
    area_mm2: float
    pieces: tuple[Piece, ...]
    ink_fraction: float = 0.0

    def fractions(
        self, xs: npt.NDArray[np.int64], ys: npt.NDArray[np.int64], footprint: tuple[float, float]
    ) -> F32:
        """Share of tissue in each tile of a grid, (len(ys), len(xs)), exactly over the tiles' footprints."""
        height, width = footprint[1] / self.scale_y, footprint[0] / self.scale_x
        strips = []
        for left in range(0, self.mask.shape[1], _STRIP):
            strip = slice(left, left + _STRIP)
            kept = self.mask[:, strip] | self.doubtful[:, strip]
            strips.append(_between(kept.view(np.uint8), ys / self.scale_y, height))
        both = _between(np.concatenate(strips, axis=1).T, xs / self.scale_x, width).T
        return np.clip(both / (height * width), 0, 1).astype(np.float32)


def _between(values: npt.NDArray[np.generic], starts: npt.NDArray[np.float64], length: float) -> Sums:
    """Sums of the rows of `values` (h, w) in windows from fractional `starts` (n,) on, (n, w). Only what lies
    between the rows at which windows begin or end is summed, not every row up to each."""
    count = values.shape[0]
    ends = np.clip(np.concatenate([starts, starts + length]), 0, count)
    low = np.minimum(ends.astype(np.intp), count - 1)
    stops = np.unique(np.concatenate([[0], low, low + 1, [count]]))
    sums = np.add.reduceat(values, stops[:-1], axis=0, dtype=np.float64)
    table = np.concatenate([np.zeros((1, values.shape[1])), sums.cumsum(axis=0)])
    at, share = np.searchsorted(stops, low), (ends - low)[:, None]
    found: Sums = table[at] * (1 - share) + table[at + 1] * share
    return found[len(starts) :] - found[: len(starts)]


def find_tissue(overview: Overview, size: tuple[int, int], mpp: tuple[float, float]) -> Tissue:
    """`size` is the slide's width and height in level-0 pixels, `mpp` its µm per pixel."""
    height, width = overview.scanned.shape
    scale_x, scale_y = size[0] / width, size[1] / height
    pixel_mm2 = scale_x * mpp[0] * scale_y * mpp[1] * 1e-6
    stained, ink = _stained(overview)
    mask = _majority(stained)
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
        ink_fraction=ink,
    )


def _stained(overview: Overview) -> tuple[Bool, float]:
    """Which pixels are coloured or dense as tissue is; and of all that is dense, the share that is ink."""
    rgb, scanned = overview.rgb, overview.scanned
    if not scanned.any():
        return np.zeros_like(scanned), 0.0
    glass = Glass(rgb, scanned)
    colours, depths = _histograms(rgb, scanned, glass)
    dense = int(depths[_bin(_DENSITY[1], _DEPTHS) :].sum())
    ink = find_ink(rgb, glass, dense)
    ink &= scanned
    inked = 0
    if ink.any():
        of_ink = _histograms(rgb, ink, glass)
        inked = int(of_ink[1][_bin(_DENSITY[1], _DEPTHS) :].sum())
        colours, depths = colours - of_ink[0], depths - of_ink[1]
    least, shallow = _SATURATION[0], _DENSITY[0]
    if _otsu(colours, 1.0) < least and _otsu(depths, _DEPTHS) < shallow:
        # Nothing stands out: there is nothing, or it is so pale that it must be told from the noise of the glass.
        rgb = np.asarray(Image.fromarray(rgb).filter(ImageFilter.BoxBlur(2)))
        glass = Glass(rgb, scanned)
        colours, depths = _histograms(rgb, scanned & ~ink, glass)
        least = float(np.clip(_above_glass(colours), _PALEST[0], least))
        shallow = _PALEST[1]
    saturated = float(np.clip(_otsu(colours, 1.0), least, _SATURATION[1]))
    dense_from = float(np.clip(_otsu(depths, _DEPTHS), shallow, _DENSITY[1]))
    stained = np.empty_like(scanned)
    for rows in bands(scanned.shape):
        colour, depth = _measured(rgb[rows], glass)
        pale = (colour > saturated) & (depth > shallow)
        deep = (depth > dense_from) & (colour > least)
        stained[rows] = scanned[rows] & ~ink[rows] & (pale | deep | (depth > _DARK))
    return stained, inked / max(dense, 1)


def _measured(rgb: U8, glass: Glass) -> tuple[F32, F32]:
    """Saturation and density."""
    red, green, blue = apart(rgb)
    return saturation(highest(red, green, blue), lowest(red, green, blue)), glass.density(red, green, blue)


def _histograms(rgb: U8, counted: Bool, glass: Glass) -> tuple[Counts, Counts]:
    """Of saturation over 0…1 and of density over 0…`_DEPTHS`, in 256 bins; what is denser is not counted."""
    colours, depths = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for rows in bands(counted.shape):
        chosen = counted[rows]
        if not chosen.any():
            continue
        colour, depth = _measured(rgb[rows], glass)
        colours += np.bincount(_bins(colour, 1.0)[chosen], minlength=256)
        depths += np.bincount(_bins(depth, _DEPTHS)[chosen & (depth <= _DEPTHS)], minlength=256)
    return colours, depths


def _bins(values: F32, top: float) -> U8:
    found: U8 = np.minimum(values * np.float32(256 / top), 255).astype(np.uint8)
    return found


def _bin(value: float, top: float) -> int:
    return int(value * 256 / top)


def _otsu(counts: Counts, top: float) -> float:
    """Otsu's threshold over 256 bins of 0…top, the middle of equals; the top where nothing is counted."""
    if not counts.any():
        return top
    centres = (np.arange(256) + 0.5) / 256 * top
    below, sums = counts.cumsum(), (counts * centres).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.nan_to_num(below * above * (sums / below - (sums[-1] - sums) / above) ** 2)
    return float(centres[between >= between.max() * (1 - 1e-9)].mean())


def _above_glass(counts: Counts) -> float:
    """A saturation that glass does not reach: glass's commonest, and six times as far above it as a third of what
    lies below it spreads."""
    mode = int(np.argmax(counts[: _bin(_otsu(counts, 1.0), 1.0) + 1]))
    ends = np.concatenate([[0], counts[: mode + 1].cumsum()])
    third = np.interp(0.32 * ends[-1], ends, np.arange(len(ends)))
    return float(mode + 0.5 + _SPREADS * max(mode + 0.5 - third, 0)) / 256


def _majority(mask: Bool) -> Bool:
    """Smooths without moving borders; thin strands stay, scattered pixels go."""
    around = box_sum(mask.view(np.uint8), 2)
    return (around >= 12) | (mask & (around >= 8))


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
