"""What the colours of an overview say: how saturated a pixel is, and how dense against the slide's own glass. It is
worked out a band of rows at a time, as many as a processor's cache holds, so that a large overview is never copied
in floats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
T = TypeVar("T", bound=np.generic)

CELL = 4
"""A band's rows are a multiple of this, but for the last."""
_BAND_PIXELS = 1 << 17
_GLASS = (215.0, 255.0)
"""Bounds of what unstained glass can measure; scanners differ in their white."""


def bands(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of an array, some at a time."""
    step = max(CELL, _BAND_PIXELS // shape[1] // CELL * CELL)
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def apart(rgb: U8) -> tuple[U8, U8, U8]:
    """Red, green and blue by themselves: sums over the last axis of three are slow."""
    red, green, blue = (np.ascontiguousarray(rgb[..., colour]) for colour in range(3))
    return red, green, blue


def highest(red: npt.NDArray[T], green: npt.NDArray[T], blue: npt.NDArray[T]) -> npt.NDArray[T]:
    found: npt.NDArray[T] = np.maximum(np.maximum(red, green), blue)
    return found


def lowest(red: npt.NDArray[T], green: npt.NDArray[T], blue: npt.NDArray[T]) -> npt.NDArray[T]:
    found: npt.NDArray[T] = np.minimum(np.minimum(red, green), blue)
    return found


def saturation(high: U8, low: U8) -> F32:
    """0 for grey, 1 for a pure colour."""
    found: F32 = np.divide(high - low, np.maximum(high, 1), dtype=np.float32)
    return found


class Glass:
    """The glass of a slide, from which densities are measured: a table of the 256 logarithms there are for each
    colour. `scanned` pixels count, one at least."""

    def __init__(self, rgb: U8, scanned: Bool) -> None:
        counts = np.zeros((3, 256), np.int64)
        for rows in bands(scanned.shape):
            counted = scanned[rows]
            for colour, values in enumerate(apart(rgb[rows])):
                counts[colour] += np.bincount(values[counted], minlength=256)
        self._tables = [_densities(colour) for colour in counts]

    def density(self, red: U8, green: U8, blue: U8) -> F32:
        """The mean optical density of the three colours."""
        total = self._tables[0].take(red)
        total += self._tables[1].take(green)
        total += self._tables[2].take(blue)
        total /= 3
        return total


def _densities(counts: npt.NDArray[np.int64]) -> F32:
    """The optical density of each of a colour's 256 values, against the glass of these pixels."""
    glass = np.float32(np.clip(_percentile(counts, 98), *_GLASS))
    light = np.maximum(np.arange(256, dtype=np.float32), 1) / glass
    return np.clip(-np.log10(light), 0, None)


def _percentile(counts: npt.NDArray[np.int64], share: float) -> float:
    """numpy's percentile, from the counts of 256 values."""
    ends = counts.cumsum()
    last = int(ends[-1]) - 1
    at = share / 100 * last
    below, above = np.searchsorted(ends, [int(at), min(int(at) + 1, last)], side="right")
    return float(below + (above - below) * (at - int(at)))


def box_sum(counts: npt.NDArray[T], radius: int) -> npt.NDArray[T]:
    """The sums (height, width) in a square window, which must fit the counts' type; beyond the edge the edge
    repeats."""
    padded = np.pad(counts, radius, mode="edge")
    height, width = counts.shape
    down = padded[:height].copy()
    for i in range(1, 2 * radius + 1):
        np.add(down, padded[i : i + height], out=down)
    across = down[:, :width].copy()
    for i in range(1, 2 * radius + 1):
        np.add(across, down[:, i : i + width], out=across)
    return across
