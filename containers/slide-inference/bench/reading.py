"""Measures how fast tiles are read, and what stands in the way: the fast reader against what others do, against the
decoder alone and the model alone, and a whole job from S3 to Parquet. bench/reading.ts starts it with a local S3
that holds the slides, and shows what it writes: one JSON document.

Everything is measured in rounds, one after the other in each, and medians are taken: the machine may be shared."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openslide
import simplejpeg
import tifffile
import torch
from job import Job
from PIL import Image

from slideway_inference.contracts import ModelRef
from slideway_inference.fast import FileSource, S3Source, open_fast
from slideway_inference.fast.source import ByteSource
from slideway_inference.grid import TileGeometry, plan_tiles
from slideway_inference.interpreter import hand_over_quickly, spare_the_collector
from slideway_inference.model.package import open_package
from slideway_inference.model.predictor import Predictor
from slideway_inference.model.predictors import load_predictors
from slideway_inference.pipeline import processors
from slideway_inference.store import s3_client

U8 = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int32]

PX = 256
BATCH = 64
STREAMS = 8


@dataclass(frozen=True)
class Case:
    """A slide and the µm per pixel at which it is wanted."""

    name: str
    path: Path
    mpp: float


@dataclass(frozen=True)
class Grid:
    geometry: TileGeometry
    positions: Positions
    native: tuple[int, ...]
    """The native tiles that these positions need."""
    data: tuple[bytes, ...]
    tables: bytes


def grid_of(case: Case, rows: int) -> Grid:
    """At most `rows` rows of tiles through the middle of the slide, where all is tissue."""
    with tifffile.TiffFile(case.path) as tiff:
        page: Any = tiff.pages[0]
        side, tile = page.imagewidth, page.tilewidth
        with open_fast(FileSource(case.path), name=case.path.name) as reader:
            geometry = plan_tiles(reader.levels, reader.mpp or (0.5, 0.5), PX, case.mpp, 0, 0.02)
        step = int(geometry.stride_x)
        xs = np.arange(int(side * 0.25) // step, int(side * 0.75) // step) * step
        first = int(side * 0.3) // step
        ys = np.arange(first, min(first + rows, int(side * 0.7) // step)) * step
        positions = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2).astype(np.int32)
        columns = -(-side // tile)
        native = sorted(
            {
                row * columns + column
                for x, y in positions.tolist()
                for row in range(y // tile, (y + step - 1) // tile + 1)
                for column in range(x // tile, (x + step - 1) // tile + 1)
            }
        )
        data = []
        for index in native:
            tiff.filehandle.seek(page.dataoffsets[index])
            data.append(tiff.filehandle.read(page.databytecounts[index]))
        return Grid(geometry, positions, tuple(native), tuple(data), page.jpegtables or b"")


# --- ways to read ------------------------------------------------------------------------------------------------


def read_openslide(slide: openslide.OpenSlide, grid: Grid, x: int, y: int) -> U8:
    size = round(grid.geometry.footprint_x)
    image = slide.read_region((x, y), 0, (size, size)).convert("RGB")
    return np.asarray(image if size == PX else image.resize((PX, PX), Image.Resampling.BOX))


def with_openslide(case: Case, grid: Grid, threads: int) -> float:
    """read_region in threads, each with a slide of its own, as a careful user does."""

    def work(part: Positions) -> None:
        with openslide.OpenSlide(str(case.path)) as slide:
            for x, y in part.tolist():
                read_openslide(slide, grid, x, y)

    parts = np.array_split(grid.positions, threads)
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, parts))
    return len(grid.positions) / (time.perf_counter() - started)


class TileDataset(torch.utils.data.Dataset):  # type: ignore[misc]
    """What CLAM and TRIDENT do: a slide per worker, a tile per item, a tensor per tile."""

    def __init__(self, case: Case, grid: Grid) -> None:
        self._case, self._grid = case, grid
        self._slide: openslide.OpenSlide | None = None

    def __len__(self) -> int:
        return len(self._grid.positions)

    def __getitem__(self, index: int) -> torch.Tensor:
        self._slide = self._slide or openslide.OpenSlide(str(self._case.path))
        x, y = self._grid.positions[index].tolist()
        return torch.from_numpy(read_openslide(self._slide, self._grid, x, y).copy())


def with_tiffslide(case: Case, grid: Grid, threads: int) -> float:
    """The same with tiffslide, which decodes with imagecodecs."""
    from tiffslide import TiffSlide

    def work(part: Positions) -> None:
        with TiffSlide(case.path) as slide:
            for x, y in part.tolist():
                read_openslide(slide, grid, x, y)

    parts = np.array_split(grid.positions, threads)
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, parts))
    return len(grid.positions) / (time.perf_counter() - started)


def with_dataloader(case: Case, grid: Grid, threads: int) -> float:
    """From the first batch on: the workers' start does not count."""
    batch = min(BATCH, max(1, len(grid.positions) // 8))
    loader = torch.utils.data.DataLoader(TileDataset(case, grid), batch_size=batch, num_workers=threads)
    batches = iter(loader)
    next(batches)
    started, count = time.perf_counter(), 0
    for tiles in batches:
        count += len(tiles)
    return count / (time.perf_counter() - started)


def with_tifffile(case: Case, grid: Grid, threads: int) -> float:
    """Native tiles decoded by tifffile in threads; cutting them is not even counted."""
    with tifffile.TiffFile(case.path) as tiff:
        page: Any = tiff.pages[0]
        started = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda pair: page.decode(pair[1], pair[0])[0], zip(grid.native, grid.data, strict=True)))
        return len(grid.positions) / (time.perf_counter() - started)


