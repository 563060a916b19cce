"""One instance of a SageMaker Processing job: `process` infers slides, `tile` tiles them, `join` puts predictions
of tiles together. Each finds its shards, works the slides, and tells the end in `output/message` and its exit code:
0 when the shards were worked through, 1 when the model package is unusable or every slide failed, 143 when it was
told to stop."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slideway_inference.contracts import Shard, parse_shard
from slideway_inference.errors import JobFailed, ModelHangs, ShardInvalid, Stopped
from slideway_inference.log import Log
from slideway_inference.pipeline import Pipeline, Tally, Task, processors, readers_for, shares
from slideway_inference.store import Store

_MESSAGE_BYTES = 1024
_STOPPED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Job:
    """What is given to the work on slides. `scratch` is empty, and gone afterwards."""

    root: Path
    name: str
    shards: Sequence[Shard]
    scratch: Path
    log: Log
    stop: threading.Event
    tally: Tally

    @property
    def package(self) -> Path:
        """The model package, where the job has one."""
        return self.root / "processing/input/model/model.tar.gz"


def run(work: Callable[[Job], None]) -> int:
    """Runs a job and returns its exit code. `work` is called when there are slides."""
    root = Path(os.environ.get("SLIDEWAY_ML_ROOT", "/opt/ml"))
    log = Log()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: stop.set())
    started = time.monotonic()
    tally = Tally()
    hangs = False
    try:
        shards = shards_of_host(root)
        if shards:
            log.bind(runId=shards[0].run_id, model=shards[0].model.name)
        slides = sum(len(shard.slides) for shard in shards)
        log.event("job-started", slides=slides, shards=[shard.shard for shard in shards])
        if slides:
            with tempfile.TemporaryDirectory(prefix="slideway-", dir=os.environ.get("SLIDEWAY_SCRATCH")) as scratch:
                work(Job(root, _job_name(root), shards, Path(scratch), log, stop, tally))
        code, message = _ending(tally)
    except Stopped:
        code, message = _STOPPED, f"Stopped before the end. {_counts(tally)}"
    except JobFailed as error:
        code, message = 1, f"{error.name}: {error}"
        hangs = isinstance(error, ModelHangs)
    except Exception as error:
        code, message = 1, f"InternalError: {type(error).__name__}: {error}"
    _write_message(root, message)
    log.event(
        "job-ended",
        level="info" if code == 0 else "error",
        exitCode=code,
        message=_shorten(message),
        seconds=round(time.monotonic() - started, 3),
        slides=dict(sorted(tally.states.items())),
        bound=shares(tally.busy),
    )
    if hangs:  # not by way of the interpreter's end, which would wait for the model's thread
        sys.stdout.flush()
        os._exit(code)
    return code


def shards_of_host(root: Path) -> list[Shard]:
    """The shards of this instance: hosts in order, shard j to host j mod n. Raises ShardInvalid."""
    try:
        resources = json.loads((root / "config/resourceconfig.json").read_text())
        hosts = sorted(resources["hosts"])
        host = hosts.index(resources["current_host"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardInvalid(f"config/resourceconfig.json: {type(error).__name__}: {error}") from error
    files = sorted((root / "processing/input/shards").glob("shard-*.json"))
    if not files:
        raise ShardInvalid("The job has no shards.")
    shards = [parse_shard(file.read_bytes(), file.name) for file in files[host :: len(hosts)]]
    if len({shard.model for shard in shards}) > 1:
        raise ShardInvalid("The shards of one job name different models.")
    return shards


def process(job: Job) -> None:
    from slideway_inference.features import import_h5py
    from slideway_inference.inference import Inference  # it imports PyTorch, which is slow, and tiling needs none
    from slideway_inference.model.package import open_package
    from slideway_inference.model.predictors import load_predictors

    package = open_package(job.package, job.shards[0].model, job.scratch / "model")
    if package.spec.task == "embedding":
        import_h5py()
    cores = processors()
    decoder = os.environ.get("SLIDEWAY_JPEG_DECODER", "processor")
    predictors = load_predictors(package, cores, decode=decoder == "device")
    readers = readers_for(cores - sum(predictor.on_gpu for predictor in predictors))
    device = predictors[0].device_name
    job.log.event(
        "model-loaded", version=package.spec.version, device=device, devices=len(predictors), jpegDecoder=decoder
    )
    store = Store()
    work_slides(job, store, Inference(store, package.spec, package.head(), predictors, job.name), readers)


def work_slides(job: Job, store: Store, task: Task, readers: int) -> None:
    """Raises Stopped."""
    pipeline = Pipeline(
        store=store,
        task=task,
        readers=readers,
        scratch=job.scratch,
        log=job.log,
        stop=job.stop,
        tally=job.tally,
    )
    pipeline.run(job.shards)


def _job_name(root: Path) -> str:
    try:
        return str(json.loads((root / "config/processingjobconfig.json").read_text())["ProcessingJobName"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardInvalid(f"config/processingjobconfig.json: {type(error).__name__}: {error}") from error


def _ending(tally: Tally) -> tuple[int, str]:
    total = sum(tally.states.values())
    failed = tally.states["FAILED"]
    message = " ".join([_counts(tally), *tally.reasons])
    if total and failed == total:
        return 1, f"Every slide failed. {message}"
    return 0, message


def _counts(tally: Tally) -> str:
    total = sum(tally.states.values())
    states = ", ".join(f"{count} {state}" for state, count in sorted(tally.states.items()))
    return f"{total} slides: {states}." if total else "No slides."


def _shorten(message: str) -> str:
    data = message.encode()
    return message if len(data) <= _MESSAGE_BYTES else data[: _MESSAGE_BYTES - 3].decode(errors="ignore") + "…"


def _write_message(root: Path, message: str) -> None:
    try:
        (root / "output").mkdir(parents=True, exist_ok=True)
        (root / "output/message").write_text(_shorten(message), encoding="utf-8")
    except OSError as error:
        print(f"output/message cannot be written: {error.strerror}", file=sys.stderr)
