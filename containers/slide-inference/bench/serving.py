"""Measures `serve`: packs over HTTP from as many connections as a Transform job opens, beside decoding alone and
the model alone on the same processors. bench/serving.ts starts it, and shows what it writes: one JSON document.

Everything is measured in rounds, one after the other in each, and medians are taken: the machine may be shared."""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from reading import Case, Found, costed, grid_of, rounds
from tiling import QUALITY, pixels

from slideway_inference.encode import encode
from slideway_inference.interpreter import hand_over_quickly
from slideway_inference.model.package import unpack
from slideway_inference.model.predictor import Predictor
from slideway_inference.model.predictors import load_predictors
from slideway_inference.pipeline import processors
from slideway_inference.serving.decoding import decode

CONTAINER = Path(__file__).resolve().parents[1]
CONNECTIONS = 8
PACK_BYTES = 12_000_000


def pack(tiles: Sequence[bytes], limit: int) -> tuple[bytes, int]:
    """A pack of at most so many bytes, the tiles repeated, and how many they are."""
    out = io.BytesIO()
    count = 0
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        while True:
            data = tiles[count % len(tiles)]
            if out.tell() + len(data) + 4 * 512 + tarfile.RECORDSIZE > limit:
                break
            member = tarfile.TarInfo(f"{256 * (count % 1000)}_{256 * (count // 1000)}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            count += 1
    return out.getvalue(), count


def in_threads(threads: int, seconds: float, work: Callable[[int], int]) -> float:
    """What `work` says that it did, in as many threads again and again, a second."""
    done = [0] * threads
    until = time.perf_counter() + seconds

    def loop(number: int) -> None:
        while time.perf_counter() < until:
            done[number] += work(number)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(loop, range(threads)))
    return sum(done) / (time.perf_counter() - started)


def with_decoding(tiles: Sequence[bytes], px: int, threads: int, seconds: float) -> float:
    views = [memoryview(tile) for tile in tiles]
    rows = np.empty((threads, len(views), px, px, 3), np.uint8)

    def work(number: int) -> int:
        for view, row in zip(views, rows[number], strict=True):
            decode(view, row)
        return len(views)

    return in_threads(threads, seconds, work)


def with_model(predictors: Sequence[Predictor], batch: npt.NDArray[np.uint8], seconds: float) -> float:
    """As the worker does it: as many batches under way as the device takes."""

    def work(number: int) -> int:
        predictor = predictors[number]
        answers = [predictor.submit(batch) for _ in range(predictor.in_flight)]
        return sum(len(answer()) for answer in answers)

    return in_threads(len(predictors), seconds, work)


class Served:
    """A `serve` process, and connections to it."""

    def __init__(self, root: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        environment = {
            **os.environ,
            "SLIDEWAY_ML_ROOT": str(root),
            "SLIDEWAY_BIND_HOST": "127.0.0.1",
            "SAGEMAKER_BIND_TO_PORT": str(self._port),
            "SAGEMAKER_MAX_PAYLOAD_IN_MB": "12",
            "PYTHONPATH": str(CONTAINER),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "slideway_inference", "serve"], env=environment, stdout=subprocess.DEVNULL
        )
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                connection = self._connection()
                connection.request("GET", "/ping")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("serve does not start")

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)

    def throughput(self, body: bytes, count: int, seconds: float) -> float:
        """Tiles a second. Every connection sends its next pack when it has its answer; what is under way at the end
        is waited for and counted."""
        lines = [0] * CONNECTIONS
        until = time.perf_counter() + seconds

        def send(number: int) -> None:
            connection = self._connection()
            while time.perf_counter() < until:
                connection.request("POST", "/invocations", body, {"Content-Type": "application/x-tar"})
                response = connection.getresponse()
                answer = response.read()
                if response.status != 200 or answer.count(b'"values"') != count:
                    raise RuntimeError(f"serve answered {response.status}: {answer[:200]!r}")
                lines[number] += count
            connection.close()

        started = time.perf_counter()
        threads = [threading.Thread(target=send, args=(number,)) for number in range(CONNECTIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(lines) / (time.perf_counter() - started)

    def processor_seconds(self) -> float:
        """Of its processes, without those of who asks."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        fields = [Path(f"/proc/{each}/stat").read_text().rsplit(")", 1)[1].split() for each in (pid, *children)]
        return sum(int(own[11]) + int(own[12]) for own in fields) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--slides", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="model.tar.gz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--endpoint", help="not needed here")
    options = parser.parse_args()
    hand_over_quickly()  # as the process that serves does
    threads = processors()
    case = Case("native", options.slides / "native-256.svs", 0.5)
    tiles = pixels(case, grid_of(case, options.rows))
    encoded = [encode(tile, "jpeg", QUALITY) for tile in tiles]
    body, count = pack(encoded, PACK_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        package = unpack(options.model, Path(folder) / "model")
        predictors = load_predictors(package, threads)
        decoders = max(1, threads - sum(predictor.on_gpu for predictor in predictors))
        px, batch = package.spec.px, np.ascontiguousarray(tiles[: package.spec.batch])
        served = Served(Path(folder))
        costs: dict[str, list[float]] = {"decode": [], "model": [], "serve": []}
        measures = {
            "decode": costed(lambda: with_decoding(encoded, px, decoders, options.seconds), costs["decode"]),
            "model": costed(lambda: with_model(predictors, batch, options.seconds), costs["model"]),
            "serve": costed(
                lambda: served.throughput(body, count, options.seconds), costs["serve"], served.processor_seconds
            ),
        }
        try:
            served.throughput(body, count, 1)
            found = rounds(measures, options.rounds)
        finally:
            served.close()
    ratios = {
        "serve / decoding and model on the same processors": found.ratio("serve", "decode", "model"),
        "the same by processor time, without the client": Found(costs).ratio("serve", "decode", "model"),
        "serve / model": found.ratio("serve", "model"),
        "serve / decoding": found.ratio("serve", "decode"),
    }
    figures = {
        "tiles_per_second_decode": found["decode"],
        "tiles_per_second_model": found["model"],
        "tiles_per_second_serve": found["serve"],
        "tiles_a_pack": count,
        "bytes_a_tile": len(body) / count,
    }
    options.out.write_text(
        json.dumps(
            {
                "figures": {name: round(value, 1) for name, value in figures.items()},
                "ratios": {name: round(value, 3) for name, value in ratios.items()},
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
