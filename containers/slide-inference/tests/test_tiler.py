"""The tiler: the same tiles as a straightforward OpenSlide program makes, in packs that other tools read."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openslide
import pytest
import slides
from conftest import REAL_SLIDES, Ended, Job, crash_readers, needs_real_slides, until
from fast_slides import picture, save_jpeg
from PIL import Image
from skimage.filters import threshold_otsu
from test_readers import damaged
from tilesets import Made, made, put, shard_fields, tile, told

from slideway_inference.reader import open_slide
from slideway_inference.survey import SurveyRequest, survey

U8 = npt.NDArray[np.uint8]


# --- a straightforward tiler -------------------------------------------------------------------------------------


def plain_tiles(path: Path, mpp: float, px: int, tile_mpp: float) -> dict[tuple[int, int], U8]:
    """All tiles of the grid, each by one read_region at level 0, the plain way: cut and shrunk by the box filter of
    Pillow, which is exact where footprints are whole pixels."""
    footprint = px * tile_mpp / mpp
    if abs(tile_mpp / mpp - 1) <= 0.02:
        footprint = float(px)
    found = {}
    with openslide.OpenSlide(str(path)) as slide:
        width, height = slide.dimensions
        for row in range(int(height / footprint)):
            for column in range(int(width / footprint)):
                x, y = int(column * footprint + 0.5), int(row * footprint + 0.5)
                side = round(footprint)
                image = slide.read_region((x, y), 0, (side, side)).convert("RGB")
                found[x, y] = np.asarray(image.resize((px, px), Image.Resampling.BOX))
    return found


def plain_tissue(path: Path, at: tuple[int, int], side: int) -> float:
    """The share of a drawn tile that is no glass."""
    with openslide.OpenSlide(str(path)) as slide:
        rgb = np.asarray(slide.read_region(at, 0, (side, side)).convert("RGB")).astype(int)
    return float((rgb.max(axis=2) - rgb.min(axis=2) > 30).mean())


def drawn(folder: Path, name: str = "drawn.tiff", mpp: float = 0.5, seed: int = 0) -> Path:
    """Tissue whose edges lie within tiles: some more than half, some less."""
    image = slides.tissue(slides.glass(1700, 1300), 150 + seed, 90, 1000, 900)
    return slides.save(folder / name, image, mpp)


# --- tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mpp", "tile_mpp"), [(0.5, 0.5), (0.25, 0.5)])
def test_the_same_tiles_as_a_plain_openslide_program_keeps(
    job: Job, tmp_path: Path, mpp: float, tile_mpp: float
) -> None:
    path = drawn(tmp_path, mpp=mpp)
    job.add("one", path)
    ended = tile(job, **shard_fields(mpp=tile_mpp, format="png"))
    assert ended.code == 0, ended.message + ended.stderr
    pixels = made(job, "one").pixels()
    plain = plain_tiles(path, mpp, 256, tile_mpp)
    footprint = round(256 * tile_mpp / mpp)
    shares = {at: plain_tissue(path, at, footprint) for at in plain}
    # At the µm of the tissue search an edge can fall a pixel further.
    sure = {at for at, share in shares.items() if share >= 0.55}
    never = {at for at, share in shares.items() if share < 0.45}
    assert sure <= set(pixels) <= set(plain) - never
    assert sure
    assert never
    for at, tile_pixels in pixels.items():
        difference = np.abs(tile_pixels.astype(int) - plain[at])
        assert difference.max() <= (0 if mpp == tile_mpp else 1)


def test_jpeg_stays_close_to_the_slide_and_raw_is_the_slide(job: Job, tmp_path: Path) -> None:
    path = drawn(tmp_path)
    job.add("one", path)
    plain = plain_tiles(path, 0.5, 256, 0.5)
    for form, suffix, worst in (("jpeg", "jpg", 8.0), ("raw", "npy", 0.0)):
        assert tile(job, **shard_fields(format=form)).code == 0
        tileset = made(job, "one")
        assert {name.rsplit(".")[1] for name in tileset.members()} == {suffix}
        for at, pixels in tileset.pixels().items():
            assert np.abs(pixels.astype(int) - plain[at]).mean() <= worst


@needs_real_slides
def test_background_of_a_real_slide_is_what_a_plain_program_takes_for_it(job: Job) -> None:
    """Saturation against Otsu's threshold on the slide at about 8 µm and nothing else: where that is sure of a
    tile, the tiler agrees."""
    path = REAL_SLIDES / "CMU-1-Small-Region.svs"
    job.add("cmu", path)
    assert tile(job, **shard_fields(px=64, mpp=0.499, format="raw", packBytes=4_000_000)).code == 0
    kept = set(made(job, "cmu").pixels(64))
    with openslide.OpenSlide(str(path)) as slide:
        whole = slide.read_region((0, 0), 0, slide.dimensions).convert("HSV")
    saturation = np.asarray(whole.reduce(16))[..., 1]
    coloured = saturation > threshold_otsu(saturation)
    shares = {
        (x, y): coloured[y // 16 : y // 16 + 4, x // 16 : x // 16 + 4].mean()
        for y in range(0, whole.height - 63, 64)
        for x in range(0, whole.width - 63, 64)
    }
    sure = [at for at, share in shares.items() if share == 1]
    never = [at for at, share in shares.items() if share == 0]
    assert min(len(sure), len(never)) > 50
    assert np.mean([at in kept for at in sure]) > 0.99
    assert np.mean([at in kept for at in never]) < 0.1


@needs_real_slides
@pytest.mark.parametrize(("px", "mpp", "worst", "mean"), [(224, 0.7, 1, 0.01), (256, 1.0, 255, 4.0)])
def test_resampled_tiles_of_a_real_slide_are_those_of_openslide_and_an_area_filter(
    job: Job, px: int, mpp: float, worst: int, mean: float
) -> None:
    """To a grey level; where JPEG is decoded at half its size, which is a filter of its own, on average."""
    path = REAL_SLIDES / "CMU-1-Small-Region.svs"
    job.add("cmu", path)
    assert tile(job, **shard_fields(px=px, mpp=mpp, format="png")).code == 0
    with open_slide(path) as slide:
        wanted = survey(slide, SurveyRequest(path, "", None, None, px, mpp, 0, 0.02, 0.5))
        out = np.empty((len(wanted.positions), px, px, 3), np.uint8)
        assert slide.read_tiles(wanted.geometry, wanted.positions, out).all()
    pixels = made(job, "cmu").pixels(px)
    assert list(pixels) == [(x, y) for x, y in wanted.positions.tolist()]
    assert len(pixels) > 5
    difference = np.abs(out.astype(int) - np.stack(list(pixels.values())))
    assert difference.max() <= worst
    assert difference.mean() <= mean


@needs_real_slides
def test_real_slides_give_openslides_pixels_and_the_surveys_tiles(job: Job) -> None:
    path = REAL_SLIDES / "CMU-1-Small-Region.svs"
    job.add("cmu", path)
    job.add("dicom", REAL_SLIDES / "cmu-1-dicom")
    job.add("ome", REAL_SLIDES / "OS-1-detail.ome.tif")
    assert tile(job, **shard_fields(format="png")).code == 0
    tileset = made(job, "cmu")
    with open_slide(path) as slide:
        wanted = survey(slide, SurveyRequest(path, "", None, None, 256, 0.5, 0, 0.02, 0.5))
    assert set(tileset.pixels()) == {(x, y) for x, y in wanted.positions.tolist()}
    plain = plain_tiles(path, 0.499, 256, 0.5)
    for at, pixels in tileset.pixels().items():
        assert np.array_equal(pixels, plain[at])
    assert tileset.document["slide"] | {"reader": ""} == {
        "width": 2220, "height": 2967, "mppX": 0.499, "mppY": 0.499, "mppSource": "file", "levels": 1,
        "vendor": "aperio", "reader": "",
    }  # fmt: skip
    assert tileset.told["tiles"]["grid"] == 88
    for slide_id in ("dicom", "ome"):
        assert told(job, slide_id)["state"] == "TILED"
        assert told(job, slide_id)["tiles"]["ok"] > 0


def test_packs_are_plain_tar_with_an_index_that_points_at_each_tile(job: Job, tmp_path: Path) -> None:
    job.add("one", drawn(tmp_path))
    limit = 60_000
    ended = tile(job, **shard_fields(px=128, packBytes=limit))
    assert ended.code == 0, ended.message + ended.stderr
    tileset = made(job, "one")
    index, packs = tileset.index, tileset.packs
    assert len(packs) > 2
    assert list(index) == [
        "minx", "miny", "width", "height", "mpp", "tissue_fraction", "status", "pack", "entry", "offset", "length",
    ]  # fmt: skip
    order = list(zip(index["miny"], index["minx"], strict=True))
    assert order == sorted(order)
    assert set(index["status"]) == {"ok"}
    members = list(tileset.members().items())
    entries = []
    for row, (name, data) in enumerate(members):
        x, y, pack, offset, length = (index[key][row] for key in ("minx", "miny", "pack", "offset", "length"))
        assert name == f"{x}_{y}.jpg"
        assert packs[pack][offset : offset + length] == data
        entries.append((pack, index["entry"][row]))
    assert entries == [
        (p, e) for p, told_pack in enumerate(tileset.told["packs"]) for e in range(told_pack["tiles"])
    ]
    for number, (pack, told_pack) in enumerate(zip(packs, tileset.told["packs"], strict=True)):
        assert told_pack["key"] == f"{tileset.prefix}{tileset.told['tileset']['id']}-{number:05}.tar"
        assert told_pack["bytes"] == len(pack) <= limit
        with tarfile.open(fileobj=io.BytesIO(pack)) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.mode, member.isreg()) == (0, 0, 0o644, True)
                # WebDataset's key is all before the first dot, and its keys are told apart by it.
                assert member.name.count(".") == 1
    full = [len(pack) for pack in packs[:-1]]
    assert min(full) > limit - 512 * 20  # a pack ends where the next tile would not fit
    listed = subprocess.run(["tar", "-tf", "-"], input=packs[0], capture_output=True, check=True).stdout.decode()
    assert listed.split() == [name for name, _ in members[: tileset.told["packs"][0]["tiles"]]]


def test_single_objects_where_they_are_asked_for(job: Job, tmp_path: Path) -> None:
    job.add("one", drawn(tmp_path))
    assert tile(job, **shard_fields(objects=True)).code == 0
    tileset = made(job, "one")
    members = tileset.members()
    prefix = f"{tileset.prefix}objects/"
    objects = {key: data for (_, key), data in job.s3.objects.items() if key.startswith(prefix)}
    assert objects == {prefix + name: data for name, data in members.items()}
    assert tileset.document["objects"] == {"count": len(objects), "bytes": sum(map(len, objects.values()))}

    # Where one of them is not there, or not whole, they are made again; else they are used again.
    job.s3.page = 2
    first, last = min(objects), max(objects)
    assert tile(job, **shard_fields(objects=True)).named("slide-skipped")
    for spoil in (lambda: job.s3.objects.pop(("silver", last)), lambda: put(job, first, "short")):
        spoil()
        assert not tile(job, **shard_fields(objects=True)).named("slide-skipped")
        assert {key: job.s3.objects["silver", key] for key in objects} == objects


@pytest.mark.parametrize(
    ("ycbcr", "tables", "subsampling"),
    [(False, True, "444"), (False, False, "444"), (True, True, "420"), (True, False, "422")],
)
def test_native_jpeg_tiles_are_passed_through(
    job: Job, tmp_path: Path, ycbcr: bool, tables: bool, subsampling: str
) -> None:
    image = picture(1100, 900)
    path = save_jpeg(
        tmp_path / "native.tiff", image, tile=(256, 256), ycbcr=ycbcr, tables=tables, subsampling=subsampling
    )
    job.add("one", path)
    assert tile(job).code == 0
    tileset = made(job, "one")
    members = tileset.members()
    assert tileset.document["tiles"]["passedThrough"] == len(members) > 0
    data = path.read_bytes()
    with openslide.OpenSlide(str(path)) as slide:
        for name, stream in members.items():
            x, y = (int(part) for part in name.split(".")[0].split("_"))
            wanted = np.asarray(slide.read_region((x, y), 0, (256, 256)).convert("RGB"))
            assert np.array_equal(tileset.pixels()[x, y], wanted)
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(stream)).convert("RGB")), wanted)
            scan = stream[stream.index(b"\xff\xda") :]
            assert scan in data  # the slide's own bytes


def test_what_is_no_native_jpeg_tile_is_encoded(job: Job, tmp_path: Path) -> None:
    image = picture(1100, 900)
    job.add("unaligned", save_jpeg(tmp_path / "unaligned.tiff", image))
    job.add("coarser", save_jpeg(tmp_path / "coarser.tiff", image, tile=(256, 256)), mpp=0.25, mppSource="manifest")
    cut = save_jpeg(tmp_path / "cut.tiff", image, tile=(256, 256))
    data = bytearray(cut.read_bytes())
    # The end of the second tile's scan is lost: whether it can be read is for a decoder to say.
    end = data.index(b"\xff\xd9", data.index(b"\xff\xd9") + 2)
    data[end - 400 : end + 2] = bytes(402)
    cut.write_bytes(data)
    job.add("cut", cut)
    assert tile(job).code == 0
    for slide_id in ("unaligned", "coarser"):
        assert made(job, slide_id).document["tiles"]["passedThrough"] == 0
        assert told(job, slide_id)["tiles"]["ok"] > 0
    tiles = told(job, "cut")["tiles"]
    assert tiles["unreadable"] == 1
    assert made(job, "cut").document["tiles"]["passedThrough"] == tiles["ok"]


def test_overlapping_tiles_are_right_whether_passed_through_or_not(job: Job, tmp_path: Path) -> None:
    path = save_jpeg(tmp_path / "native.tiff", picture(1100, 900), tile=(256, 256))
    job.add("one", path)
    assert tile(job, **shard_fields(overlap=64)).code == 0
    tileset = made(job, "one")
    assert {x % 256 for x in tileset.index["minx"]} == {0, 64, 128, 192}
    with openslide.OpenSlide(str(path)) as slide:
        for at, pixels in tileset.pixels().items():
            wanted = np.asarray(slide.read_region(at, 0, (256, 256)).convert("RGB")).astype(int)
            assert np.abs(pixels - wanted).mean() < 3


@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_where_the_fast_reader_crashes_the_rest_is_tiled_from_disk(job: Job, tmp_path: Path, form: str) -> None:
    path = drawn(tmp_path)
    job.add("one", path)
    job.s3.slow = (path.name, 0.3)
    process = job.run(command="tile", wait=False, **shard_fields(px=64, format=form))
    until(job.has_read(path.name))
    job.s3.slow = None
    crash_readers(process)
    ended = job.end(process)
    assert ended.code == 0, ended.message + ended.stderr
    tileset = made(job, "one")
    assert "openslide" in tileset.document["slide"]["reader"]
    assert len(tileset.members()) == tileset.told["tiles"]["kept"] > 0
    plain = plain_tiles(path, 0.5, 64, 0.5)
    for at, pixels in tileset.pixels(64).items():
        assert np.abs(pixels.astype(int) - plain[at]).mean() <= (0 if form == "png" else 8)


@needs_real_slides
def test_a_real_slide_whose_jpeg_lacks_its_marker_keeps_its_colours(job: Job) -> None:
    """CMU-1's tiles are RGB in abbreviated streams without an Adobe marker: 240 pixels wide."""
    path = REAL_SLIDES / "CMU-1-Small-Region.svs"
    job.add("cmu", path)
    assert tile(job, **shard_fields(px=240, mpp=0.499)).code == 0
    tileset = made(job, "cmu")
    assert tileset.document["tiles"]["passedThrough"] == tileset.told["tiles"]["ok"] > 0
    with openslide.OpenSlide(str(path)) as slide:
        for name, stream in tileset.members().items():
            x, y = (int(part) for part in name.split(".")[0].split("_"))
            wanted = np.asarray(slide.read_region((x, y), 0, (240, 240)).convert("RGB"))
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(stream)).convert("RGB")), wanted)


