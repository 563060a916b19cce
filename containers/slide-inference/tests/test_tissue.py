"""Tissue is found; glass, ink and specks are not tissue."""

from __future__ import annotations

import json
import tracemalloc
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import slides
from conftest import REAL_SLIDES, needs_real_slides

from slideway_inference.grid import Level
from slideway_inference.outline import fill, labels, pieces_of, smooth
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


STAINS = {
    "aniline blue": (1.7, 1.0, 0.3),
    "Alcian blue": (3.0, 1.1, 0.4),
    "light green": (1.5, 0.56, 0.94),
    "Sirius red": (0.3, 1.45, 1.25),
    "Giemsa": (1.43, 1.18, 0.39),
    "silver": (2.0, 2.0, 1.97),
}


def grained(colour: tuple[int, int, int], grain: float, noise: float = 1.0) -> tuple[slides.U8, np.ndarray]:
    """A disc of tissue of one colour on glass, and where it is."""
    rng = np.random.default_rng(4)
    ys, xs = np.mgrid[:300, :400]
    where = (ys - 150) ** 2 + (xs - 200) ** 2 < 90**2
    image = rng.normal(slides.GLASS, noise, (300, 400, 3))
    image[where] = np.array(colour) + rng.normal(0, grain, (int(where.sum()), 1))
    return np.clip(image, 0, 255).astype(np.uint8), where


@pytest.mark.parametrize(
    "colour",
    [
        (70, 110, 190),
        (50, 150, 190),
        (110, 170, 150),
        (190, 30, 60),
        (205, 40, 45),
        (80, 100, 180),
        (60, 55, 55),
        (50, 35, 28),
        (232, 222, 230),
    ],
    ids=["aniline blue", "Alcian blue", "light green", "Sirius red", "AEC", "Giemsa", "silver", "DAB", "very pale"],
)
def test_tissue_of_any_stain_is_tissue(colour: tuple[int, int, int]) -> None:
    image, where = grained(colour, grain=3 if min(colour) > 200 else 10)
    found = tissue_of(image)
    assert found.mask[where].mean() > 0.95
    assert found.mask[~where].mean() < 0.01
    assert found.ink_fraction < 0.05


@needs_real_slides
@pytest.mark.parametrize("stain", STAINS)
@pytest.mark.parametrize(
    ("name", "size"), [("CMU-1-Small-Region.svs", (138, 185)), ("TCGA-CR-7395-01A-01-TS1.svs", (139, 111))]
)
def test_the_same_tissue_is_found_whatever_it_is_stained_with(name: str, size: tuple[int, int], stain: str) -> None:
    with open_slide(REAL_SLIDES / name) as slide:
        image = slide.overview(*size).rgb
    as_it_is = tissue_of(image).mask
    assert tissue_of(slides.stained(image, STAINS[stain])).mask[as_it_is].mean() > 0.9


@needs_real_slides
@pytest.mark.parametrize("colour", slides.INKS)
def test_a_stroke_over_tissue_and_beside_it_does_not_count(colour: str) -> None:
    with open_slide(REAL_SLIDES / "CMU-1-Small-Region.svs") as slide:
        tissue = slide.overview(138, 185).rgb
    image = slides.glass(500, 300)
    image[60:245, 60:198] = tissue
    alone = tissue_of(image).mask
    inked = tissue_of(slides.pen(slides.pen(image.copy(), colour, 20, 120, 460, 40), colour, 300, 20, 150, 40))
    assert inked.mask[:, 210:].mean() < 0.002
    assert inked.mask[125:155].mean() < 0.01
    rest = alone.copy()
    rest[95:185] = False
    assert inked.mask[rest].mean() > 0.95
    assert 0.4 < inked.ink_fraction < 0.9


def test_a_stroke_that_touches_tissue_of_its_own_colour_leaves_the_tissue() -> None:
    image, where = grained((50, 90, 200), grain=12)
    found = tissue_of(slides.pen(image, "blue", 20, 5, 360, 70))
    assert found.mask[where & (np.arange(300) > 110)[:, None]].mean() > 0.95
    assert found.mask[15:55, 20:380].mean() < 0.1


def test_glass_with_a_tint_shadows_or_dust_is_no_tissue() -> None:
    rng = np.random.default_rng(5)
    glass = rng.normal(slides.GLASS, 2, (300, 400, 3))
    ys, xs = np.mgrid[:300, :400]
    corners = 1 - 0.1 * (((xs - 200) / 400) ** 2 + ((ys - 150) / 300) ** 2)
    for factor in (corners[..., None], np.array((1, 0.96, 0.9)), (1 - 0.02 * (xs // 50 % 2))[..., None]):
        assert not tissue_of(np.clip(glass * factor, 0, 255).astype(np.uint8)).mask.any()
    for _ in range(40):
        y, x = rng.integers(10, 290), rng.integers(10, 390)
        glass[y - 2 : y + 2, x - 2 : x + 2] *= 0.6
    assert not tissue_of(np.clip(glass, 0, 255).astype(np.uint8)).mask.any()


def test_a_black_border_is_no_tissue() -> None:
    image = slides.tissue(slides.glass(300, 200), 80, 50, 100, 90)
    image[:20] = image[:, :20] = 0
    assert tissue_of(image).area_mm2 == pytest.approx(100 * 90 * 64e-6, rel=0.05)


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
        numbers = labels(pieces, mask.shape)
        assert np.array_equal(numbers > 0, mask)
        assert np.bincount(numbers[mask])[1:].tolist() == [piece.area for piece in pieces]
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


@pytest.mark.parametrize(
    ("side", "mpp", "pixels"), [(100_000, 0.25, 3125), (100_000, 0.5, 6250), (200_000, 0.5, round(40**0.5 * 1024))]
)
def test_large_slides_are_surveyed_at_8_um_up_to_50_mm(side: int, mpp: float, pixels: int) -> None:
    asked: list[tuple[int, int]] = []

    class Large:
        name = vendor = "none"
        levels = (Level(side, side, 1.0, 1.0),)
        mpp = None

        def overview(self, width: int, height: int) -> Overview:
            asked.append((width, height))
            return overview(slides.glass(200, 200))

    survey(Large(), SurveyRequest(Path(), "sum", mpp, "manifest", 256, 0.5, 0, 0.02, 0.5))
    assert asked[0] == (pixels, pixels)


def test_finding_tissue_takes_few_bytes_a_pixel() -> None:
    image = np.tile(slides.tissue(slides.glass(400, 400), 50, 50, 250, 200), (4, 6, 1))
    looked_at = overview(image)
    tracemalloc.start()
    found = find_tissue(looked_at, (image.shape[1] * 16, image.shape[0] * 16), (0.5, 0.5))
    found.fractions(np.arange(0, 38_000, 512), np.arange(0, 25_000, 512), (512.0, 512.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.area_mm2 == pytest.approx(24 * 250 * 200 * 64e-6, rel=0.05)
    assert peak / found.mask.size < 7


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
