"""Predictions for packs become a slide's results: as `process` would have made them, or with the reason why not."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import packages
import pyarrow.parquet as pq
import pytest
import slides
from conftest import REAL_SLIDES, Job, needs_real_slides, until
from fast_slides import picture, save_jpeg
from s3 import S3
from serving import Served
from test_readers import damaged
from tilesets import OUT, join, made, of_model, put, shard_fields, tile, transform

from slideway_inference.reference_model import package_bytes

Lines = list[dict[str, Any]]


def drawn(folder: Path, name: str = "one.tiff", side: int = 1100, mpp: float = 0.5) -> Path:
    return slides.save(folder / name, slides.tissue(slides.glass(side, side), 60, 60, side - 120, side - 120), mpp)


def lines(members: Mapping[str, bytes]) -> Lines:
    """Answers by the tiles' places, without looking at them."""
    return [
        {"tile": name.split(".")[0], "values": [place / 7 + int(name.split("_")[0]) / 100_000]}
        for place, name in enumerate(members)
    ]


def small_packs() -> dict[str, Any]:
    return shard_fields(px=128, packBytes=40_000)


@pytest.fixture(scope="module")
def tiled_objects(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], bytes]:
    """What tiling one slide leaves, made once."""
    folder = tmp_path_factory.mktemp("tiled")
    s3 = S3()
    job = Job(folder / "ml", s3)
    job.root.mkdir()
    job.use_model(package_bytes())
    job.add("one", drawn(folder))
    assert tile(job, **small_packs()).code == 0
    s3.close()
    return s3.objects


@pytest.fixture
def tiled(job: Job, tiled_objects: dict[tuple[str, str], bytes], tmp_path: Path) -> Job:
    job.add("one", drawn(tmp_path))
    job.s3.objects.update(tiled_objects)
    return job


def ended_with(job: Job, slide_id: str = "one") -> tuple[str, str | None]:
    marker = job.marker(slide_id)
    return marker["state"], marker.get("error")


# --- both modes give the same ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["png", "raw"])
def test_lossless_tiles_give_the_very_bytes_of_processing(job: Job, tmp_path: Path, form: str) -> None:
    job.add("aligned", drawn(tmp_path))
    job.add("resampled", drawn(tmp_path, "resampled.tiff", 1900, mpp=0.31))
    job.add("damaged", damaged(drawn(tmp_path, "damaged.tiff"), tile=1 * 5 + 2))
    job.add("blank", slides.save(tmp_path / "blank.tiff", slides.glass(900, 700), 0.5))
    names = [slide["slideId"] for slide in job.slides]
    assert job.run().code == 0
    processed = {name: job.output(name, "tiles.parquet") for name in names}
    markers = {name: job.marker(name) for name in names}
    for key in [key for key in job.s3.objects if key[1].startswith("runs/")]:
        del job.s3.objects[key]

    fields = shard_fields(format=form, packBytes=1_000_000)
    assert tile(job, **fields).code == 0
    answer = of_model(job, tmp_path)
    for name in names:
        transform(job, made(job, name), answer)
    ended = join(job, **fields)
    assert ended.code == 0, ended.message + ended.stderr
    for name in names:
        assert job.output(name, "tiles.parquet") == processed[name]
        marker = job.marker(name)
        for part in ("tiles", "tile", "tissue", "slide", "outputs", "checksum", "model", "parameters", "state"):
            assert marker[part] == markers[name][part], part
        tileset = made(job, name).told["tileset"]
        assert marker["mode"] == "transform"
        assert marker["tileset"] == {"id": tileset["id"], "reused": False, "format": form}
        assert list(marker["outputs"]) == ["thumbnail.jpg", "tiles.parquet", "tissue.geojson"]
    assert markers["aligned"]["mode"] == "processing"


@needs_real_slides
def test_a_real_slide_in_both_modes(job: Job, tmp_path: Path) -> None:
    job.add("cmu", REAL_SLIDES / "CMU-1-Small-Region.svs")
    assert job.run().code == 0
    processed = job.output("cmu", "tiles.parquet")
    assert tile(job, **shard_fields(format="png")).code == 0
    answer = of_model(job, tmp_path)
    transform(job, made(job, "cmu"), answer)
    assert join(job, codeVersion="test-2", **shard_fields(format="png")).code == 0
    assert job.marker("cmu")["mode"] == "transform"
    ours, theirs = (pq.read_table(io.BytesIO(data)) for data in (job.output("cmu", "tiles.parquet"), processed))
    assert ours.equals(theirs)

    # JPEG at quality 90 moves the measure a little.
    assert tile(job, **shard_fields()).code == 0
    transform(job, made(job, "cmu"), answer)
    assert join(job, codeVersion="test-3", **shard_fields()).code == 0
    values = [np.array(job.tiles("cmu")["value_haematoxylin_area"]), theirs["value_haematoxylin_area"].to_numpy()]
    assert 0 < np.abs(values[0] - values[1]).max() < 0.05
    assert job.marker("cmu")["tileset"]["quality"] == 90