def test_tilesets_are_used_again_while_they_are_whole_and_young(job: Job, tmp_path: Path) -> None:
    job.add("one", drawn(tmp_path))
    assert tile(job).code == 0
    first = made(job, "one")
    assert first.told["tileset"]["reused"] is False
    before = dict(job.s3.objects)

    def again(**fields: Any) -> tuple[Ended, Made]:  # noqa: ANN401
        job.s3.log.clear()
        ended = tile(job, **{**shard_fields(), "runId": "run-2", **fields})
        return ended, made(job, "one")

    ended, second = again()
    assert [event["state"] for event in ended.named("slide-skipped")] == ["TILED"]
    assert second.told["tileset"] == {**first.told["tileset"], "reused": True}
    assert second.told["packs"] == first.told["packs"]
    assert [key for call, key in job.s3.log if call == "PUT"] == ["runs/run-1/jobs/m/tiled/one.json"]
    assert not any(key.endswith("drawn.tiff") for _, key in job.s3.log)

    # Another model of the same run that wants the same tiles; another mpp wants others.
    job.model["digest"] = "sha256:other"
    assert again()[0].named("slide-skipped")
    assert again(**shard_fields(quality=80))[1].told["tileset"]["id"] != first.told["tileset"]["id"]

    pack = first.told["packs"][0]["key"]
    whole = before["silver", pack]
    for spoiled in (b"short", whole[:600] + b"#" + whole[601:]):
        job.s3.objects["silver", pack] = spoiled
        assert not again()[0].named("slide-skipped")
        assert job.s3.objects["silver", pack] == whole

    old = json.loads(first.object("tileset.json"))
    old["createdAt"] = "2020-01-01T00:00:00.000+00:00"
    job.s3.objects["silver", first.prefix + "tileset.json"] = json.dumps(old).encode()
    ended, renewed = again()
    assert not ended.named("slide-skipped")
    assert renewed.document["createdAt"] > "2020-01-02"
    assert renewed.told["tileset"]["reused"] is False


