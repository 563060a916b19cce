"""What a GPU machine does with slides: a network of ResNet-50's size in half precision on tiles that are on the
device already (the limit), on tiles from host memory, and in whole jobs from S3 to Parquet; and JPEG decoding by
nvJPEG beside libjpeg-turbo. For the container's image on an instance with a GPU; needs nothing but this folder:

    PYTHONPATH=. python bench/gpu.py [--side 40000] [--slides-a-job 4] [--json <file>]

`--without-gpu` runs it on a processor, to see that it works; its figures mean nothing."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from job import Job  # noqa: E402
from packages import model_package  # noqa: E402
from reading import BATCH, PX, Case, Grid, grid_of, with_decoder, with_fast  # noqa: E402
from s3 import S3  # noqa: E402
from slides import make  # noqa: E402

from slideway_inference.contracts import ModelRef  # noqa: E402
from slideway_inference.errors import DecoderUnavailable  # noqa: E402
from slideway_inference.fast import FileSource, open_fast  # noqa: E402
from slideway_inference.model.device_decoder import DeviceDecoder  # noqa: E402
from slideway_inference.model.package import open_package  # noqa: E402
from slideway_inference.model.predictor import Predictor  # noqa: E402
from slideway_inference.model.predictors import load_predictors  # noqa: E402
from slideway_inference.model.torchscript import TorchScriptPredictor  # noqa: E402
from slideway_inference.pipeline import processors  # noqa: E402

ROUNDS = 3


class Bottleneck(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(inside, width, 1, bias=False),
            torch.nn.BatchNorm2d(width),
            torch.nn.ReLU(),
            torch.nn.Conv2d(width, width, 3, stride, 1, bias=False),
            torch.nn.BatchNorm2d(width),
            torch.nn.ReLU(),
            torch.nn.Conv2d(width, outside, 1, bias=False),
            torch.nn.BatchNorm2d(outside),
        )
        self.short = torch.nn.Sequential()
        if stride != 1 or inside != outside:
            self.short = torch.nn.Sequential(
                torch.nn.Conv2d(inside, outside, 1, stride, bias=False), torch.nn.BatchNorm2d(outside)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.short(x))


def network() -> torch.nn.Module:
    """ResNet-50's layers (He et al., 2015) with random weights and two classes; 23.5 million weights."""
    layers: list[torch.nn.Module] = [
        torch.nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        torch.nn.BatchNorm2d(64),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(3, 2, 1),
    ]
    inside = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(depth):
            layers.append(Bottleneck(inside, width, stride if index == 0 else 1))
            inside = 4 * width
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(inside, 2), torch.nn.Softmax(1)]
    return torch.nn.Sequential(*layers, *head)


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_device(predictor: Predictor, batch: int, batches: int, device: torch.device) -> float:
    """The model alone on bytes that are on the device already."""
    tiles = torch.randint(0, 256, (batch, PX, PX, 3), dtype=torch.uint8, device=device)

    def go(count: int) -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            for _ in range(count):
                if isinstance(predictor, TorchScriptPredictor) and predictor.on_gpu:
                    predictor.on_device(tiles)
                else:
                    predictor.run(tiles.numpy())
        finish(device)

    go(2)
    started = time.perf_counter()
    go(batches)
    return batch * batches / (time.perf_counter() - started)


def from_host(predictor: Predictor, batch: int, batches: int) -> float:
    """The same from memory of the host, as the pipeline does it: copies beside computing."""
    tiles = np.random.default_rng(0).integers(0, 256, (batch, PX, PX, 3), dtype=np.uint8)
    predictor.run(tiles)
    started = time.perf_counter()
    flying: list[Callable[[], Any]] = []
    for _ in range(batches):
        flying.append(predictor.submit(tiles))
        if len(flying) >= predictor.in_flight:
            flying.pop(0)()
    for last in flying:
        last()
    return batch * batches / (time.perf_counter() - started)


