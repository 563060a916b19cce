"""Finds pen marks on an overview of the slide. Ink has hues and saturations that haematoxylin, eosin and DAB keep
clear of; but other stains have them too (aniline blue, Alcian blue, light green, Sirius red, silver), so colour
alone only names what may be ink. What tells is texture: at 8 µm per pixel a stroke is flat, and tissue is not.

Cells of 4 × 4 pixels are judged, in connected pieces: a piece is ink when most of its pixels differ from their
neighbours by less than a twentieth of their density. Looked at: strokes of eleven inks beside, around and over
tissue of two slides, and the same tissue recoloured as twenty-four stains. Where ink of one colour would be most of
what is dense on the slide, more is asked of it, so that a stain is not taken for ink in bulk."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from slideway_inference.colour import CELL, F32, U8, Bool, Glass, apart, bands, box_sum, highest, lowest, saturation
from slideway_inference.outline import labels, pieces_of

_LEAST_SATURATION = 0.1
_COLOURS = (
    # Hue in degrees and saturation of a stroke's core, the same of its paler rim, the core's least brightness.
    # Haematoxylin is 230–290°, eosin 310–350°, DAB 15–40°.
    ((185, 238), 0.35, (175, 245), 0.20, 0),
    ((75, 185), 0.35, (70, 195), 0.10, 0),
    ((-12, 12), 0.80, (-12, 18), 0.20, 120),
)
_BLACK = len(_COLOURS)
_RIM = 4
"""Bit n of a pixel's mark says that it can be a core of colour n, bit n + 4 that it can be a rim."""
_FLAT = 0.05
"""What differs by less from the mean of its neighbours is flat: as a share of their density, or of the least."""
_LEAST_DENSITY = 0.02
_DARKEST = 8
"""Below this brightness a difference is noise."""
_LIKELY_FLAT, _SURELY_FLAT = 0.5, 0.8
"""Shares of flat pixels."""
_BULK = 0.5
_STEPS, _REACH = 4, 3
"""In cells: how wide a rim may be, and how far around it a cell is looked at."""
_LEAST_PIXELS = 100
"""Of a piece that is judged by its texture; smaller ones are no strokes."""