def test_the_same_slide_gives_the_same_bytes_also_when_two_tile_it_at_once(job: Job, tmp_path: Path) -> None:
    path = save_jpeg(tmp_path / "half.tiff", picture(1700, 1300), tile=(128, 128), tables=True)
    job.add("one", path)
    fields = shard_fields(px=128, mpp=1.0, packBytes=100_000)
    both = [job.run(command="tile", wait=False, **fields) for _ in range(2)]
    assert [job.end(process).code for process in both] == [0, 0]
    tileset = made(job, "one")
    names = ["index.parquet", "tissue.geojson", "thumbnail.jpg"]
    first = [tileset.object(name) for name in names], tileset.packs
    assert len(tileset.packs) > 1
    for pack, described in zip(tileset.packs, tileset.document["packs"], strict=True):
        assert (len(pack), sha256(pack).hexdigest()) == (described["bytes"], described["sha256"])
    for name, described in tileset.document["files"].items():
        assert sha256(tileset.object(name)).hexdigest() == described["sha256"]
    job.s3.objects.clear()
    assert tile(job, **fields).code == 0
    tileset = made(job, "one")
    assert ([tileset.object(name) for name in names], tileset.packs) == first


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_tiler_that_is_stopped_leaves_no_marker_and_the_next_goes_on(
    job: Job, tmp_path: Path, sent: signal.Signals
) -> None:
    job.add("first", drawn(tmp_path))
    job.add("second", drawn(tmp_path, "second.tiff", seed=30))
    job.s3.slow = ("second.tiff", 0.4)
    fields = shard_fields(px=32, format="png")
    process = job.run(command="tile", wait=False, **fields)

    def first_is_tiled() -> bool:
        assert process.poll() is None
        return ("silver", "runs/run-1/jobs/m/tiled/first.json") in job.s3.objects

    until(first_is_tiled)
    process.send_signal(sent)
    ended = process.wait(20)
    assert ended == (143 if sent == signal.SIGTERM else -9)
    process.communicate()
    assert not any(key.endswith("tiled/second.json") for _, key in job.s3.objects)
    job.s3.slow = None
    job.s3.log.clear()
    again = tile(job, **fields)
    assert again.code == 0
    assert [(e["slideId"], e["state"]) for e in again.named("slide-skipped")] == [("first", "TILED")]
    assert told(job, "first")["tileset"]["reused"] is False  # it was made for this run
    assert told(job, "second")["state"] == "TILED"
    assert not any("first.tiff" in key for _, key in job.s3.log)


