"""The job as SageMaker runs it: shards in, results and markers in Silver, the end in exit code and message."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import packages
import pyarrow.parquet as pq
import pytest
import slides
from conftest import REAL_SLIDES, Job, needs_real_slides, until
from test_model import expected_area
from test_readers import damaged

from slideway_inference.reader import open_slide


def small(folder: Path, name: str, mpp: Any = 0.5, seed: int = 0) -> Path:  # noqa: ANN401
    image = slides.tissue(slides.glass(1100, 900), 100 + seed, 100, 800, 700)
    return slides.save(folder / name, image, mpp)


@needs_real_slides
def test_a_shard_of_good_and_bad_slides_is_worked_through(job: Job, tmp_path: Path) -> None:
    job.add("cmu", REAL_SLIDES / "CMU-1-Small-Region.svs")
    job.add("no-mpp", REAL_SLIDES / "TCGA-CR-7395-01A-01-TS1.svs")
    job.add("mpp-given", REAL_SLIDES / "TCGA-CR-7395-01A-01-TS1.svs", mpp=0.25, mppSource="catalogue")
    job.add("ome", REAL_SLIDES / "OS-1-detail.ome.tif")
    job.add("dicom", REAL_SLIDES / "cmu-1-dicom")
    job.add("default-dpi", REAL_SLIDES / "boxes.tiff")
    job.add("unreadable", REAL_SLIDES / "bad/unreadable.svs")
    job.add("unopenable", REAL_SLIDES / "bad/unopenable.tiff")
    truncated = tmp_path / "truncated.svs"
    truncated.write_bytes((REAL_SLIDES / "CMU-1-Small-Region.svs").read_bytes()[:900_000])
    job.add("truncated", truncated)
    (tmp_path / "empty.svs").touch()
    job.add("empty", tmp_path / "empty.svs")
    job.add("blank", slides.save(tmp_path / "blank.tiff", slides.glass(900, 700), 0.5))
    job.add(
        "pens",
        slides.save(tmp_path / "pens.tiff", slides.pen(slides.glass(1200, 900), "blue", 50, 50, 900, 500), 0.5),
    )
    ended = job.run()

    assert ended.code == 0, ended.message + ended.stderr
    assert ended.message.startswith("12 slides: 6 INFERRED, 6 QUARANTINED.")
    states = {slide["slideId"]: job.marker(slide["slideId"]) for slide in job.slides}
    errors = {slide_id: marker["error"] for slide_id, marker in states.items() if marker["state"] != "INFERRED"}
    assert errors == {
        "no-mpp": "MppMissing",
        "default-dpi": "MppImplausible",
        "unreadable": "SlideUnreadable",
        "unopenable": "SlideUnopenable",
        "truncated": "SlideUnopenable",
        "empty": "SlideUnopenable",
    }
    assert "`mpp`" in states["no-mpp"]["message"]

    marker = states["cmu"]
    assert marker["slide"] | {"reader": ""} == {
        "width": 2220, "height": 2967, "mppX": 0.499, "mppY": 0.499, "mppSource": "file", "levels": 1,
        "vendor": "aperio", "reader": "",
    }  # fmt: skip
    assert marker["tile"] == {
        "px": 256, "mpp": 0.499, "overlap": 0, "footprintX": 256, "footprintY": 256, "level": 0
    }  # fmt: skip
    kept = marker["tiles"]["kept"]
    assert marker["tiles"] == {"grid": 8 * 11, "kept": kept, "ok": kept, "unreadable": 0}
    assert marker["requests"]["put"] == 4
    assert marker["requests"]["get"] <= 20
    assert marker["jobName"] == "job-1"
    assert set(marker["timings"]) == {"fetch", "tissue", "read", "infer", "write", "total"}
    assert set(marker["bound"]) == {"network", "tissue", "decode", "model", "write"}
    assert sum(marker["bound"].values()) == pytest.approx(1, abs=0.01)
    assert marker["slide"]["reader"] == "fast"
    for name, output in marker["outputs"].items():
        data = job.output("cmu", name)
        assert output == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert set(marker["outputs"]) == {"tiles.parquet", "tissue.geojson", "thumbnail.jpg"}

    table = job.tiles("cmu")
    assert list(table) == [
        "minx", "miny", "width", "height", "mpp", "tissue_fraction", "status", "value_haematoxylin_area",
    ]  # fmt: skip
    order = list(zip(table["miny"], table["minx"], strict=True))
    assert order == sorted(order)
    with open_slide(REAL_SLIDES / "CMU-1-Small-Region.svs") as slide:
        for x, y, value in zip(table["minx"], table["miny"], table["value_haematoxylin_area"], strict=True):
            assert value == pytest.approx(expected_area(slide.read_region(0, x, y, 256, 256).rgb), abs=1e-6)
    assert min(table["tissue_fraction"]) >= 0.5
    metadata = pq.read_schema(io.BytesIO(job.output("cmu", "tiles.parquet"))).metadata
    assert metadata[b"slideId"] == b"cmu"
    assert metadata[b"parameters"] == b'{"mppTolerance":0.02,"tissueMinFraction":0.5}'

    # A DICOM series made from a slide has that slide's answer.
    assert np.mean(job.tiles("dicom")["value_haematoxylin_area"]) == pytest.approx(
        np.mean(table["value_haematoxylin_area"]), abs=0.02
    )
    assert states["ome"]["slide"]["mppX"] == pytest.approx(0.2271, abs=1e-4)
    assert states["mpp-given"]["slide"]["mppSource"] == "catalogue"
    assert states["mpp-given"]["tile"]["level"] == 1
    for slide_id in ("blank", "pens"):
        assert states[slide_id]["tiles"]["kept"] == 0
        assert states[slide_id]["tissue"]["areaMm2"] == 0
        assert job.tiles(slide_id)["minx"] == []
    (mostly,) = ended.named("slide-mostly-ink")
    assert (mostly["slideId"], mostly["inkFraction"]) == ("pens", states["pens"]["tissue"]["inkFraction"])
    assert states["cmu"]["tissue"]["inkFraction"] < 0.02
    assert {entry["event"] for entry in ended.events} - {"slide-progress"} == {
        "job-started", "model-loaded", "slide-started", "slide-complete", "slide-quarantined", "slide-mostly-ink",
        "job-ended",
    }  # fmt: skip
    logged = json.dumps(ended.events) + ended.message + ended.stderr
    assert not any(slide["slide"] in logged for slide in job.slides)


def test_done_slides_are_skipped_and_failed_ones_are_tried_again(job: Job, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        job.add(name, small(tmp_path, f"{name}.tiff", mpp=None if name == "three" else 0.5))
    job.s3.failing["slides/study/two/"] = 403
    ended = job.run()
    assert ended.code == 0
    assert {entry["slideId"]: entry["error"] for entry in ended.named("slide-failed")} == {
        "two": "SlideFetchFailed"
    }
    assert job.marker("two")["state"] == "FAILED"
    assert "403" in job.marker("two")["message"]
    first = job.output("one", "tiles.parquet")

    job.s3.failing.clear()
    again = job.run()
    assert [entry["slideId"] for entry in again.named("slide-skipped")] == ["one", "three"]
    assert job.marker("two")["state"] == "INFERRED"

    anew = job.run(codeVersion="other")
    assert anew.named("slide-skipped") == []
    assert job.marker("one")["codeVersion"] == "other"
    rewritten = pq.read_table(io.BytesIO(job.output("one", "tiles.parquet")))
    assert rewritten.equals(pq.read_table(io.BytesIO(first)))


def test_the_same_slide_gives_the_same_bytes(job: Job, tmp_path: Path) -> None:
    job.add("one", small(tmp_path, "one.tiff", mpp=0.31))
    job.run()
    names = ("tiles.parquet", "tissue.geojson", "thumbnail.jpg")
    before = [job.output("one", name) for name in names]
    job.s3.objects.clear()
    job.run()
    assert [job.output("one", name) for name in names] == before


def test_unreadable_tiles_are_rows_that_say_so(job: Job, tmp_path: Path) -> None:
    job.add("damaged", damaged(small(tmp_path, "one.tiff"), tile=1 * 5 + 2))
    job.add("transient", small(tmp_path, "two.tiff"))
    job.s3.broken = 2
    assert job.run().code == 0
    marker, table = job.marker("damaged"), job.tiles("damaged")
    assert marker["tiles"]["unreadable"] == 1
    assert marker["tiles"]["ok"] == marker["tiles"]["kept"] - 1
    bad = table["status"].index("unreadable")
    assert (table["minx"][bad], table["miny"][bad]) == (512, 256)
    values = table["value_haematoxylin_area"]
    assert np.isnan(values[bad])
    assert not np.isnan(values[:bad] + values[bad + 1 :]).any()
    assert job.marker("transient")["state"] == "INFERRED"


def test_a_slide_of_many_files_is_laid_out_as_it_lies_in_bronze(job: Job, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    (folder / "parts").mkdir(parents=True)
    small(folder, "a.tiff")
    (folder / "parts/b.bin").write_bytes(b"x" * 10)
    (folder / "parts/empty.bin").touch()
    job.add("many", folder)
    job.slides[0]["bronze"]["files"].append({"key": "slides/study/many/gone.dat", "size": 4, "checksum": "x"})
    assert job.run().code == 1
    assert "NoSuchKey" in job.marker("many")["message"]
    del job.slides[0]["bronze"]["files"][-1]
    assert job.run().code == 0
    assert job.marker("many")["state"] == "INFERRED"


def test_a_model_that_fails_on_one_slide_fails_that_slide(job: Job, tmp_path: Path) -> None:
    job.use_model(packages.model_package(packages.RefusesDark()))
    dark = np.full((600, 600, 3), (70, 30, 90), np.uint8)
    job.add("dark", slides.save(tmp_path / "dark.tiff", dark, 0.5))
    job.add("bright", small(tmp_path, "bright.tiff"))
    ended = job.run()
    assert ended.code == 0
    assert (job.marker("dark")["state"], job.marker("dark")["error"]) == ("FAILED", "ModelError")
    assert "too dark for me" in job.marker("dark")["message"]
    assert job.marker("bright")["state"] == "INFERRED"
    assert job.run(shards=[job.slides[:1]]).code == 1


def test_a_model_that_never_answers_ends_the_job_and_keeps_what_is_done(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIDEWAY_MODEL_SECONDS", "3")
    job.use_model(packages.model_package(packages.Hangs()))
    job.add("bright", small(tmp_path, "bright.tiff"))
    assert job.run().code == 0
    job.add("dark", slides.save(tmp_path / "dark.tiff", np.full((600, 600, 3), (70, 30, 90), np.uint8), 0.5))
    ended = job.run()
    assert ended.code == 1
    assert ended.message.startswith("ModelHangs: The model has not answered for a batch for 3 s")
    assert ended.named("job-ended")[0]["exitCode"] == 1
    assert job.marker("bright")["state"] == "INFERRED"
    assert not any("/dark/" in key for _, key in job.s3.objects)


def test_classes_are_probabilities_and_two_hosts_share_the_shards(job: Job, tmp_path: Path) -> None:
    job.use_model(packages.model_package(packages.TwoClasses(), task="classification", outputs=["light", "dark"]))
    for name in ("a", "b", "c"):
        job.add(name, small(tmp_path, f"{name}.tiff"))
    job.hosts, job.host = ("algo-1", "algo-2"), "algo-2"
    ended = job.run(shards=[job.slides[:1], job.slides[1:2], job.slides[2:]])
    assert ended.named("job-started")[0]["shards"] == [1]
    assert [entry["slideId"] for entry in ended.named("slide-complete")] == ["b"]
    table = job.tiles("b")
    assert list(table)[-2:] == ["prob_light", "prob_dark"]
    assert np.add(table["prob_light"], table["prob_dark"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("package", "said"),
    [
        (
            packages.package({"model.json": json.dumps(packages.document()).encode(), "model.onnx": b"x"}),
            "ModelPackageInvalid",
        ),
        (
            packages.package({"model.json": json.dumps(packages.document()).encode(), "model.pt": b"x"}),
            "ModelPackageInvalid",
        ),
    ],
)
def test_a_package_that_cannot_be_used_ends_the_job_with_the_reason(
    job: Job, package: bytes, said: str, tmp_path: Path
) -> None:
    job.add("one", small(tmp_path, "one.tiff"))
    job.use_model(packages.model_package(packages.ChannelMeans()))
    job.package = package
    job.model["digest"] = f"sha256:{hashlib.sha256(package).hexdigest()}"
    ended = job.run()
    assert ended.code == 1
    assert ended.message.startswith(f"{said}: ")
    assert ended.named("job-ended")[0]["exitCode"] == 1
    assert not job.s3.log


def test_a_job_told_to_stop_leaves_nothing_half_done(job: Job, tmp_path: Path) -> None:
    job.use_model(packages.model_package(packages.Slow(), tile={"px": 64, "mpp": 0.5}, batch=2))
    job.add("slow", small(tmp_path, "slow.tiff"))
    process = job.run(wait=False)
    until(job.has_read("slow.tiff"))
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    ended = job.end(process)
    assert time.monotonic() - told < 20
    assert ended.code == 143
    assert ended.message.startswith("Stopped")
    assert not any(key.endswith("complete.json") for _, key in job.s3.objects)
