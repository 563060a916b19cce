"""Slides side by side: what the pipeline does where one slide meets the next, and where a reader fails."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import packages
import pytest
import slides
import tifffile
from conftest import Job, crash_readers, until
from fast_slides import jpeg, picture, save_jpeg

from slideway_inference.log import Log
from slideway_inference.pipeline import SlideWork, Tally, tell_end
from slideway_inference.reader import open_slide

BATCH = 8


def many(folder: Path, name: str, seed: int, side: int = 900) -> Path:
    image = slides.tissue(slides.glass(side, side), 100 + seed, 100, side - 200, side - 200)
    return slides.save(folder / name, image, 0.5)


@pytest.fixture
def counting(job: Job) -> Job:
    changes = {"tile": {"px": 64, "mpp": 0.5}, "batch": BATCH, "outputs": ["batch", "light"]}
    job.use_model(packages.model_package(packages.BatchAndLight(), **changes))
    return job


def light(job: Job, slide_id: str, path: Path) -> None:
    """Every tile has its own slide's answer."""
    table = job.tiles(slide_id)
    assert set(table["status"]) == {"ok"}
    with open_slide(path) as slide:
        for x, y, value in zip(table["minx"], table["miny"], table["value_light"], strict=True):
            assert value == pytest.approx(slide.read_region(0, x, y, 64, 64).rgb.mean() / 255, abs=1e-3)


def test_the_last_batch_of_a_slide_is_filled_up_with_the_next_slides_tiles(counting: Job, tmp_path: Path) -> None:
    # The first takes long enough that the others are surveyed meanwhile.
    sides = (2000, 900, 900)
    paths = {f"slide-{n}": many(tmp_path, f"{n}.tiff", n * 7, side) for n, side in enumerate(sides)}
    for slide_id, path in paths.items():
        counting.add(slide_id, path)
    ended = counting.run()
    assert ended.code == 0, ended.message + ended.stderr
    sizes = []
    for slide_id, path in paths.items():
        assert counting.marker(slide_id)["slide"]["reader"] == "fast"
        light(counting, slide_id, path)
        sizes += counting.tiles(slide_id)["value_batch"]
    # Left to themselves the three slides would each end in a batch that is not full. Where the next slide is not
    # surveyed in time its predecessor's last batch does not wait for it, which a busy machine may show once.
    partial = sum(sizes.count(size) / size for size in set(sizes) - {BATCH})
    assert partial <= 2


def test_where_the_fast_reader_crashes_the_rest_is_read_from_disk(counting: Job, tmp_path: Path) -> None:
    path = many(tmp_path, "one.tiff", 0)
    counting.add("one", path)
    process = counting.run(wait=False)
    until(counting.has_read("one.tiff"))
    crash_readers(process)
    ended = counting.end(process)
    assert ended.code == 0, ended.message + ended.stderr
    assert counting.marker("one")["state"] == "INFERRED"
    assert "openslide" in counting.marker("one")["slide"]["reader"]
    light(counting, "one", path)


def test_a_slide_in_s3_is_read_as_one_on_disk(job: Job, tmp_path: Path) -> None:
    """The same picture, once as a file that the fast reader knows and once under a name that it leaves alone."""
    path = many(tmp_path, "same.tiff", 3)
    copy = tmp_path / "copy.svslide"
    copy.write_bytes(path.read_bytes())
    job.add("fast", path)
    job.add("disk", copy)
    assert job.run().code == 0
    assert job.marker("fast")["slide"]["reader"] == "fast"
    assert job.marker("disk")["slide"]["reader"].startswith("openslide")
    fast, disk = job.tiles("fast"), job.tiles("disk")
    assert (fast["minx"], fast["miny"]) == (disk["minx"], disk["miny"])
    np.testing.assert_allclose(fast["value_haematoxylin_area"], disk["value_haematoxylin_area"], atol=1e-6)


def test_a_tile_that_the_fast_reader_cannot_give_is_read_once_by_openslide(job: Job, tmp_path: Path) -> None:
    """Of one the pixels come from OpenSlide, which draws it from the level above; of the other, whose JPEG is not
    as large as its tile, they come from nobody."""
    changes = {"tile": {"px": 240, "mpp": 1.0}, "batch": BATCH, "outputs": ["batch", "light"]}
    job.use_model(packages.model_package(packages.BatchAndLight(), **changes))
    image = picture(1920, 1920)
    path = save_jpeg(tmp_path / "s.svs", image, missing={0}, downsamples=(2,), description="Aperio x|MPP = 0.5")
    with tifffile.TiffFile(path) as tiff:
        offset, size = tiff.pages[1].dataoffsets[6], tiff.pages[1].databytecounts[6]
    small = jpeg(image[:120, :120], ycbcr=False)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(small.ljust(size, b"\0"))
    job.add("one", path)
    ended = job.run()
    assert ended.code == 0, ended.message + ended.stderr
    (complete,) = ended.named("slide-complete")
    assert (complete["tilesReadAgain"], complete["tilesUnreadable"]) == (2, 1)
    assert job.marker("one")["slide"]["reader"].startswith("fast, openslide")
    table = job.tiles("one")
    assert table["status"] == ["unreadable" if index == 6 else "ok" for index in range(16)]
    with open_slide(path) as slide:
        for x, y, value in zip(table["minx"], table["miny"], table["value_light"], strict=True):
            if (x, y) != (960, 480):
                expected = slide.read_region(1, x // 2, y // 2, 240, 240).rgb.mean() / 255
                assert value == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("share", "warned"), [(0.4, []), (0.6, [0.6])])
def test_a_slide_that_is_mostly_ink_is_warned_of(share: float, warned: list[float]) -> None:
    work = SlideWork(cast(Any, None), cast(Any, SimpleNamespace(slide_id="one")), Path())
    work.survey = cast(Any, SimpleNamespace(ink_fraction=share))
    told = StringIO()
    tell_end(Log(told), Tally(), work, "INFERRED", 1.0)
    events = [json.loads(line) for line in told.getvalue().splitlines()]
    mostly = [event for event in events if event["event"] == "slide-mostly-ink"]
    assert [event["inkFraction"] for event in mostly] == warned
    assert all((event["level"], event["slideId"]) == ("warning", "one") for event in mostly)