def test_through_the_server_native_tiles_give_the_bytes_of_processing(job: Job, tmp_path: Path) -> None:
    """What is passed through are the slide's own pixels; where a scan is damaged both modes say so."""
    path = save_jpeg(tmp_path / "native.tiff", picture(1300, 1100), tile=(256, 256), tables=True)
    data = bytearray(path.read_bytes())
    scan = -1
    for _ in range(8):
        scan = data.index(b"\xff\xda", scan + 1)
    data[scan + 2000 : scan + 2040] = b"\xff\x00" * 20
    path.write_bytes(data)
    job.add("one", path)
    assert job.run().code == 0
    processed, marker = job.output("one", "tiles.parquet"), job.marker("one")
    assert marker["tiles"]["unreadable"] == 1
    fields = shard_fields(packBytes=400_000)
    assert tile(job, **fields).code == 0
    tileset = made(job, "one")
    assert tileset.told["tiles"]["unreadable"] == 0  # not decoded, so not known yet
    served = Served(tmp_path / "serve", job.package)
    try:
        served.ready()
        for pack in tileset.told["packs"]:
            answer = served.invoke(job.s3.objects["silver", pack["key"]])
            assert answer.status == 200
            put(job, f"{OUT}{pack['key']}.out", answer.body.decode())
    finally:
        served.end()
    assert len(tileset.told["packs"]) > 1
    assert join(job, codeVersion="test", runId="run-1", **fields).named("slide-skipped")  # it has its result
    del job.s3.objects["silver", "runs/run-1/slides/one/haematoxylin-area/complete.json"]
    ended = join(job, **fields)
    assert ended.code == 0, ended.message + ended.stderr
    assert job.marker("one")["mode"] == "transform"
    assert job.marker("one")["tiles"] == marker["tiles"]
    assert job.output("one", "tiles.parquet") == processed


def test_several_outputs_and_slides_that_share_a_tileset(job: Job, tmp_path: Path) -> None:
    job.use_model(packages.model_package(packages.ChannelMeans(), outputs=["r", "g", "b"], mode="transform"))
    path = drawn(tmp_path)
    job.add("one", path)
    job.add("two", path)
    job.slides[1]["bronze"]["checksum"] = job.slides[0]["bronze"]["checksum"]
    fields = shard_fields(px=64, format="raw")
    assert tile(job, **fields).code == 0
    assert made(job, "one").prefix == made(job, "two").prefix
    transform(job, made(job, "one"), of_model(job, tmp_path, px=64))
    job.s3.page = 2
    assert join(job, **fields).code == 0
    tables = [job.tiles(slide_id) for slide_id in ("one", "two")]
    assert tables[0] == tables[1]
    pixels = made(job, "one").pixels(64)
    columns = (tables[0][name] for name in ("minx", "miny", "value_r", "value_g", "value_b"))
    for x, y, *means in zip(*columns, strict=True):
        assert means == pytest.approx((pixels[x, y].mean((0, 1)) / 255).tolist(), abs=1e-5)


def test_numbers_come_back_as_the_float32_they_were(tiled: Job) -> None:
    rng = np.random.default_rng(0)
    sent: dict[str, np.float32] = {}

    def answer(members: Mapping[str, bytes]) -> Lines:
        for name in members:
            bits = rng.integers(0, 0x7F00_0000, dtype=np.uint32)
            sent[name.split(".")[0]] = np.uint32(bits).view(np.float32)
        return [{"tile": n.split(".")[0], "values": [float(str(sent[n.split(".")[0]]))]} for n in members]

    transform(tiled, made(tiled, "one"), answer)
    assert join(tiled, **small_packs()).code == 0
    table = pq.read_table(io.BytesIO(tiled.output("one", "tiles.parquet"))).to_pydict()
    for x, y, value in zip(table["minx"], table["miny"], table["value_haematoxylin_area"], strict=True):
        assert np.float32(value).tobytes() == sent[f"{x}_{y}"].tobytes()


# --- outputs that are not what they should be --------------------------------------------------------------------


