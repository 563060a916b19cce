"""Tissue is found; glass, ink and specks are not tissue."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import slides
from conftest import REAL_SLIDES, needs_real_slides

from slideway_inference.outline import fill, pieces_of, smooth
from slideway_inference.reader import Overview, open_slide
from slideway_inference.survey import Survey, SurveyRequest, survey
from slideway_inference.tissue import Tissue, find_tissue, tissue_geojson


def overview(rgb: slides.U8, scanned: np.ndarray | None = None, unreadable: np.ndarray | None = None) -> Overview:
    shape = rgb.shape[:2]
    return Overview(
        rgb,
        np.ones(shape, np.bool_) if scanned is None else scanned,
        np.zeros(shape, np.bool_) if unreadable is None else unreadable,
    )


def tissue_of(rgb: slides.U8, **marks: np.ndarray) -> Tissue:
    """At 8 µm a pixel, each 16 level-0 pixels of 0.5 µm."""
    return find_tissue(overview(rgb, **marks), (rgb.shape[1] * 16, rgb.shape[0] * 16), (0.5, 0.5))


def surveyed(path: Path, mpp: float | None = None) -> Survey:
    request = SurveyRequest(path, "sum", mpp, "manifest" if mpp else None, 256, 0.5, 0, 0.02, 0.5)
    with open_slide(path) as slide:
        return survey(slide, request)


def test_a_block_of_tissue_is_outlined_where_it_lies() -> None:
    found = tissue_of(slides.tissue(slides.glass(300, 200), 80, 50, 100, 90))
    assert found.area_mm2 == pytest.approx(100 * 90 * 64e-6, rel=0.05)
    ys, xs = np.nonzero(found.mask)
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == pytest.approx((80, 179, 50, 139), abs=1)


def test_glass_alone_is_no_tissue() -> None:
    assert not tissue_of(slides.glass(300, 200)).mask.any()
    assert not tissue_of(np.full((200, 300, 3), 255, np.uint8)).mask.any()
    assert not tissue_of(np.full((200, 300, 3), 225, np.uint8)).mask.any()


@pytest.mark.parametrize("colour", slides.INKS)
def test_pen_marks_do_not_count(colour: str) -> None:
    image = slides.pen(slides.glass(300, 200), colour, 20, 20, 200, 40)
    assert tissue_of(image).area_mm2 < 0.01
    both = tissue_of(slides.tissue(image, 100, 90, 100, 90))
    assert both.area_mm2 == pytest.approx(100 * 90 * 64e-6, rel=0.05)


def test_what_was_not_scanned_is_background() -> None:
    image = slides.tissue(slides.glass(200, 200), 0, 0, 200, 200)
    scanned = np.zeros((200, 200), np.bool_)
    scanned[:100] = True
    assert tissue_of(image, scanned=scanned).area_mm2 == pytest.approx(100 * 200 * 64e-6, rel=0.05)
    assert not tissue_of(image, scanned=np.zeros_like(scanned)).mask.any()


def test_specks_go_and_small_holes_close() -> None:
    image = slides.tissue(slides.glass(300, 200), 80, 50, 100, 90)
    image[100:108, 120:128] = slides.GLASS
    image[70:90, 100:120] = slides.GLASS
    image[10:14, 10:14] = slides.PURPLE
    found = tissue_of(image)
    assert len(found.pieces) == 1
    assert [hole.area for hole in found.pieces[0].holes] == [pytest.approx(400, rel=0.05)]


def test_the_fraction_of_a_tile_is_exact_over_its_footprint() -> None:
    mask = np.zeros((10, 10), np.bool_)
    mask[:, 5:] = True
    found = Tissue(mask, np.zeros_like(mask), 16.0, 16.0, 0.0, ())
    fractions = found.fractions(np.array([0, 72, 80]), np.array([0, 3]), (16.5, 40.25))
    assert fractions.tolist() == [pytest.approx([0, 8.5 / 16.5, 1], abs=1e-6)] * 2


def test_what_cannot_be_read_is_tried_as_tile_but_is_not_counted_as_tissue() -> None:
    unreadable = np.zeros((100, 100), np.bool_)
    unreadable[:20, :20] = True
    found = tissue_of(slides.glass(100, 100), unreadable=unreadable, scanned=~unreadable)
    assert found.area_mm2 == 0
    assert found.fractions(np.array([0, 512]), np.array([0]), (256.0, 256.0)).tolist() == [[1, 0]]


def test_outlines_fill_to_the_very_mask_they_came_from() -> None:
    rng = np.random.default_rng(5)
    for density in (0.1, 0.5, 0.6, 0.9):
        mask = rng.random((40, 50)) < density
        pieces = pieces_of(mask)
        assert np.array_equal(fill(pieces, mask.shape), mask)
        assert sum(piece.area for piece in pieces) == mask.sum()
    assert pieces_of(np.zeros((5, 5), np.bool_)) == []


def test_an_island_in_a_hole_is_a_piece_of_its_own() -> None:
    mask = np.zeros((20, 20), np.bool_)
    mask[1:19, 1:19] = True
    mask[3:17, 3:17] = False
    mask[6:14, 6:14] = True
    mask[8:10, 8:10] = mask[11:13, 8:10] = False
    outer, inner = pieces_of(mask)
    assert (outer.area, [hole.area for hole in outer.holes]) == (18 * 18 - 14 * 14, [14 * 14])
    assert (inner.area, [hole.area for hole in inner.holes]) == (64 - 8, [4, 4])


def test_simplified_outlines_do_not_cross_themselves() -> None:
    rng = np.random.default_rng(6)
    mask = rng.random((30, 30)) < 0.6
    for piece in pieces_of(mask):
        rings = [smooth(loop) for loop in (piece.outer, *piece.holes)]
        segments = [(ring[i], ring[(i + 1) % len(ring)]) for ring in rings for i in range(len(ring))]
        for (a, b), (c, d) in combinations(segments, 2):
            if np.minimum(a, b)[0] > np.maximum(c, d)[0] or np.minimum(c, d)[0] > np.maximum(a, b)[0]:
                continue
            assert not (_side(a, b, c) * _side(a, b, d) < 0 and _side(c, d, a) * _side(c, d, b) < 0)


def _side(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    return float((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


def test_geojson_is_what_qupath_reads_and_the_same_every_time() -> None:
    image = slides.tissue(slides.glass(300, 200), 80, 50, 100, 90)
    image[70:90, 100:120] = slides.GLASS
    found = tissue_of(image)
    text = tissue_geojson(found, (0.5, 0.5), "sum")
    assert text == tissue_geojson(found, (0.5, 0.5), "sum")
    (feature,) = json.loads(text)["features"]
    assert feature["geometry"]["type"] == "Polygon"
    outer, hole = feature["geometry"]["coordinates"]
    assert outer[0] == outer[-1]
    assert np.array(outer).min(axis=0) == pytest.approx((80 * 16, 50 * 16), abs=20)
    assert np.array(outer).max(axis=0) == pytest.approx((180 * 16, 140 * 16), abs=20)
    assert len(hole) >= 5
    properties = feature["properties"]
    assert (properties["objectType"], properties["classification"]["name"]) == ("annotation", "Tissue")
    assert properties["measurements"]["Area mm^2"] == pytest.approx(found.area_mm2, abs=1e-5)


def test_a_slide_without_small_levels_is_surveyed_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = slides.tissue(slides.glass(2000, 1500), 400, 300, 900, 800)
    path = slides.save(tmp_path / "s.tiff", image, 0.5)
    whole = surveyed(path)
    monkeypatch.setattr("slideway_inference.reader._BLOCK_PIXELS", 100_000)
    assert surveyed(path).positions.tolist() == whole.positions.tolist()
    assert whole.tissue_mm2 == pytest.approx(900 * 800 * 0.25e-6, rel=0.06)


@needs_real_slides
@pytest.mark.parametrize(
    ("name", "mpp", "area"),
    [
        ("CMU-1-Small-Region.svs", None, (0.60, 0.70)),
        ("TCGA-CR-7395-01A-01-TS1.svs", 0.25, (0.60, 0.68)),
        ("OS-1-detail.ome.tif", None, (0.060, 0.063)),
        ("cmu-1-dicom/level-0-frames-0-30.dcm", None, (0.57, 0.67)),
    ],
)
def test_tissue_of_real_slides_is_what_was_seen(name: str, mpp: float | None, area: tuple[float, float]) -> None:
    assert area[0] < surveyed(REAL_SLIDES / name, mpp).tissue_mm2 < area[1]