def test_slides_that_cannot_be_tiled_end_as_in_processing(job: Job, tmp_path: Path) -> None:
    job.add(
        "no-mpp", slides.save(tmp_path / "no.tiff", slides.tissue(slides.glass(900, 900), 50, 50, 700, 700), None)
    )
    (tmp_path / "broken.svs").write_bytes(b"II*\0" + bytes(1000))
    job.add("broken", tmp_path / "broken.svs")
    job.add("gone", drawn(tmp_path, "gone.tiff"))
    job.s3.failing["gone.tiff"] = 403
    job.add("blank", slides.save(tmp_path / "blank.tiff", slides.glass(900, 700), 0.5))
    job.add("damaged", damaged(drawn(tmp_path, "damaged.tiff"), tile=2 * 7 + 2))
    ended = tile(job)
    assert ended.code == 0
    documents = {slide["slideId"]: told(job, slide["slideId"]) for slide in job.slides}
    assert {slide_id: (d["state"], d.get("error")) for slide_id, d in documents.items()} == {
        "no-mpp": ("QUARANTINED", "MppMissing"),
        "broken": ("QUARANTINED", "SlideUnopenable"),
        "gone": ("FAILED", "SlideFetchFailed"),
        "blank": ("TILED", None),
        "damaged": ("TILED", None),
    }
    for slide_id in ("no-mpp", "broken", "gone"):
        marker = job.marker(slide_id)
        assert (marker["state"], marker["error"]) == (documents[slide_id]["state"], documents[slide_id]["error"])
        assert marker["mode"] == "transform"
    assert documents["blank"]["packs"] == []
    assert documents["blank"]["tiles"] == {"grid": 6, "kept": 0, "ok": 0, "unreadable": 0}
    tileset = made(job, "damaged")
    assert documents["damaged"]["tiles"]["unreadable"] == 1
    bad = tileset.index["status"].index("unreadable")
    assert (tileset.index["minx"][bad], tileset.index["miny"][bad]) == (512, 512)
    assert (tileset.index["pack"][bad], tileset.index["entry"][bad]) == (-1, -1)
    assert "512_512.jpg" not in tileset.members()
    assert len(tileset.members()) == documents["damaged"]["tiles"]["ok"]

    again = tile(job)  # a quarantine holds, a failure does not
    assert {(e["slideId"], e["state"]) for e in again.named("slide-skipped")} == {
        ("no-mpp", "QUARANTINED"), ("broken", "QUARANTINED"), ("blank", "TILED"), ("damaged", "TILED"),
    }  # fmt: skip
    assert told(job, "no-mpp")["error"] == "MppMissing"
    job.s3.failing.clear()
    assert tile(job).code == 0
    assert told(job, "gone")["state"] == "TILED"


