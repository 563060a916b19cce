"""Of the jobs that want a tileset at the same time one makes it, and none waits for one that is gone."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Job, until
from fast_slides import picture, save_jpeg
from s3 import S3
from tilesets import put, shard_fields, tile

from slideway_inference.claims import Claimed, Claims
from slideway_inference.store import Requests, Store

KEY = "tiles/one/claim.json"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    made = S3()
    for name, value in {
        "AWS_ENDPOINT_URL": made.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()


def claims(name: str, seconds: float = 60) -> Claims:
    return Claims(Store(), "silver", name, seconds)


# --- claims ------------------------------------------------------------------------------------------------------


def test_who_is_first_holds_it_until_it_lets_go(s3: S3) -> None:
    first, second = claims("job-1"), claims("job-2")
    assert first.take(KEY, "slide", Requests()) is False
    for other in (second, first):  # also for another slide of the same job
        with pytest.raises(Claimed) as claimed:
            other.take(KEY, "twin", Requests())
        assert claimed.value.holder == "job-1"
    second.free("twin")
    first.free("twin")
    with pytest.raises(Claimed):
        second.take(KEY, "slide", Requests())
    first.free("slide")
    assert second.take(KEY, "slide", Requests()) is True
    with pytest.raises(Claimed, match="job-2"):
        first.take(KEY, "slide", Requests())
    second.close()
    assert first.take(KEY, "slide", Requests()) is True
    first.close()


def test_of_many_at_once_one_has_it(s3: S3) -> None:
    jobs = [claims(f"job-{number}") for number in range(8)]

    def take(job: Claims) -> bool:
        try:
            job.take(KEY, "slide", Requests())
        except Claimed:
            return False
        return True

    with ThreadPoolExecutor(len(jobs)) as threads:
        for stale in (False, True):
            assert sum(threads.map(take, jobs)) == 1, stale
            for job in jobs:
                job.close()


def test_it_is_renewed_while_it_is_held_and_stale_without(s3: S3) -> None:
    requests = Requests()
    holder, other = claims("job-1", seconds=3), claims("job-2", seconds=3)
    holder.take(KEY, "slide", requests)
    ends = time.monotonic() + 5
    while time.monotonic() < ends:
        with pytest.raises(Claimed):
            other.take(KEY, "slide", Requests())
        time.sleep(0.2)
    puts = requests.put
    assert puts > 3
    assert (requests.put, requests.get) == (s3.log.count(("PUT", KEY)), 1)

    def taken_over() -> bool:
        s3.modified["silver", KEY] -= 4  # as if it had died
        try:
            return other.take(KEY, "slide", Requests())
        except Claimed:  # renewed in between
            return False

    until(taken_over)
    holder.free("slide")  # which is no longer its to give
    assert json.loads(s3.objects["silver", KEY])["jobName"] == "job-2"
    with pytest.raises(Claimed):
        holder.take(KEY, "slide", Requests())
    other.close()


def test_a_claim_that_cannot_be_read_becomes_stale_as_well(s3: S3) -> None:
    job = claims("job-1")
    s3.objects["silver", KEY] = b"{"
    s3.modified["silver", KEY] = time.time()
    with pytest.raises(Claimed):
        job.take(KEY, "slide", Requests())
    s3.modified["silver", KEY] -= 61
    assert job.take(KEY, "slide", Requests()) is True
    job.close()


def test_what_a_process_of_the_same_job_left_behind_is_taken_over_at_once(s3: S3) -> None:
    assert claims("job-1").take(KEY, "slide", Requests()) is False
    again = claims("job-1")
    assert again.take(KEY, "slide", Requests()) is True
    again.close()


# --- tilers ------------------------------------------------------------------------------------------------------


def slide(folder: Path, name: str) -> Path:
    return save_jpeg(folder / name, picture(1100, 900), tile=(256, 256))


def of_another_model(job: Job, folder: Path) -> tuple[Job, dict[str, Any]]:
    """The same slides, in the same run, for another model."""
    other = Job(folder / "other", job.s3, job.slides, job.package, {**job.model, "name": "other"})
    other.root.mkdir()
    other.name = "job-2"
    return other, shard_fields() | {"tiled": {"bucket": "silver", "prefix": "runs/run-1/jobs/other/tiled/"}}


def looked_at(job: Job, calls: int) -> Callable[[], bool]:
    """Whether some claim was asked for so many times."""

    def looked() -> bool:
        keys = [key for call, key in list(job.s3.log) if call == "GET" and key.endswith("claim.json")]
        return any(keys.count(key) >= calls for key in set(keys))

    return looked


def written(job: Job, name: str) -> list[str]:
    return [key for call, key in job.s3.log if call == "PUT" and key.endswith(name)]


def test_two_models_of_a_run_have_each_slide_tiled_once(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIDEWAY_CLAIM_SECONDS", "30")
    for name in ("one", "two", "three"):
        job.add(name, slide(tmp_path, f"{name}.tiff"))
    other, fields = of_another_model(job, tmp_path)
    job.s3.held = "one.tiff"
    begun = job.run(command="tile", wait=False, **shard_fields())
    until(job.has_read("one.tiff"))
    second = other.run(command="tile", wait=False, **fields)
    until(looked_at(job, 3))  # by the first once, by the second again and again
    job.s3.held = ""
    ended, waited = job.end(begun), other.end(second)
    assert (ended.code, waited.code) == (0, 0), ended.message + waited.message + waited.stderr
    markers = written(job, "/tileset.json")
    assert len(markers) == len(set(markers)) == 3
    packs = written(job, ".tar")
    assert len(packs) == len(set(packs))
    assert len(ended.named("slide-complete")) + len(waited.named("slide-complete")) == 3
    # Slides are looked at side by side: which of them is told first is nobody's promise.
    waits = {(event["slideId"], event["holder"], event["seconds"]) for event in waited.named("slide-waits")}
    assert ("one", "job-1", 0.0) in waits
    for model, reused in (("m", False), ("other", True)):
        told = json.loads(job.s3.objects["silver", f"runs/run-1/jobs/{model}/tiled/one.json"])
        assert (told["state"], told["tileset"]["reused"]) == ("TILED", reused)
    for key in set(written(job, "claim.json")):
        assert json.loads(job.s3.objects["silver", key])["process"] == ""


def test_a_slide_whose_tiler_was_killed_is_taken_over(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIDEWAY_CLAIM_SECONDS", "3")
    job.add("one", slide(tmp_path, "one.tiff"))
    other, fields = of_another_model(job, tmp_path)
    job.s3.held = "one.tiff"
    begun = job.run(command="tile", wait=False, **shard_fields())
    until(job.has_read("one.tiff"))
    second = other.run(command="tile", wait=False, **fields)
    until(looked_at(job, 3))
    assert not written(job, "/tileset.json")
    begun.kill()
    begun.communicate()
    job.s3.held = ""
    ended = other.end(second)
    assert ended.code == 0, ended.message + ended.stderr
    assert ended.named("slide-waits")
    assert [event["slideId"] for event in ended.named("slide-complete")] == ["one"]
    assert len(written(job, "/tileset.json")) == 1


def test_a_slide_that_fails_in_one_job_is_left_to_the_next_at_once(job: Job, tmp_path: Path) -> None:
    job.add("one", slide(tmp_path, "one.tiff"))
    job.s3.failing["one.tiff"] = 403
    assert tile(job).code == 1
    job.s3.failing.clear()
    other, fields = of_another_model(job, tmp_path)
    ended = tile(other, **fields)
    assert ended.code == 0
    assert not ended.named("slide-waits")


def test_who_waits_leaves_at_once_when_told_to_and_works_on_all_else_before(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIDEWAY_CLAIM_SECONDS", "1000")
    job.add("one", slide(tmp_path, "one.tiff"))
    assert tile(job).code == 0
    (marker,) = written(job, "/tileset.json")
    del job.s3.objects["silver", marker]
    claim = marker.replace("tileset.json", "claim.json")
    put(job, claim, json.dumps({"process": "another", "jobName": "job-2", "renewals": 1}))
    job.s3.modified["silver", claim] = time.time()
    job.add("two", slide(tmp_path, "two.tiff"))
    process = job.run(command="tile", wait=False, **shard_fields())
    until(lambda: len(written(job, "/tileset.json")) == 2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    ended = job.end(process)
    assert ended.code == 143
    assert [event["slideId"] for event in ended.named("slide-waits")] == ["one"]
    assert [event["slideId"] for event in ended.named("slide-complete")] == ["two"]
    assert json.loads(job.s3.objects["silver", claim])["process"] == "another"
