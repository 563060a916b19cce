"""Tiles lie and are resampled at exact µm per pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import slides

from slideway_inference.grid import TileGeometry, grid_axis, plan_tiles
from slideway_inference.reader import levels_of, open_slide
from slideway_inference.resample import area_resample


def plan(
    sizes: list[tuple[int, int]],
    mpp: tuple[float, float],
    px: int = 256,
    tile_mpp: float = 0.5,
    overlap: int = 0,
) -> TileGeometry:
    return plan_tiles(levels_of(sizes), mpp, px, tile_mpp, overlap, 0.02)


def test_a_level_within_tolerance_is_taken_as_it_is_and_its_own_mpp_goes_on_record() -> None:
    geometry = plan([(2220, 2967)], (0.499, 0.499))
    assert (geometry.native, geometry.level) == (True, 0)
    assert (geometry.mpp, geometry.footprint_x, geometry.stride_x) == (0.499, 256, 256)


def test_outside_the_tolerance_the_footprint_is_exact_whatever_the_magnification_is_called() -> None:
    for mpp in (0.31, 0.59, 0.489):
        geometry = plan([(20000, 20000)], (mpp, mpp))
        assert not geometry.native
        assert geometry.mpp == 0.5
        assert geometry.footprint_x == pytest.approx(256 * 0.5 / mpp, rel=1e-12)


def test_the_deepest_level_that_is_not_coarser_is_read() -> None:
    sizes = [(40000, 40000), (20000, 20000), (10000, 10000), (2500, 2500)]
    assert plan(sizes, (0.25, 0.25), tile_mpp=0.9).level == 1
    assert plan(sizes, (0.25, 0.25), tile_mpp=1.0).level == 2
    assert plan(sizes, (0.25, 0.25), tile_mpp=3.9).level == 2
    assert plan(sizes, (0.25, 0.25), tile_mpp=0.1).level == 0


def test_each_axis_has_its_own_mpp() -> None:
    geometry = plan([(20000, 20000)], (0.25, 0.4))
    assert not geometry.native
    assert (geometry.footprint_x, geometry.footprint_y) == pytest.approx((512, 320))


def test_overlap_shortens_the_stride_by_its_share_of_the_tile() -> None:
    geometry = plan([(20000, 20000)], (0.25, 0.25), overlap=64)
    assert geometry.stride_x == pytest.approx(geometry.footprint_x * 0.75)


def test_positions_come_from_the_product_and_never_drift() -> None:
    footprint = 256 * 0.5 / 0.31
    starts = grid_axis(200_000, footprint, footprint)
    assert starts.tolist() == [int(np.floor(i * footprint + 0.5)) for i in range(len(starts))]
    assert abs(starts[-1] - (len(starts) - 1) * footprint) <= 0.5


def test_only_tiles_wholly_inside_are_kept() -> None:
    assert grid_axis(1024, 256, 256).tolist() == [0, 256, 512, 768]
    assert grid_axis(1023, 256, 256).tolist() == [0, 256, 512]
    assert grid_axis(255, 256, 256).tolist() == []
    assert grid_axis(1024, 256, 128).tolist() == [0, 128, 256, 384, 512, 640, 768]


def test_each_output_pixel_is_the_mean_over_exactly_its_footprint() -> None:
    rng = np.random.default_rng(1)
    source = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    box, px = (1.3, 2.7, 38.9, 36.1), 16
    fine = np.repeat(np.repeat(source, 20, axis=0), 20, axis=1).astype(np.float64)  # 0.05 pixel
    steps_x, steps_y = (np.linspace(box[axis], box[axis + 2], px + 1) * 20 for axis in (0, 1))
    table = np.zeros((801, 801, 3))
    table[1:, 1:] = fine.cumsum(0).cumsum(1)

    def at(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        y, x = np.floor(rows).astype(int), np.floor(columns).astype(int)
        fy, fx = (rows - y)[:, None, None], (columns - x)[None, :, None]
        y1, x1 = np.minimum(y + 1, 800), np.minimum(x + 1, 800)
        top = table[np.ix_(y, x)] * (1 - fx) + table[np.ix_(y, x1)] * fx
        return top * (1 - fy) + (table[np.ix_(y1, x)] * (1 - fx) + table[np.ix_(y1, x1)] * fx) * fy

    corners = at(steps_y, steps_x)
    total = corners[1:, 1:] - corners[:-1, 1:] - corners[1:, :-1] + corners[:-1, :-1]
    expected = total / np.diff(steps_y)[:, None, None] / np.diff(steps_x)[None, :, None]
    assert np.abs(area_resample(source, box, px).astype(float) - expected).max() <= 0.51


def test_an_unscaled_box_on_whole_pixels_is_the_pixels_themselves() -> None:
    source = np.random.default_rng(2).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    assert np.array_equal(area_resample(source, (3, 5, 19, 21), 16), source[5:21, 3:19])


@pytest.mark.parametrize(("mpp", "downsamples"), [((0.31, 0.31), ()), ((0.25, 0.4), ()), ((0.2, 0.2), (2, 8))])
def test_a_ruler_of_known_period_measures_right_in_tiles(
    tmp_path: Path, mpp: tuple[float, float], downsamples: tuple[int, ...]
) -> None:
    period = 16.0  # µm
    x, y = np.meshgrid((np.arange(2200) + 0.5) * mpp[0], (np.arange(2200) + 0.5) * mpp[1])
    image = np.empty((2200, 2200, 3), np.uint8)
    image[..., 0] = 128 + 100 * np.sin(2 * np.pi * x / period)
    image[..., 1] = 128 + 100 * np.sin(2 * np.pi * y / period)
    image[..., 2] = 128
    path = slides.save(tmp_path / "ruler.tiff", image, mpp, downsamples)
    with open_slide(path) as slide:
        geometry = plan_tiles(slide.levels, mpp, 256, 0.5, 0, 0.02)
        xs = grid_axis(slide.width, geometry.footprint_x, geometry.stride_x)
        ys = grid_axis(slide.height, geometry.footprint_y, geometry.stride_y)
        positions = np.array([[xs[-1], ys[-1]], [xs[1], ys[0]]], np.int32)
        out = np.empty((2, 256, 256, 3), np.uint8)
        assert slide.read_tiles(geometry, positions, out).all()
    for tile, (left, top) in zip(out.astype(float), positions, strict=True):
        um = (np.arange(256) + 0.5) * 0.5
        across = 128 + 100 * np.sin(2 * np.pi * (left * mpp[0] + um) / period)
        down = 128 + 100 * np.sin(2 * np.pi * (top * mpp[1] + um) / period)
        assert np.abs(tile[..., 0].mean(axis=0) - across).max() < 2.5
        assert np.abs(tile[..., 1].mean(axis=1) - down).max() < 2.5


def test_an_upscaled_tile_stays_inside_the_slide(tmp_path: Path) -> None:
    image = np.random.default_rng(3).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    with open_slide(slides.save(tmp_path / "coarse.tiff", image, 1.0)) as slide:
        geometry = plan_tiles(slide.levels, (1.0, 1.0), 256, 0.25, 0, 0.02)
        out = np.empty((1, 256, 256, 3), np.uint8)
        assert slide.read_tiles(geometry, np.array([[236, 236]], np.int32), out).all()
    assert np.array_equal(out[0, ::4, ::4], image[236:, 236:])