def without_last(made_lines: Lines) -> Lines:
    return made_lines[:-1]


def with_more(made_lines: Lines) -> Lines:
    return [*made_lines, made_lines[-1]]


def swapped(made_lines: Lines) -> Lines:
    return [made_lines[1], made_lines[0], *made_lines[2:]]


def changed(**values: Any) -> Callable[[Lines], Lines]:  # noqa: ANN401
    return lambda made_lines: [made_lines[0], {**made_lines[1], **values}, *made_lines[2:]]


SPOILED: dict[str, tuple[Callable[[Lines], Lines], str, str]] = {
    "short": (without_last, "PackFailed", "of its"),
    "long": (with_more, "PackFailed", "more than its"),
    "swapped": (swapped, "PackFailed", "line 1 is for tile"),
    "nameless": (changed(tile=None), "PackFailed", "line 2 is for tile None"),
    "nan": (changed(values=[float("nan")]), "ModelError", "not finite"),
    "huge": (changed(values=[1e60]), "ModelError", "not finite"),
    "endless": (changed(values=[10**400]), "ModelError", "something else than numbers"),
    "words": (changed(values=["much"]), "ModelError", "something else than numbers"),
    "two": (changed(values=[0.5, 0.5]), "ModelError", "answered with 2 numbers"),
    "none": (changed(values=None), "ModelError", "answered with no numbers"),
    "raised": (changed(error={"error": "ModelError", "message": "too dark"}), "ModelError", "too dark"),
}


def test_predictions_that_are_not_those_of_the_pack_fail_their_slide_alone(job: Job, tmp_path: Path) -> None:
    path = drawn(tmp_path)
    for slide_id in (*SPOILED, "broken", "good"):
        job.add(slide_id, path)
    assert tile(job, **small_packs()).code == 0
    for slide_id, (spoil, _, _) in SPOILED.items():
        tileset = made(job, slide_id)
        transform(job, tileset, lambda members, spoil=spoil: spoil(lines(members)))
    key = transform(job, made(job, "broken"), lines)[1]
    put(job, key, job.s3.objects["silver", key].decode()[:-20])
    transform(job, made(job, "good"), lines)
    ended = join(job, **small_packs())
    assert ended.code == 0, ended.message + ended.stderr
    assert ended_with(job, "good") == ("INFERRED", None)
    assert ended_with(job, "broken") == ("FAILED", "PackFailed")
    for slide_id, (_, error, said) in SPOILED.items():
        assert (slide_id, *ended_with(job, slide_id)) == (slide_id, "FAILED", error)
        assert said in job.marker(slide_id)["message"]
    tables = [key for _, key in job.s3.objects if key.endswith("/tiles.parquet")]
    assert tables == ["runs/run-1/slides/good/haematoxylin-area/tiles.parquet"]


def test_a_pack_without_output_fails_its_slide_alone(job: Job, tmp_path: Path) -> None:
    job.add("one", drawn(tmp_path))
    job.add("two", drawn(tmp_path, "two.tiff", 1200))
    assert tile(job, **small_packs()).code == 0
    for slide_id in ("one", "two"):
        keys = transform(job, made(job, slide_id), lines)
    del job.s3.objects["silver", keys[1]]
    ended = join(job, **small_packs())
    assert ended.code == 0
    assert ended_with(job, "one") == ("INFERRED", None)
    assert ended_with(job, "two") == ("FAILED", "PackFailed")
    assert made(job, "two").told["packs"][1]["key"].rsplit("/", 1)[1] in job.marker("two")["message"]

    # With the pack answered after all, that slide alone is joined.
    transform(job, made(job, "two"), lines, attempt=2)
    again = join(job, **small_packs())
    assert [event["slideId"] for event in again.named("slide-skipped")] == ["one"]
    assert ended_with(job, "two") == ("INFERRED", None)


def test_of_several_outputs_of_a_pack_the_newest_that_is_whole_counts(tiled: Job) -> None:
    tileset = made(tiled, "one")
    transform(tiled, tileset, lambda members: [{**line, "values": [1.0]} for line in lines(members)])
    transform(tiled, tileset, lambda members: [{**line, "values": [2.0]} for line in lines(members)], attempt=2)
    transform(tiled, tileset, lambda members: lines(members)[:-1], attempt=3)
    assert join(tiled, **small_packs()).code == 0
    assert set(tiled.tiles("one")["value_haematoxylin_area"]) == {2.0}


