"""The demo's slides: what OpenSlide and the tiler need to find in them, and that a seed is reproducible."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import openslide
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

import make_slides

SIZE = (1300, 1100)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A small slide of each kind of tissue, at 2 µm/px so that it holds whole islands."""
    folder = tmp_path_factory.mktemp("slides")
    paths = [folder / f"{seed}.tiff" for seed in range(3)]
    for seed, path in enumerate(paths):
        make_slides.make_slide(path, seed, SIZE, 2.0)
    return paths


def haematoxylin_share(path: Path) -> float:
    """Share of pixels that are bluish and dark: nuclei, roughly, the pen's corner left out."""
    with openslide.OpenSlide(str(path)) as slide:
        rgb = np.asarray(slide.read_region((0, 200), 0, (SIZE[0], SIZE[1] - 200)).convert("RGB"), np.int32)
    return float(((rgb[..., 0] < 150) & (rgb[..., 2] > rgb[..., 0])).mean())


def test_openslide_reads_a_pyramid_with_its_resolution(slides: list[Path]) -> None:
    with openslide.OpenSlide(str(slides[0])) as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert slide.level_dimensions == ((1300, 1100), (325, 275), (82, 69))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(2.0, rel=1e-4)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(2.0, rel=1e-4)


def test_levels_show_the_same_picture(slides: list[Path]) -> None:
    with openslide.OpenSlide(str(slides[1])) as slide:
        full = slide.read_region((0, 0), 0, SIZE).convert("RGB").reduce(4)
        level = slide.read_region((0, 0), 1, slide.level_dimensions[1]).convert("RGB")
    difference = np.abs(np.asarray(full, np.float32) - np.asarray(level, np.float32))
    assert difference.mean() < 5


def test_a_slide_has_glass_and_tissue(slides: list[Path]) -> None:
    for path in slides:
        with openslide.OpenSlide(str(path)) as slide:
            rgb = np.asarray(slide.get_thumbnail((400, 400)).convert("RGB"), np.int32)
        glass = (rgb.min(axis=-1) > 225).mean()
        pink = (rgb[..., 0] - rgb[..., 1] > 25).mean()
        assert 0.2 < glass < 0.9
        assert 0.05 < pink < 0.7


def test_slides_differ_in_nuclei(slides: list[Path]) -> None:
    crowded, quiet, _ = (haematoxylin_share(path) for path in slides)
    assert crowded > 1.5 * quiet


def test_the_same_seed_draws_the_same_bytes(slides: list[Path], tmp_path: Path) -> None:
    again = tmp_path / "again.tiff"
    make_slides.make_slide(again, 2, SIZE, 2.0)
    assert again.read_bytes() == slides[2].read_bytes()


def test_a_failed_drawing_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(make_slides.Painter, "block", fail)
    with pytest.raises(OSError, match="disk full"):
        make_slides.make_slide(tmp_path / "slide.tiff", 0, SIZE, 2.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["8192", "8192x", "ax5", "100x100"])
def test_a_wrong_size_is_named(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_slides.main(["--size", size, "--out", str(tmp_path / "slide.tiff")])
    assert "--size" in capsys.readouterr().err