def find_ink(rgb: U8, glass: Glass, dense: int) -> Bool:
    """The pixels (height, width) that are ink. `dense` pixels of the slide are tissue or ink."""
    marks = np.empty(rgb.shape[:2], np.uint8)
    seen = 0
    for rows in bands(marks.shape):
        marks[rows] = _marks(*apart(rgb[rows]))
        seen |= int(np.bitwise_or.reduce(marks[rows], axis=None))
    ink = np.zeros(marks.shape, np.bool_)
    colours = [colour for colour in range(_BLACK + 1) if seen >> colour & 1]
    if not colours:
        return ink
    for colour, cells in zip(colours, _cells(rgb, marks, glass, colours), strict=True):
        found = _judged(cells, dense)
        if not found.any():
            continue
        around = box_sum(found.view(np.uint8), 1) > 0
        for rows in bands(marks.shape):
            part = marks[rows]
            near = around[rows.start // CELL : -(-rows.stop // CELL)].repeat(CELL, axis=0).repeat(CELL, axis=1)
            ink[rows] |= (part & _bits(colour) > 0) & near[: part.shape[0], : part.shape[1]]
    return box_sum(ink.view(np.uint8), 1) > 0 if ink.any() else ink


def _bits(colour: int) -> int:
    return 1 << colour | 1 << colour + _RIM


def _marks(red: U8, green: U8, blue: U8) -> U8:
    """Which pixels have a colour of ink."""
    high, low = highest(red, green, blue), lowest(red, green, blue)
    chroma = high - low
    neutral = chroma < 30
    marks = (neutral & (high < 75)).astype(np.uint8) << np.uint8(_BLACK)
    marks |= (neutral & (high < 190)).astype(np.uint8) << np.uint8(_BLACK + _RIM)
    # Hue is worked out only where it can be ink's: in colour, and not with the least of green, as stains have.
    slack = (chroma >> 3) + 1
    greenish = np.maximum(red, green) - green <= slack
    reddish = (red == high) & (np.maximum(green, blue) - low <= 3 * slack)
    coloured = np.flatnonzero((greenish | reddish) & (saturation(high, low) > _LEAST_SATURATION))
    if len(coloured):
        picked = (part.ravel()[coloured].astype(np.float32) for part in (red, green, blue))
        marks.ravel()[coloured] |= _hues(*picked)
    return marks


def _hues(red: F32, green: F32, blue: F32) -> U8:
    """The marks of pixels in colour, (n,) each."""
    top = highest(red, green, blue)
    chroma = np.maximum(top - lowest(red, green, blue), 1e-3)
    strong = chroma / np.maximum(top, 1)
    hue: F32 = 60 * np.where(
        top == red,
        ((green - blue) / chroma) % 6,
        np.where(top == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    marks = np.zeros(len(red), np.uint8)
    for colour, (core_hue, core, rim_hue, rim, least) in enumerate(_COLOURS):
        marks |= ((strong > core) & (top > least) & _within(hue, core_hue)).astype(np.uint8) << colour
        marks |= ((strong > rim) & _within(hue, rim_hue)).astype(np.uint8) << (colour + _RIM)
    return marks


def _within(hue: F32, bounds: tuple[int, int]) -> Bool:
    return (hue - bounds[0]) % 360 <= bounds[1] - bounds[0]


class _Cells:
    """How many pixels of each cell are core, core or rim, inside what may be ink, and of the latter flat."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        cells = -(-shape[0] // CELL), -(-shape[1] // CELL)
        self.core, self.any, self.inner, self.flat = (np.zeros(cells, np.uint8) for _ in range(4))


def _cells(rgb: U8, marks: U8, glass: Glass, colours: list[int]) -> list[_Cells]:
    found = [_Cells(marks.shape) for _ in colours]
    for rows in bands(marks.shape):
        part = marks[rows]
        if not part.any():
            continue
        inner, flat = _texture(rgb, marks, glass, rows)
        at = slice(rows.start // CELL, -(-rows.stop // CELL))
        for colour, cells in zip(colours, found, strict=True):
            coloured = part & _bits(colour) > 0
            if coloured.any():
                cells.core[at] = _counted(part >> colour & 1 > 0)
                cells.any[at] = _counted(coloured)
                cells.inner[at] = _counted(coloured & inner)
                cells.flat[at] = _counted(coloured & flat)
    return found


def _texture(rgb: U8, marks: U8, glass: Glass, rows: slice) -> tuple[Bool, Bool]:
    """Of a band's pixels, which have marked neighbours only, and which of those are about as dense as these."""
    height, width = marks.shape
    above, below = max(rows.start - 1, 0), min(rows.stop + 1, height)
    edges = ((above == rows.start, below == rows.stop), (1, 1))
    density = np.pad(glass.density(*apart(np.maximum(rgb[above:below], _DARKEST))), edges, mode="edge")
    marked = np.pad(marks[above:below] > 0, edges, mode="edge")
    middle, down, up = slice(1, -1), slice(2, None), slice(None, -2)
    sides = ((up, middle), (down, middle), (middle, up), (middle, down))
    inner = marked[middle, middle].copy()
    mean = np.zeros((rows.stop - rows.start, width), np.float32)
    for side in sides:
        inner &= marked[side]
        mean += density[side]
    mean /= 4
    flat = np.abs(density[middle, middle] - mean) < _FLAT * np.maximum(mean, _LEAST_DENSITY)
    return inner, flat & inner


def _counted(pixels: Bool) -> U8:
    """How many are set in each cell."""
    height, width = pixels.shape
    whole = np.pad(pixels.view(np.uint8), ((0, -height % CELL), (0, -width % CELL)))
    down = whole[::CELL] + whole[1::CELL] + whole[2::CELL] + whole[3::CELL]
    counts: U8 = down[:, ::CELL] + down[:, 1::CELL] + down[:, 2::CELL] + down[:, 3::CELL]
    return counts


def _judged(cells: _Cells, dense: int) -> Bool:
    """The cells that are ink."""
    core = cells.core >= CELL
    found = np.zeros_like(core)
    if not core.any():
        return found
    piece, share = _shares(cells, core)
    likely = (share > _LIKELY_FLAT)[piece]
    size, flat, inner = (
        counts[core][likely].sum(dtype=np.int64) for counts in (cells.any, cells.flat, cells.inner)
    )
    found[core] = likely if size <= _BULK * dense or flat > _SURELY_FLAT * inner else (share > _SURELY_FLAT)[piece]
    # A stroke that touches tissue of its own colour is one piece with it; what is flat far and wide is the stroke.
    flat, inner = (box_sum(counts.astype(np.uint16), _REACH) for counts in (cells.flat, cells.inner))
    within = core & ~found & (flat > _SURELY_FLAT * inner)
    if within.any():
        piece, share = _shares(cells, within)
        found[within] |= (share > _SURELY_FLAT)[piece]
    # Beyond the core's sharp edge lies the rim, as flat as the core: tissue beside a stroke is not.
    rim = cells.any >= CELL * CELL // 2
    flat = rim & (cells.flat > _SURELY_FLAT * cells.inner)
    for step in range(_STEPS if found.any() else 0):
        wider = (box_sum(found.view(np.uint8), 1) > 0) & (flat if step else rim) | found
        if np.array_equal(wider, found):
            break
        found = wider
    return found


def _shares(cells: _Cells, within: Bool) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """The piece of each cell `within`, and of each piece the share that is flat; 0 of one too small to tell."""
    pieces = pieces_of(within)
    piece = labels(pieces, within.shape)[within]
    flat, inner = (np.bincount(piece, counts[within], len(pieces) + 1) for counts in (cells.flat, cells.inner))
    return piece, np.where(inner < _LEAST_PIXELS, 0, flat / np.maximum(inner, 1))