def test_unreadable_tiles_are_rows_that_say_so(tiled: Job) -> None:
    spoiled = "512_512"

    def answer(members: Mapping[str, bytes]) -> Lines:
        error = {"error": "TileUnreadable", "message": "It ends early."}
        return [{"tile": n["tile"], "error": error} if n["tile"] == spoiled else n for n in lines(members)]

    transform(tiled, made(tiled, "one"), answer)
    assert join(tiled, **small_packs()).code == 0
    table, marker = tiled.tiles("one"), tiled.marker("one")
    bad = table["status"].index("unreadable")
    assert (table["minx"][bad], table["miny"][bad]) == (512, 512)
    assert np.isnan(table["value_haematoxylin_area"][bad])
    assert np.isnan(table["value_haematoxylin_area"]).sum() == 1
    assert marker["tiles"]["unreadable"] == 1

    for found in [key for key in tiled.s3.objects if key[1].startswith("runs/run-1/slides")]:
        del tiled.s3.objects[found]
    error = {"error": "TileUnreadable", "message": "It ends early."}
    transform(tiled, made(tiled, "one"), lambda m: [{"tile": line["tile"], "error": error} for line in lines(m)], 2)
    assert join(tiled, **small_packs()).code == 0
    assert ended_with(tiled) == ("QUARANTINED", "SlideUnreadable")


def test_what_the_tiler_set_aside_stays_so(job: Job, tmp_path: Path) -> None:
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    job.add("broken", tmp_path / "broken.svs")
    job.add("gone", drawn(tmp_path, "gone.tiff"))
    job.add("forgotten", drawn(tmp_path, "forgotten.tiff"))
    job.s3.failing["gone.tiff"] = 403
    assert tile(job).code == 0
    before = {slide_id: job.output(slide_id, "complete.json") for slide_id in ("broken", "gone")}
    del job.s3.objects["silver", "runs/run-1/jobs/m/tiled/forgotten.json"]
    ended = join(job)
    assert {(e["slideId"], e["state"]) for e in ended.named("slide-skipped")} == {
        ("broken", "QUARANTINED"), ("gone", "FAILED"),
    }  # fmt: skip
    assert {slide_id: job.output(slide_id, "complete.json") for slide_id in before} == before
    assert ended_with(job, "forgotten") == ("FAILED", "TilesetMissing")

    # Where the tiler could not leave its marker, join does.
    del job.s3.objects["silver", "runs/run-1/slides/gone/haematoxylin-area/complete.json"]
    join(job)
    assert ended_with(job, "gone") == ("FAILED", "SlideFetchFailed")


@pytest.mark.parametrize("name", ["tileset.json", "index.parquet", "tissue.geojson"])
def test_a_tileset_that_is_gone_or_damaged_is_named(tiled: Job, name: str) -> None:
    transform(tiled, made(tiled, "one"), lines)
    tiled.s3.objects["silver", made(tiled, "one").prefix + name] = b"{}"
    assert join(tiled, **small_packs()).code == 1
    assert ended_with(tiled) == ("FAILED", "TilesetMissing")


def test_requests_and_seconds_are_told(tiled: Job) -> None:
    transform(tiled, made(tiled, "one"), lines)
    before = made(tiled, "one").told["requests"]
    tiled.s3.log.clear()
    ended = join(tiled, **small_packs())
    marker = tiled.marker("one")
    assert set(marker["timings"]) == {"fetch", "join", "write", "total"}
    assert set(marker["bound"]) == {"network", "join", "write"}
    calls = [call for call, _ in tiled.s3.log]
    assert marker["requests"]["get"] == before["get"] + calls.count("GET")
    assert marker["requests"]["put"] == before["put"] + calls.count("PUT") + calls.count("LIST")
    assert calls.count("LIST") == 1
    complete = ended.named("slide-complete")[0]
    assert complete["tilesDone"] == len(tiled.tiles("one")["minx"])


def test_an_output_that_breaks_off_is_asked_for_again(tiled: Job) -> None:
    transform(tiled, made(tiled, "one"), lines)
    tiled.s3.broken = 2
    assert join(tiled, **small_packs()).code == 0
    assert ended_with(tiled) == ("INFERRED", None)


def test_a_join_that_is_stopped_leaves_nothing_half_done(tiled: Job) -> None:
    transform(tiled, made(tiled, "one"), lines)
    tiled.s3.slow = (".out", 1.0)
    process = tiled.run(command="join", wait=False, **small_packs())
    until(tiled.has_read(OUT))
    process.send_signal(signal.SIGTERM)
    ended = tiled.end(process)
    assert ended.code == 143, ended.stderr
    assert not any(key.endswith("complete.json") for _, key in tiled.s3.objects)