def test_what_cannot_be_written_is_told(job: Job, tmp_path: Path) -> None:
    job.add("one", drawn(tmp_path))
    job.s3.failing["-00000.tar"] = 403
    ended = tile(job)
    assert (ended.code, told(job, "one")["error"]) == (1, "OutputFailed")
    job.s3.failing.clear()
    assert tile(job, **shard_fields(format="raw", packBytes=100_000)).code == 1
    assert told(job, "one")["error"] == "PackTooSmall"
    assert not any(key.endswith("tileset.json") for _, key in job.s3.objects)


def test_shards_of_processing_mode_are_refused(job: Job, tmp_path: Path) -> None:
    job.add("one", drawn(tmp_path))
    ended = job.run(command="tile")
    assert (ended.code, ended.message.split(":")[0]) == (1, "ShardInvalid")


def test_the_log_tells_progress_and_what_bounds_it(job: Job, tmp_path: Path) -> None:
    job.add("one", drawn(tmp_path))
    ended = tile(job)
    complete = ended.named("slide-complete")[0]
    assert set(complete["timings"]) == {"fetch", "tissue", "read", "encode", "write", "total"}
    assert set(complete["bound"]) == {"network", "tissue", "decode", "encode", "write"}
    assert sum(complete["bound"].values()) == pytest.approx(1, abs=0.01)
    assert complete["tilesDone"] == made(job, "one").told["tiles"]["kept"]
    assert ended.named("job-ended")[0]["slides"] == {"TILED": 1}
    requests = made(job, "one").told["requests"]
    # All but the last, which lets go of the claim.
    assert requests["put"] == sum(call == "PUT" for call, _ in job.s3.log) - 1
    assert requests["get"] == sum(call == "GET" for call, _ in job.s3.log)


def test_no_pytorch_is_needed() -> None:
    code = "import sys, slideway_inference.tiler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
