"""A slide's numbers are in memory a few times at most, and those of many slides wait for each other."""

from __future__ import annotations

import io
import json
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import cast

import h5py
import numpy as np
import packages
import pyarrow.parquet as pq
import pytest
from conftest import Job
from test_head import embedding
from test_join import drawn, lines, small_packs
from tilesets import join, made, tile, transform

from slideway_inference import features
from slideway_inference.contracts import ModelRef, Parameters, Shard, ShardSlide
from slideway_inference.errors import Stopped
from slideway_inference.grid import TileGeometry
from slideway_inference.memory import Room, memory_limit
from slideway_inference.model.spec import parse_model
from slideway_inference.results import write_slide
from slideway_inference.store import Requests, Store
from slideway_inference.survey import Survey


def nothing() -> None:
    """There is nothing to check."""


# --- room --------------------------------------------------------------------------------------------------------


def test_no_more_is_held_than_there_is_and_what_is_too_large_goes_alone() -> None:
    room, inside, most = Room(100), [0], [0]
    lock = threading.Lock()

    def work(size: int) -> None:
        with room.held(size, nothing):
            with lock:
                inside[0] += min(size, 100)
                most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            with lock:
                inside[0] -= min(size, 100)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, [30, 50, 500, 20, 70, 1000, 0, 99] * 3))
    assert most[0] == 100


def test_what_was_held_is_free_after_an_error_and_who_waits_can_be_told_to_stop() -> None:
    room = Room(10)
    with suppress(ZeroDivisionError), room.held(10, nothing):
        raise ZeroDivisionError

    def stop() -> None:
        raise Stopped("The job was told to stop.")

    with room.held(5, stop), pytest.raises(Stopped), room.held(6, stop):
        raise AssertionError


def test_the_limit_is_the_environments_or_a_share_of_the_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIDEWAY_MEMORY_MB", "1.5")
    assert memory_limit(0.5) == 3 << 19
    monkeypatch.delenv("SLIDEWAY_MEMORY_MB")
    assert 0 < memory_limit(0.25) < memory_limit(0.5)


# --- a slide -----------------------------------------------------------------------------------------------------


class Sink:
    """A store that takes what is put."""

    def put(self, bucket: str, key: str, body: bytes, content_type: str, requests: Requests) -> None:
        """Nothing is kept."""


def surveyed(count: int) -> Survey:
    return Survey(
        width=600, height=300, levels=1, vendor="aperio", reader="fast", mpp=(0.5, 0.5), mpp_source="file",
        geometry=TileGeometry(128, 0.5, 0, 0, True, 128.0, 128.0, 128.0, 128.0), grid=count,
        positions=np.arange(2 * count, dtype=np.int32).reshape(count, 2), fractions=np.ones(count, np.float32),
        tissue_mm2=1.0, tissue_mpp=8.0, ink_fraction=0.0, geojson=b"{}", thumbnail=b"", level_size=(600, 300),
        seconds=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("unreadable", [0, 5])
def test_an_embedding_is_written_without_copies_of_it_all(unreadable: int) -> None:
    count, width = 4096, 1024
    document = packages.document(**embedding(dimensions=width))
    spec = parse_model(json.dumps({key: value for key, value in document.items() if key != "outputs"}))
    survey = surveyed(count)
    slide = ShardSlide("one", "bronze", "a", (), 1, "sum", None, None)
    model = ModelRef("tried", "1", "sha256:0")
    shard = Shard("run-1", 0, model, Parameters(0.5, 0.02), "test", "silver", "runs/", (slide,))
    values = np.random.default_rng(0).standard_normal((count, width), np.float32)
    readable = np.ones(count, np.bool_)
    readable[:unreadable] = False
    sink = cast(Store, Sink())
    write_slide(sink, shard, slide, spec, None, survey, readable, values, Requests())  # imports are not counted
    tracemalloc.start()
    written = write_slide(sink, shard, slide, spec, None, survey, readable, values, Requests())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert written.files["features.h5"]["bytes"] > (count - unreadable) * width * 4
    assert peak < 1.6 * values.nbytes
    assert np.isnan(values[:unreadable]).all()


def test_features_are_those_of_the_readable_tiles_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_CHUNK_BYTES", 64)
    monkeypatch.setattr(features, "_SLICE_CHUNKS", 3)
    survey = surveyed(40)
    values = np.random.default_rng(1).standard_normal((40, 5), np.float32)
    for readable in (np.arange(40) % 3 > 0, np.ones(40, np.bool_), np.zeros(40, np.bool_)):
        data = features.features_h5("one", "tried", survey, readable, values, "runs/")
        with h5py.File(io.BytesIO(data)) as file:
            assert np.array_equal(file["features"][:], values[readable])
            assert np.array_equal(file["coords"][:], survey.positions[readable])
            assert (file["features"].dtype, file["coords"].dtype) == (np.float32, np.int64)


def test_slides_for_which_there_is_no_room_together_are_joined_one_by_one(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two", "three"):
        job.add(name, drawn(tmp_path, f"{name}.tiff"))
    assert tile(job, **small_packs()).code == 0
    for name in ("one", "two", "three"):
        transform(job, made(job, name), lines)
    monkeypatch.setenv("SLIDEWAY_MEMORY_MB", "0.000001")
    job.s3.log.clear()
    ended = join(job, **small_packs())
    assert ended.code == 0, ended.message + ended.stderr
    # All that is read of a slide's predictions lies before its table, and the next slide's after it.
    order = [
        ("table" if key.endswith("tiles.parquet") else "out")
        for call, key in job.s3.log
        if (call, key.endswith(".out")) == ("GET", True) or (call, key.endswith("tiles.parquet")) == ("PUT", True)
    ]
    packs = len(made(job, "one").told["packs"])
    assert order == [*["out"] * packs, "table"] * 3
    assert pq.read_table(io.BytesIO(job.output("one", "tiles.parquet"))).num_rows > 0
