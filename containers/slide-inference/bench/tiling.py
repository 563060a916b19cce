"""Measures the tiler: whole jobs from S3 to packs in S3, beside reading alone and encoding alone; and tiles that
are passed through beside the same tiles decoded and encoded again. bench/tiling.ts starts it with a local S3 that
holds the slides, and shows what it writes: one JSON document.

Everything is measured in rounds, one after the other in each, and medians are taken: the machine may be shared."""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from job import Job, tiles_per_second
from reading import BATCH, PX, STREAMS, Case, Grid, grid_of, rounds

from slideway_inference.contracts import ModelRef, TileFormat
from slideway_inference.encode import encode
from slideway_inference.fast import FileSource, Form, S3Source, open_fast
from slideway_inference.fast.source import ByteSource
from slideway_inference.pipeline import processors
from slideway_inference.store import s3_client

U8 = npt.NDArray[np.uint8]
QUALITY = 90


def with_reading(source: ByteSource, case: Case, grid: Grid, threads: int, form: Form = "pixels") -> float:
    """The fast reader from S3, as the tiler uses it; `stored`: without decoding what is wanted as it is."""
    with open_fast(source, name=case.path.name, threads=threads) as reader:
        buffers: queue.Queue[U8] = queue.Queue()
        for _ in range(4):
            buffers.put(np.empty((BATCH, PX, PX, 3), np.uint8))
        started, passed = time.perf_counter(), 0
        for batch in reader.read_batches(grid.geometry, grid.positions, BATCH, buffers, form=form):
            if batch.unread:
                raise RuntimeError("the bench's slide has unreadable tiles")
            passed += int((batch.stored > 0).sum())
            buffers.put(batch.buffer)
        if passed != (len(grid.positions) if form == "stored" else 0):
            raise RuntimeError("other tiles were passed through than the bench is about")
        return len(grid.positions) / (time.perf_counter() - started)


def pixels(case: Case, grid: Grid) -> U8:
    """Some of the case's tiles, in memory."""
    positions = grid.positions[:: max(1, len(grid.positions) // (4 * BATCH))][: 4 * BATCH]
    out = np.empty((len(positions), PX, PX, 3), np.uint8)
    with open_fast(FileSource(case.path), name=case.path.name) as reader:
        if not reader.read_tiles(grid.geometry, positions, out).all():
            raise RuntimeError("the bench's slide has unreadable tiles")
    return out


def with_encoding(tiles: U8, form: TileFormat, threads: int) -> float:
    """The encoder alone, in threads."""

    def work(part: U8) -> None:
        for tile in part:
            encode(tile, form, QUALITY)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [tiles[i::threads] for i in range(threads)]))
    return len(tiles) / (time.perf_counter() - started)


class Tiler:
    """Whole jobs. Each has slides of its own checksum, so that no tileset is used again."""

    def __init__(self, root: Path, endpoint: str, slides: int) -> None:
        package = root / "model.tar.gz"
        package.touch()
        self._job = Job(root / "ml", package, ModelRef("bench", "1", "sha256:none"))
        self._endpoint = endpoint
        self._slides = slides
        self._runs = 0
        self.ended: dict[str, list[dict[str, Any]]] = {}
        self.peak_memory = 0

    def run(self, name: str, case: Case, form: TileFormat) -> float:
        self._runs += 1
        place = {"bucket": "silver", "prefix": f"bench/{os.getpid()}-{self._runs}/"}
        tiling = {
            **place, "format": form, "quality": QUALITY, "packBytes": 12_000_000, "objects": False, "keepDays": 7,
        }  # fmt: skip
        fields = {"tile": {"px": PX, "mpp": case.mpp, "overlap": 0}, "tiling": tiling, "tiled": place}
        events, peak, _ = self._job.events("tile", self._endpoint, case.path, self._slides, fields)
        self.ended[name] = events
        self.peak_memory = max(self.peak_memory, peak)
        return tiles_per_second(events)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures tiling; started by bench/tiling.ts.")
    parser.add_argument("--slides", type=Path, required=True, help="folder of bench/slides.py")
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--out", type=Path, required=True, help="the figures, as JSON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slides-a-job", type=int, default=2)
    parser.add_argument("--rows", type=int, default=24)
    options = parser.parse_args()
    threads = processors()
    aligned = Case("native", options.slides / "native-256.svs", 0.5)
    unaligned = Case("unaligned", options.slides / "native-240.svs", 0.5)
    grids = {case.name: grid_of(case, options.rows) for case in (aligned, unaligned)}

    def s3(case: Case) -> S3Source:
        os.environ["AWS_ENDPOINT_URL"] = options.endpoint
        size = case.path.stat().st_size
        return S3Source(s3_client(STREAMS, attempts=1), "bronze", f"slides/{case.path.name}", size, streams=STREAMS)

    with tempfile.TemporaryDirectory() as folder:
        tiler = Tiler(Path(folder), options.endpoint, options.slides_a_job)
        tiles = pixels(unaligned, grids["unaligned"])
        measures: dict[str, Callable[[], float]] = {
            "read": lambda: with_reading(s3(unaligned), unaligned, grids["unaligned"], threads),
            "encode_jpeg": lambda: with_encoding(tiles, "jpeg", threads),
            "encode_png": lambda: with_encoding(tiles, "png", threads),
            "job_jpeg": lambda: tiler.run("jpeg", unaligned, "jpeg"),
            "job_png": lambda: tiler.run("png", unaligned, "png"),
            "native_decode": lambda: with_reading(s3(aligned), aligned, grids["native"], threads),
            "native_pass": lambda: with_reading(s3(aligned), aligned, grids["native"], threads, "stored"),
            "job_native_pass": lambda: tiler.run("native", aligned, "jpeg"),
        }
        found = rounds(measures, options.rounds)
    figures = {name: round(value, 1) for name, value in found.items()}
    for form in ("jpeg", "png"):
        together = 1 / (1 / found["read"] + 1 / found[f"encode_{form}"])
        figures[f"read_and_encode_{form}_together"] = round(together, 1)
    for name, events in tiler.ended.items():
        for part, share in events[-1]["bound"].items():
            figures[f"{name}.bound_{part}"] = share
    figures["peak_memory_mb"] = round(tiler.peak_memory / 1e6, 1)
    ratios = {
        "jpeg: job / read and encode together": found.ratio("job_jpeg", "read", "encode_jpeg"),
        "png: job / read and encode together": found.ratio("job_png", "read", "encode_png"),
        "native: passed through / decoded and encoded again": found.ratio(
            "native_pass", "native_decode", "encode_jpeg"
        ),
        "native: job / passed through": found.ratio("job_native_pass", "native_pass"),
        "job: native passed through / unaligned encoded": found.ratio("job_native_pass", "job_jpeg"),
    }
    ratios = {name: round(value, 3) for name, value in ratios.items()}
    options.out.write_text(json.dumps({"figures": figures, "ratios": ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
