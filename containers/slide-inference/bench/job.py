"""Runs a whole job as SageMaker does, on slides that lie in the bench's S3, and tells what it did."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import tifffile

from slideway_inference.contracts import ModelRef
from slideway_inference.store import s3_client

CONTAINER = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Ran:
    """`tiles_per_second` is of the whole job, from the first slide's start to the last one's end; the rest, but for
    memory and shares, is of one slide."""

    tiles_per_second: float
    peak_memory: int
    requests: int
    reads: int
    bytes_read: int
    tissue_bytes: int
    bound: dict[str, float]


class Job:
    def __init__(self, root: Path, package: Path, model: ModelRef) -> None:
        self._root = root
        self._model = model
        model = root / "processing/input/model"
        model.mkdir(parents=True)
        (model / "model.tar.gz").symlink_to(package.resolve())
        (root / "processing/input/shards").mkdir(parents=True)
        (root / "config").mkdir()
        (root / "config/resourceconfig.json").write_text(json.dumps({"current_host": "a", "hosts": ["a"]}))
        (root / "config/processingjobconfig.json").write_text(json.dumps({"ProcessingJobName": "bench"}))
        self._runs = 0

    def run(self, endpoint: str, slide: Path, slides: int) -> Ran:
        """The slide several times, as so many slides. Raises CalledProcessError when the job fails."""
        events, peak, prefix = self.events("process", endpoint, slide, slides, {})
        client = s3_client(4, attempts=6)

        def result(name: str) -> bytes:
            key = f"{prefix}slide-0/{self._model.name}/{name}"
            body: bytes = client.get_object(Bucket="silver", Key=key)["Body"].read()
            return body

        marker = json.loads(result("complete.json"))
        first = next(e for e in events if e["event"] == "slide-complete" and e["slideId"] == "slide-0")
        return Ran(
            tiles_per_second=tiles_per_second(events),
            peak_memory=peak,
            requests=sum(marker["requests"].values()),
            reads=marker["requests"]["get"] - 1,
            bytes_read=first["bytesRead"],
            tissue_bytes=_tissue_bytes(slide, pq.read_table(io.BytesIO(result("tiles.parquet"))).to_pydict()),
            bound=events[-1]["bound"],
        )

    def events(
        self, command: str, endpoint: str, slide: Path, slides: int, fields: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], int, str]:
        """Runs a job and tells what it logged, its most memory, and the prefix of its results. `fields` are what
        the shard has besides."""
        self._runs += 1
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        prefix = f"runs/bench-{os.getpid()}-{self._runs}/"
        size, key = slide.stat().st_size, f"slides/{slide.name}"
        shard = {
            "runId": "bench",
            "shard": 0,
            "shards": 1,
            "model": asdict(self._model),
            "parameters": {"tissueMinFraction": 0.5, "mppTolerance": 0.02},
            "codeVersion": "bench",
            "output": {"bucket": "silver", "prefix": prefix},
            "slides": [
                {
                    "slideId": f"slide-{number}",
                    "slide": slide.name,
                    "bronze": {
                        "bucket": "bronze",
                        "key": key,
                        "files": [{"key": key, "size": size, "checksum": "-"}],
                        "size": size,
                        "checksum": f"bench-{number}",
                    },
                }
                for number in range(slides)
            ],
            **fields,
        }
        (self._root / "processing/input/shards/shard-0000.json").write_text(json.dumps(shard))
        process = subprocess.Popen(
            [sys.executable, "-m", "slideway_inference", command],
            cwd=CONTAINER,
            env={**os.environ, "SLIDEWAY_ML_ROOT": str(self._root)},
            stdout=subprocess.PIPE,
            text=True,
        )
        watch = _Memory(process.pid)
        out, _ = process.communicate()
        peak = watch.stop()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, f"slideway_inference {command}", out)
        return [json.loads(line) for line in out.splitlines()], peak, prefix


def tiles_per_second(events: list[dict[str, Any]]) -> float:
    """From the first slide's start to the last one's end."""
    complete = [event for event in events if event["event"] == "slide-complete"]
    started = min(_time(event) for event in events if event["event"] == "slide-started")
    return float(sum(event["tilesDone"] for event in complete)) / (max(map(_time, complete)) - started)


def _time(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def _tissue_bytes(slide: Path, tiles: dict[str, list[int]]) -> int:
    """Compressed bytes of the native tiles that these tiles lie on."""
    with tifffile.TiffFile(slide) as tiff:
        page: Any = tiff.pages[0]
        side, columns = page.tilewidth, -(-page.imagewidth // page.tilewidth)
        native = {
            row * columns + column
            for x, y, width, height in zip(
                tiles["minx"], tiles["miny"], tiles["width"], tiles["height"], strict=True
            )
            for row in range(y // side, (y + height - 1) // side + 1)
            for column in range(x // side, (x + width - 1) // side + 1)
        }
        return int(sum(page.databytecounts[index] for index in native))


class _Memory:
    """The most memory that a process and those it started had together, each shared page counted once."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            family, total = [self._pid], 0
            while family:
                pid = family.pop()
                try:
                    for task in Path(f"/proc/{pid}/task").iterdir():
                        family += [int(child) for child in (task / "children").read_text().split()]
                    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                except OSError:
                    continue  # it has just ended
                total += next(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:"))
            self._peak = max(self._peak, total)
