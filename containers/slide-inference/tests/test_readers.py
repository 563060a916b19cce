"""Readers give OpenSlide's pixels, and survive what cannot be read."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openslide
import pytest
import slides
import tifffile
from conftest import REAL_SLIDES, needs_real_slides

from slideway_inference.errors import SlideUnopenable, SlideUnreadable
from slideway_inference.grid import plan_tiles
from slideway_inference.reader import RegionUnreadable, open_slide
from slideway_inference.reader_process import ReadRequest
from slideway_inference.reading import Arena, Nursery, ReaderProcess
from slideway_inference.survey import SurveyRequest
from slideway_inference.tiff_reader import TiffReader


def damaged(path: Path, tile: int) -> Path:
    """Overwrites one compressed tile of level 0."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        offset, size = page.dataoffsets[tile], page.databytecounts[tile]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * size)
    return path


@needs_real_slides
def test_pixels_are_openslides() -> None:
    path = REAL_SLIDES / "CMU-1-Small-Region.svs"
    expected = np.asarray(openslide.OpenSlide(str(path)).read_region((700, 900), 0, (300, 200)).convert("RGB"))
    with open_slide(path) as slide:
        region = slide.read_region(0, 700, 900, 300, 200)
    assert region.scanned is None
    assert np.array_equal(region.rgb, expected)


@needs_real_slides
def test_a_dicom_slide_that_calls_ycbcr_rgb_has_the_colours_of_the_slide_it_was_made_from() -> None:
    with open_slide(REAL_SLIDES / "cmu-1-dicom/level-0-frames-0-30.dcm") as slide:
        copy = slide.read_region(0, 700, 900, 500, 500).rgb.astype(int)
        assert slide.name.endswith("(YCbCr)")
    with open_slide(REAL_SLIDES / "CMU-1-Small-Region.svs") as slide:
        original = slide.read_region(0, 700, 900, 500, 500).rgb.astype(int)
    assert np.abs(copy.mean((0, 1)) - original.mean((0, 1))).max() < 3


@needs_real_slides
def test_an_ome_tiff_that_openslide_does_not_know_is_read_in_its_true_colours() -> None:
    with open_slide(REAL_SLIDES / "OS-1-detail.ome.tif") as slide:
        assert slide.name == "tiff"
        assert slide.mpp == pytest.approx((0.2271, 0.2271), abs=1e-4)
        red, green, blue = slide.read_region(0, 0, 0, 1101, 1101).rgb.mean((0, 1))
    assert red > green + 20
    assert blue > green + 20


@pytest.mark.parametrize("compression", ["zlib", None])
@pytest.mark.parametrize("tile", [(64, 64), None])
def test_plain_tiffs_are_read_tile_by_tile_or_strip_by_strip(
    tmp_path: Path, compression: str | None, tile: tuple[int, int] | None
) -> None:
    image = np.random.default_rng(1).integers(0, 256, (150, 170, 3), dtype=np.uint8)
    path = tmp_path / "plain.tif"
    tifffile.imwrite(
        path, image, photometric="rgb", compression=compression, tile=tile, rowsperstrip=None if tile else 32
    )
    with TiffReader(path) as slide:
        assert np.array_equal(slide.read_region(0, 30, 20, 130, 120).rgb, image[20:140, 30:160])


def test_a_plain_tiffs_tile_with_a_flipped_bit_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "plain.tif"
    image = np.random.default_rng(1).normal(150, 8, (128, 128, 3)).astype(np.uint8)
    tifffile.imwrite(path, image, photometric="rgb", compression="zlib", tile=(64, 64))
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages[0].dataoffsets[1] + tiff.pages[0].databytecounts[1] // 2
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    with TiffReader(path) as slide:
        assert np.array_equal(slide.read_region(0, 0, 0, 64, 64).rgb, image[:64, :64])
        with pytest.raises(RegionUnreadable):
            slide.read_region(0, 64, 0, 64, 64)


def test_what_is_no_slide_is_unopenable(tmp_path: Path) -> None:
    path = tmp_path / "notes.svs"
    path.write_bytes(b"not a slide " * 100)
    with pytest.raises(SlideUnopenable):
        open_slide(path)


