"""What the tests share: an S3, a job's folder, and the job itself, run as SageMaker runs it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
import pyarrow.parquet as pq
import pytest
from s3 import S3

from slideway_inference.reference_model import package_bytes

CONTAINER = Path(__file__).resolve().parents[1]
REAL_SLIDES = Path(os.environ.get("SLIDEWAY_TEST_SLIDES", CONTAINER.parents[2] / "shared/slides"))

needs_real_slides = pytest.mark.skipif(not REAL_SLIDES.is_dir(), reason="SLIDEWAY_TEST_SLIDES is not there")


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@dataclass
class Ended:
    """A job that has ended: exit code, output/message, and the events it logged."""

    code: int
    message: str
    events: list[dict[str, Any]]
    stderr: str

    def named(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self.events if entry["event"] == event]


@dataclass
class Job:
    """A job's folder and what stands in S3 for it."""

    root: Path
    s3: S3
    slides: list[dict[str, Any]] = field(default_factory=list)
    package: bytes = b""
    model: dict[str, str] = field(default_factory=dict)
    hosts: tuple[str, ...] = ("algo-1",)
    host: str = "algo-1"
    name: str = "job-1"

    def has_read(self, name: str) -> Callable[[], bool]:
        """Whether something of that name was asked for."""
        return lambda: any(call == "GET" and name in key for call, key in list(self.s3.log))

    def use_model(self, package: bytes, **changes: str) -> None:
        with tarfile.open(fileobj=io.BytesIO(package)) as tar:
            member = tar.extractfile("model.json")
            assert member is not None
            document = json.load(member)
        digest = f"sha256:{hashlib.sha256(package).hexdigest()}"
        self.package = package
        self.model = {"name": document["name"], "version": document["version"], "digest": digest, **changes}

    def add(self, slide_id: str, path: Path, **changes: Any) -> None:  # noqa: ANN401
        """Puts a file, or a folder of which the first file is opened, into Bronze and on the shard."""
        prefix = f"slides/study/{slide_id}/"
        files = []
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in filter(Path.is_file, found):
            key = prefix + (str(file.relative_to(path.parent)) if path.is_dir() else file.name)
            data = file.read_bytes()
            self.s3.versions["bronze", key, "v1"] = data
            files.append({"key": key, "versionId": "v1", "size": len(data), "checksum": "crc64nvme:AAAAAAAAAAA="})
        size = sum(file["size"] for file in files)
        bronze = {
            "bucket": "bronze",
            "key": files[0]["key"],
            "files": files,
            "size": size,
            "checksum": f"sum-{slide_id}",
        }
        self.slides.append({"slideId": slide_id, "slide": path.name, "bronze": bronze, **changes})

    def run(
        self,
        shards: list[list[dict[str, Any]]] | None = None,
        wait: bool = True,
        command: str = "process",
        **changes: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Runs the job to its end; without `wait`, the process."""
        shards = shards or [self.slides]
        folder = self.root / "processing/input/shards"
        folder.mkdir(parents=True, exist_ok=True)
        for index, slides in enumerate(shards):
            shard = {
                "runId": "run-1",
                "shard": index,
                "shards": len(shards),
                "model": {"bucket": "models", "key": "models/m/model.tar.gz", **self.model},
                "parameters": {"tissueMinFraction": 0.5, "mppTolerance": 0.02},
                "codeVersion": "test",
                "output": {"bucket": "silver", "prefix": "runs/run-1/slides/"},
                "slides": slides,
                **changes,
            }
            (folder / f"shard-{index:04}.json").write_text(json.dumps(shard))
        model = self.root / "processing/input/model"
        model.mkdir(parents=True, exist_ok=True)
        (model / "model.tar.gz").write_bytes(self.package)
        config = self.root / "config"
        config.mkdir(exist_ok=True)
        (config / "resourceconfig.json").write_text(json.dumps({"current_host": self.host, "hosts": self.hosts}))
        (config / "processingjobconfig.json").write_text(json.dumps({"ProcessingJobName": self.name}))
        environment = {
            **os.environ,
            "SLIDEWAY_ML_ROOT": str(self.root),
            "AWS_ENDPOINT_URL": self.s3.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "PYTHONWARNINGS": "ignore",
        }
        if wait:
            return self._ended(*forked.run(command, environment, self.root.parent, 120))
        return subprocess.Popen(
            [sys.executable, "-m", "slideway_inference", command],
            cwd=CONTAINER,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, process: subprocess.Popen[str]) -> Ended:
        out, err = process.communicate(timeout=120)
        return self._ended(process.returncode, out, err)

    def _ended(self, code: int, out: str, err: str) -> Ended:
        message = self.root / "output/message"
        return Ended(
            code,
            message.read_text() if message.exists() else "",
            [json.loads(line) for line in out.splitlines()],
            err,
        )

    def output(self, slide_id: str, name: str) -> bytes:
        return self.s3.objects["silver", f"runs/run-1/slides/{slide_id}/{self.model['name']}/{name}"]

    def marker(self, slide_id: str) -> dict[str, Any]:
        marker: dict[str, Any] = json.loads(self.output(slide_id, "complete.json"))
        return marker

    def tiles(self, slide_id: str) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = pq.read_table(
            io.BytesIO(self.output(slide_id, "tiles.parquet"))
        ).to_pydict()
        return columns


@pytest.fixture(scope="session")
def reference_package() -> bytes:
    return package_bytes()


@pytest.fixture
def job(tmp_path: Path, reference_package: bytes) -> Iterator[Job]:
    s3 = S3()
    made = Job(tmp_path / "ml", s3)
    made.root.mkdir()
    made.use_model(reference_package)
    yield made
    s3.close()


def crash_readers(job: subprocess.Popen[str]) -> None:
    """All of its reader processes, and the one that they are forked from."""
    for pid in _started_by(job.pid):
        os.kill(pid, signal.SIGSEGV)


def _started_by(pid: int) -> list[int]:
    """Processes that it has started, and those that they have."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [*children, *(other for child in children for other in _started_by(child))]