def with_device(path: Path, grid: Grid, device: torch.device, threads: int) -> float | None:
    """The grid's tiles as the reader hands them on as parts, decoded and cut on the device; the time is the
    device's alone. None where nvImageCodec is not there."""
    try:
        decoder = DeviceDecoder(device)
    except DecoderUnavailable:
        return None
    buffers: queue.Queue[npt.NDArray[np.uint8]] = queue.Queue()
    for _ in range(4):
        buffers.put(np.empty((BATCH, PX, PX, 3), np.uint8))
    seconds = 0.0
    with open_fast(FileSource(path), name=path.name, threads=threads) as reader:
        for batch in reader.read_batches(grid.geometry, grid.positions, BATCH, buffers, form="parts"):
            started = time.perf_counter()
            decoder(batch.tiles, batch.stored)
            finish(device)
            seconds += time.perf_counter() - started
            buffers.put(batch.buffer)
    return len(grid.positions) / seconds


def in_job(job: Job, decoder: str, url: str, path: Path, slides: int) -> float | None:
    if decoder == "device" and find_spec("nvidia.nvimgcodec") is None:
        return None
    os.environ["SLIDEWAY_JPEG_DECODER"] = decoder
    return job.run(url, path, slides).tiles_per_second


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures a GPU machine.")
    parser.add_argument("--side", type=int, default=40_000)
    parser.add_argument("--slides-a-job", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--without-gpu", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.without_gpu:
        print("There is no GPU here.", file=sys.stderr)
        return 1
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ[name] = "bench"  # of the S3 that is made here
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = processors()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "native-256.svs"
        make(path, options.side, 256)
        case = Case("native", path, 0.5)
        grid = grid_of(case, 24)
        package = model_package(
            network(),
            name="resnet-50-size",
            task="classification",
            outputs=["one", "other"],
            tile={"px": PX, "mpp": 0.5},
            batch=options.batch,
            input={"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        )
        archive = Path(folder) / "model.tar.gz"
        archive.write_bytes(package)
        model = ModelRef("resnet-50-size", "1", f"sha256:{hashlib.sha256(package).hexdigest()}")
        predictor = load_predictors(open_package(archive, model, Path(folder)), threads)[0]
        s3 = S3()
        s3.objects["bronze", f"slides/{path.name}"] = path.read_bytes()
        job = Job(Path(folder) / "ml", archive, model)
        measures: dict[str, Callable[[], float | None]] = {
            "model_on_device": lambda: on_device(predictor, options.batch, options.batches, device),
            "model_from_host": lambda: from_host(predictor, options.batch, options.batches),
            "decode_device": lambda: with_device(path, grid, device, threads),
            "decode_processor": lambda: with_decoder(grid, threads),
            "fast_reader": lambda: with_fast(FileSource(path), case, grid, threads),
            "job": lambda: in_job(job, "processor", s3.url, path, options.slides_a_job),
            "job_decoding_on_device": lambda: in_job(job, "device", s3.url, path, options.slides_a_job),
        }
        for _ in range(ROUNDS):
            for name, measure in measures.items():
                value = measure()
                if value is not None:
                    found.setdefault(name, []).append(value)
        s3.close()
    figures = {name: round(statistics.median(values), 1) for name, values in found.items()}
    ratios = {"job / model on device": round(figures["job"] / figures["model_on_device"], 3)}
    if "decode_device" in figures:
        ratios["job decoding on device / model on device"] = round(
            figures["job_decoding_on_device"] / figures["model_on_device"], 3
        )
        ratios["decoding on device / libjpeg-turbo"] = round(
            figures["decode_device"] / figures["decode_processor"], 3
        )
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processors": threads,
        "torch": torch.__version__,
    }
    document = json.dumps([{"name": "gpu", "figures": figures, "ratios": ratios, "machine": machine}], indent=2)
    print(document)
    if options.json:
        options.json.write_text(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