def test_after_a_damaged_tile_the_reader_goes_on(tmp_path: Path) -> None:
    image = slides.tissue(slides.glass(1024, 512), 0, 0, 1024, 512)
    path = damaged(slides.save(tmp_path / "s.tiff", image, 0.5), tile=1)
    with open_slide(path) as slide:
        geometry = plan_tiles(slide.levels, (0.5, 0.5), 256, 0.5, 0, 0.02)
        out = np.empty((3, 256, 256, 3), np.uint8)
        readable = slide.read_tiles(geometry, np.array([[0, 0], [256, 0], [512, 0]], np.int32), out)
        assert readable.tolist() == [True, False, True]
        assert np.array_equal(out[2], image[:256, 512:768])
        with pytest.raises(RegionUnreadable):
            slide.read_region(0, 200, 0, 100, 100)
        overview = slide.overview(64, 32)
    assert overview.unreadable.any()
    assert overview.unreadable.mean() < 0.3


@pytest.fixture(params=[True, False], ids=["forked", "by itself"])
def nursery(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    monkeypatch.setattr(Nursery, "forks", request.param)
    nursery = Nursery()
    yield nursery
    nursery.close()


def test_a_reader_process_that_crashes_costs_one_slide(tmp_path: Path, nursery: Nursery) -> None:
    image = slides.tissue(slides.glass(600, 600), 0, 0, 600, 600)
    path = slides.save(tmp_path / "s.tiff", image, 0.5)
    arena = Arena(1, 2 * 256 * 256 * 3, tmp_path)
    reader = ReaderProcess(arena, nursery, threading.Event())
    request = SurveyRequest(path, "sum", None, None, 256, 0.5, 0, 0.02, 0.5)
    survey = reader.survey(request)
    assert reader.pid is not None
    os.kill(reader.pid, signal.SIGSEGV)
    with pytest.raises(SlideUnreadable, match="SIGSEGV"):
        reader.survey(request)
    read = ReadRequest(path, survey.geometry, survey.positions[:2], 0)
    assert reader.read(read).tolist() == [True, True]
    assert np.array_equal(arena.tiles(0, 2, 256)[1], image[:256, 256:512])
    reader.close()
    arena.close()


def test_a_nursery_that_is_ended_takes_no_reader_with_it_and_is_replaced(tmp_path: Path, nursery: Nursery) -> None:
    image = slides.tissue(slides.glass(600, 600), 0, 0, 600, 600)
    path = slides.save(tmp_path / "s.tiff", image, 0.5)
    arena = Arena(1, 16, tmp_path)
    first, second = (ReaderProcess(arena, nursery, threading.Event()) for _ in range(2))
    request = SurveyRequest(path, "sum", None, None, 256, 0.5, 0, 0.02, 0.5)
    expected = first.survey(request).positions.tolist()
    if nursery._process is not None:
        nursery._process.kill()
        nursery._process.wait()
    assert first.survey(request).positions.tolist() == expected
    assert second.survey(request).positions.tolist() == expected
    pids = [first.pid, second.pid]
    first.close()
    second.close()
    nursery.close()
    for pid in pids:
        assert pid is not None
        assert ended(pid)
    arena.close()


def ended(pid: int) -> bool:
    """Within 10 s; one whose nursery was ended before it ends by itself, when its connection does."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_a_readers_messages_hold_no_paths(tmp_path: Path, nursery: Nursery) -> None:
    path = tmp_path / "Mustermann_Max.svs"
    path.write_bytes(b"\0" * 100)
    arena = Arena(1, 16, tmp_path)
    reader = ReaderProcess(arena, nursery, threading.Event())
    with pytest.raises(SlideUnopenable) as error:
        reader.survey(SurveyRequest(path, "sum", 0.5, "manifest", 256, 0.5, 0, 0.02, 0.5))
    assert "Mustermann" not in str(error.value)
    reader.close()
    arena.close()


@needs_real_slides
def test_only_what_is_called_a_tiff_is_read_as_one(tmp_path: Path) -> None:
    """The first page of a VSI is its label."""
    path = tmp_path / "slide.vsi"
    path.write_bytes((REAL_SLIDES / "OS-1-detail.ome.tif").read_bytes())
    with pytest.raises(SlideUnopenable):
        open_slide(path)