def with_decoder(grid: Grid, threads: int) -> float:
    """libjpeg-turbo on bytes in memory and nothing else: the limit. At the scale that the wanted tiles allow."""
    scale = max(1, min(8, 1 << (int(grid.geometry.footprint_x / PX).bit_length() - 1)))
    native = simplejpeg.decode_jpeg_header(grid.data[0])[0] // scale

    def work(part: Sequence[bytes]) -> None:
        for data in part:
            simplejpeg.decode_jpeg(data, "RGB", min_height=native, min_width=native, min_factor=scale)

    parts = [grid.data[i::threads] for i in range(threads)]
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, parts))
    return len(grid.positions) / (time.perf_counter() - started)


@lru_cache
def room() -> list[U8]:
    """For four batches; memory that is there already, as the pipeline's is."""
    return [np.full((BATCH, PX, PX, 3), 255, np.uint8) for _ in range(4)]


def with_fast(source: ByteSource, case: Case, grid: Grid, threads: int) -> float:
    with open_fast(source, name=case.path.name, threads=threads) as reader:
        buffers: queue.Queue[U8] = queue.LifoQueue()  # as the pipeline gives them out
        for buffer in room():
            buffers.put(buffer)
        started = time.perf_counter()
        for batch in reader.read_batches(grid.geometry, grid.positions, BATCH, buffers):
            if batch.unread:
                raise RuntimeError("the bench's slide has unreadable tiles")
            buffers.put(batch.buffer)
        return len(grid.positions) / (time.perf_counter() - started)


def real_slides(folder: Path, threads: int, count: int) -> tuple[dict[str, float], dict[str, float]]:
    """Every tile of small real slides at their own pixel size, several times over."""
    figures: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        if openslide.OpenSlide.detect_format(str(path)) is None or path.stat().st_size < 1 << 20:
            continue
        with open_fast(FileSource(path), name=path.name) as reader:
            mpp = (reader.mpp or (0.25, 0.25))[0]
            geometry = plan_tiles(reader.levels, (mpp, mpp), PX, mpp, 0, 0.02)
            axes = [np.arange(0, size - PX + 1, PX) for size in (reader.width, reader.height)]
        positions = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2).astype(np.int32)
        grid, case = Grid(geometry, np.tile(positions, (8, 1)), (), (), b""), Case(path.stem, path, mpp)
        found = rounds(
            {
                "openslide_threads": lambda case=case, grid=grid: with_openslide(case, grid, threads),
                "fast_file": lambda case=case, grid=grid: with_fast(FileSource(case.path), case, grid, threads),
            },
            count,
        )
        figures |= {f"{path.name}.{name}": round(value, 1) for name, value in found.items()}
        ratios[f"{path.name}: fast / OpenSlide in threads"] = found.ratio("fast_file", "openslide_threads")
    return figures, ratios


