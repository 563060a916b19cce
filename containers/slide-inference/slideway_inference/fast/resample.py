"""Area resampling at the speed of matrix products. The same filter as resample.py in the parent package: each
output pixel is the mean of the source over exactly its own footprint. The filter's matrix is a band, so it is
applied in blocks of a few output pixels, each a small dense product that BLAS does at full speed without the
interpreter's lock; along a row, three colours at a time."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_BLOCK = 8
_ROOM = 4096


class _Band(NamedTuple):
    """Output pixels `first` … from source pixels `start` …; `weights` (outputs, inputs)."""

    first: int
    start: int
    weights: F32


class AreaResampler:
    """Resamples tiles of one size. Used by one thread: filters and intermediate pictures are kept for the next."""

    def __init__(self, px: int) -> None:
        self._px = px
        self._filters: OrderedDict[tuple[float, float, int, bool], list[_Band]] = OrderedDict()
        self._scratch: dict[str, F32] = {}

    def __call__(self, source: U8, box: tuple[float, float, float, float], out: U8) -> None:
        """Resamples `box` (x0, y0, x1, y1; source pixels, inside the source) of `source` (h, w, 3) into `out`
        (px, px, 3)."""
        x0, y0, x1, y1 = box
        height, width, _ = source.shape
        low = self._array("low", (self._px, width * 3))
        for first, start, weights in self._bands(y0, y1, height, colours=False):
            outputs, inputs = weights.shape
            fine = self._array("fine", (inputs, width * 3))
            np.copyto(fine.reshape(inputs, width, 3), source[start : start + inputs])
            np.matmul(weights, fine, out=low[first : first + outputs])
        tile = self._array("tile", (self._px, self._px * 3))
        for first, start, weights in self._bands(x0, x1, width, colours=True):
            inputs, outputs = weights.shape
            np.matmul(low[:, start : start + inputs], weights, out=tile[:, first : first + outputs])
        tile += 0.5
        np.copyto(out.reshape(self._px, self._px * 3), tile, casting="unsafe")

    def _array(self, name: str, shape: tuple[int, int]) -> F32:
        size = shape[0] * shape[1]
        held = self._scratch.get(name)
        if held is None or held.size < size:
            held = self._scratch[name] = np.empty(size, np.float32)
        return held[:size].reshape(shape)

    def _bands(self, start: float, stop: float, limit: int, *, colours: bool) -> list[_Band]:
        key = (start, stop, limit, colours)
        found = self._filters.get(key)
        if found is None:
            found = self._filters[key] = list(_bands(start, stop, self._px, limit, colours=colours))
            if len(self._filters) > _ROOM:
                self._filters.popitem(last=False)
        return found


def _bands(start: float, stop: float, px: int, limit: int, *, colours: bool) -> list[_Band]:
    edges = start + (stop - start) * np.arange(px + 1) / px
    bands = []
    for first in range(0, px, _BLOCK):
        last = min(first + _BLOCK, px)
        low = min(max(int(np.floor(edges[first] + 1e-9)), 0), limit - 1)
        high = min(max(int(np.ceil(edges[last] - 1e-9)), low + 1), limit)
        source = np.arange(low, high)
        overlap = np.minimum(source + 1, edges[first + 1 : last + 1, None]) - np.maximum(
            source, edges[first:last, None]
        )
        weights = np.clip(overlap, 0, None)
        weights[weights.sum(axis=1) <= 0, -1] = 1  # a hair outside the source: its last pixel
        weights /= weights.sum(axis=1, keepdims=True)
        if colours:
            weights = np.kron(weights.T, np.eye(3))
            bands.append(_Band(first * 3, low * 3, np.ascontiguousarray(weights, np.float32)))
        else:
            bands.append(_Band(first, low, weights.astype(np.float32)))
    return bands
