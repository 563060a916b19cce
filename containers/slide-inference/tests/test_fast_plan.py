"""A plan of a slide's tiles stays small: a slide can have a million."""

from __future__ import annotations

import tracemalloc

import numpy as np

from slideway_inference.fast.codecs import Jpeg
from slideway_inference.fast.pyramid import NativeLevel
from slideway_inference.fast.reader import _Plan
from slideway_inference.grid import Level, plan_tiles


def test_a_plan_takes_less_than_a_hundred_bytes_a_tile() -> None:
    side, tiles = 60_000, -(-60_000 // 256)
    offsets = np.zeros(tiles * tiles, np.int64)
    native = NativeLevel(side, side, 256, 256, Jpeg("ycbcr"), offsets, offsets, ())
    level = Level(side, side, 1, 1)
    geometry = plan_tiles([level], (0.31, 0.31), 256, 0.5, 0, 0.02)
    at = np.arange(0, side - geometry.footprint_x, geometry.stride_x)
    positions = np.stack(np.meshgrid(at, at), axis=-1).reshape(-1, 2).astype(np.int32)
    tracemalloc.start()
    plan = _Plan(native, level, geometry, positions)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / len(positions) < 100
    places = plan.places(np.array([1]))
    assert places.low == [[int(at[1]), 0]]
    assert (places.first, places.last, places.copied, places.whole) == ([[1, 0]], [[3, 1]], [False], [False])