def with_model(predictors: Sequence[Predictor], batches: int) -> float:
    """The model on tiles that lie in memory, with every predictor at once."""
    rng = np.random.default_rng(0)
    tiles = rng.integers(90, 256, (BATCH, PX, PX, 3), dtype=np.uint8)

    def work(predictor: Predictor) -> None:
        for _ in range(batches):
            predictor.run(tiles)

    started = time.perf_counter()
    with ThreadPoolExecutor(len(predictors)) as pool:
        list(pool.map(work, predictors))
    return len(predictors) * batches * BATCH / (time.perf_counter() - started)


# --- the bench ---------------------------------------------------------------------------------------------------


class Found(dict[str, float]):
    """What rounds have found: of each measure the median, of all rates."""

    def __init__(self, each: dict[str, list[float]]) -> None:
        super().__init__({name: statistics.median(values) for name, values in each.items()})
        self._each = each

    def ratio(self, rate: str, *others: str) -> float:
        """To another rate, or to what several allow together on the same processors: the median of the ratios
        within a round, because the machine's speed changes from round to round."""
        among = zip(*(self._each[other] for other in others), strict=True)
        return statistics.median(
            value * sum(1 / other for other in values)
            for value, values in zip(self._each[rate], among, strict=True)
        )


def rounds(measures: dict[str, Callable[[], float]], count: int) -> Found:
    """Measures one after the other, again and again; a first pass through everything warms up."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(count):
        for name, measure in measures.items():
            print(f"round {number + 1} of {count}: {name}", file=sys.stderr, flush=True)
            found[name].append(measure())
    return Found(found)


def costed(
    measure: Callable[[], float], costs: list[float], clock: Callable[[], float] = time.process_time
) -> Callable[[], float]:
    """The measure, its tiles a second of processor time noted, which other work on the machine hardly changes."""

    def run() -> float:
        before, started = clock(), time.perf_counter()
        rate = measure()
        costs.append(rate * (time.perf_counter() - started) / (clock() - before))
        return rate

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures reading; started by bench/reading.ts.")
    parser.add_argument("--slides", type=Path, required=True, help="folder of bench/slides.py")
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--slow-endpoint", required=True)
    parser.add_argument("--model", type=Path, required=True, help="model.tar.gz")
    parser.add_argument("--digest", required=True)
    parser.add_argument("--out", type=Path, required=True, help="the figures, as JSON")
    parser.add_argument("--rounds", type=int, default=7, help="of the quick measures; whole jobs have half")
    parser.add_argument("--slides-a-job", type=int, default=4)
    parser.add_argument("--rows", type=int, default=62)
    parser.add_argument("--real", type=Path, help="folder of small real slides")
    options = parser.parse_args()
    hand_over_quickly()  # as the process does in which the fast reader runs
    spare_the_collector()
    threads = processors()
    cases = [
        Case("native", options.slides / "native-256.svs", 0.5),
        Case("unaligned", options.slides / "native-240.svs", 0.5),
        Case("half", options.slides / "native-256.svs", 1.0),
    ]

    def s3(case: Case, endpoint: str) -> S3Source:
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        size = case.path.stat().st_size
        return S3Source(s3_client(STREAMS, attempts=1), "bronze", f"slides/{case.path.name}", size, streams=STREAMS)

    figures: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for case in cases:
        grid, few = grid_of(case, options.rows), grid_of(case, max(2, options.rows // 6))
        measures: dict[str, Callable[[], float]] = {
            "openslide_threads": lambda case=case, few=few: with_openslide(case, few, threads),
            "dataloader": lambda case=case, few=few: with_dataloader(case, few, threads),
            "decoder": lambda grid=grid: with_decoder(grid, threads),
            "fast_file": lambda case=case, grid=grid: with_fast(FileSource(case.path), case, grid, threads),
            "fast_s3": lambda case=case, grid=grid: with_fast(s3(case, options.endpoint), case, grid, threads),
        }
        if case.name == "native":
            if importlib.util.find_spec("tiffslide"):
                measures["tiffslide"] = lambda case=case, few=few: with_tiffslide(case, few, threads)
            measures["tifffile"] = lambda case=case, grid=grid: with_tifffile(case, grid, threads)
            measures["fast_slow_s3"] = lambda case=case, grid=grid: with_fast(
                s3(case, options.slow_endpoint), case, grid, threads
            )
        costs: dict[str, list[float]] = {"decoder": [], "fast_file": []}
        for name, own in costs.items():
            measures[name] = costed(measures[name], own)
        found = rounds(measures, options.rounds)
        figures |= {f"{case.name}.{name}": round(value, 1) for name, value in found.items()}
        ratios[f"{case.name}: fast / OpenSlide in threads"] = found.ratio("fast_file", "openslide_threads")
        ratios[f"{case.name}: fast / DataLoader"] = found.ratio("fast_file", "dataloader")
        ratios[f"{case.name}: fast / decoder"] = found.ratio("fast_file", "decoder")
        ratios[f"{case.name}: fast / decoder, by processor time"] = Found(costs).ratio("fast_file", "decoder")
        ratios[f"{case.name}: fast from S3 / from a file"] = found.ratio("fast_s3", "fast_file")
        if "fast_slow_s3" in found:
            ratios[f"{case.name}: fast / tifffile"] = found.ratio("fast_file", "tifffile")
            ratios[f"{case.name}: fast from slow S3 / from S3"] = found.ratio("fast_slow_s3", "fast_s3")

    if options.real:
        figures_of_real, ratios_of_real = real_slides(options.real, threads, options.rounds)
        figures |= figures_of_real
        ratios |= ratios_of_real
    whole(options, cases[0], s3, threads, figures, ratios)
    ratios = {name: round(value, 3) for name, value in ratios.items()}
    options.out.write_text(json.dumps({"figures": figures, "ratios": ratios}))
    return 0


def whole(
    options: argparse.Namespace,
    case: Case,
    s3: Callable[[Case, str], S3Source],
    threads: int,
    figures: dict[str, float],
    ratios: dict[str, float],
) -> None:
    """A job from S3 to Parquet, against its decoding and its model alone, in the same rounds."""
    with tempfile.TemporaryDirectory() as folder:
        model = ModelRef("haematoxylin-area", "1.0.0", options.digest)
        package = open_package(options.model, model, Path(folder))
        predictors = load_predictors(package, threads)
        grid = grid_of(case, options.rows)
        job = Job(Path(folder) / "ml", options.model, model)
        runs = []

        def run(endpoint: str) -> float:
            runs.append(job.run(endpoint, case.path, slides=options.slides_a_job))
            return runs[-1].tiles_per_second

        found = rounds(
            {
                "model": lambda: with_model(predictors, 40),
                "fast_s3": lambda: with_fast(s3(case, options.endpoint), case, grid, threads),
                "job": lambda: run(options.endpoint),
                "slow_job": lambda: run(options.slow_endpoint),
            },
            (options.rounds + 1) // 2,
        )
    together = 1 / (1 / found["fast_s3"] + 1 / found["model"])
    figures |= {f"whole.{name}": round(value, 1) for name, value in found.items()}
    figures["whole.decode_and_model_together"] = round(together, 1)
    figures["whole.peak_memory_mb"] = max(run.peak_memory for run in runs) / 1e6
    figures["whole.requests_a_slide"] = runs[0].requests
    figures["whole.request_mb"] = round(runs[0].bytes_read / max(1, runs[0].reads) / 1e6, 2)
    figures["whole.bytes_read_mb"] = round(runs[0].bytes_read / 1e6, 1)
    ratios["whole: job / decode and model together"] = found.ratio("job", "fast_s3", "model")
    ratios["whole: slow job / job"] = found.ratio("slow_job", "job")
    ratios["whole: bytes read / compressed bytes under tissue"] = runs[0].bytes_read / runs[0].tissue_bytes
    for name, share in runs[0].bound.items():
        figures[f"whole.bound_{name}"] = share


if __name__ == "__main__":
    sys.exit(main())
