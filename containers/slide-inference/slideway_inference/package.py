"""`package build` and `package check`: makes a model.tar.gz, and tries one as both modes would, before anybody
waits for a job. Each prints one JSON object on stdout; what libraries and a package's code print goes to stderr.

`check` holds the package against the contract, runs generated tiles through the model as a Processing job does,
then starts the container's own `serve` with the unpacked package, sends it the same tiles as a pack over HTTP, and
compares the numbers."""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import numpy.typing as npt

from slideway_inference.contracts import MODEL_SECONDS
from slideway_inference.errors import (
    JobFailed,
    ModelError,
    ModelFormatNotSupported,
    ModelPackageInvalid,
    SlidewayError,
)

if TYPE_CHECKING:
    from slideway_inference.model.package import Package
    from slideway_inference.model.predictor import Predictor

_SHOWN = 8
_START_SECONDS = 60.0
_CONTAINER = Path(__file__).resolve().parents[1]
_TOLERANCE = 1e-5
"""Between the modes, beside the numbers' own size: batches of another size may sum in another order."""
_HALF_TOLERANCE = 2e-3
"""The same on a GPU, where the model runs in half precision."""

Tiles = npt.NDArray[np.uint8]


class ModelDiffers(JobFailed):
    """The model gives other numbers in one mode than in the other, or in another batch."""


class ServeFailed(JobFailed):
    """`serve` does not start or answer with this package."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="make a model.tar.gz; the same files give the same bytes")
    build.add_argument("--model", type=Path, required=True, help="model.json")
    build.add_argument(
        "--from", dest="source", type=Path, required=True, help="model.pt, model.onnx, or a folder with code/"
    )
    build.add_argument("--head", type=Path, help="TorchScript of the slide-level head that model.json names")
    build.add_argument("--out", type=Path, required=True, help="the package to write")
    check = actions.add_parser("check", help="try a model.tar.gz in both modes")
    check.add_argument("package", type=Path)
    check.add_argument("--tiles", type=int, default=64, help="generated tiles (default 64)")
    check.add_argument("--seconds", type=float, default=120, help="for each mode at most (default 120)")
    check.add_argument("--no-code", action="store_true", help="refuse code/inference.py, as some stages do")


def run(options: argparse.Namespace) -> int:
    with _stdout_aside() as out:
        try:
            made = _build(options) if options.action == "build" else _check(options, out)
            code = 0
        except SlidewayError as error:
            made, code = {"ok": False, "error": error.name, "message": str(error)}, 1
        except OSError as error:
            made, code = {"ok": False, "error": "FileUnusable", "message": str(error)}, 1
        _print(made, out)
    return code


def _print(made: dict[str, Any], out: TextIO) -> None:
    print(json.dumps(made, ensure_ascii=False, indent=2), file=out, flush=True)


@contextmanager
def _stdout_aside() -> Iterator[TextIO]:
    """Whatever else is printed, also by libraries in C, goes to stderr meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as out:
            yield out
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


# --- build -----------------------------------------------------------------------------------------------------


def _build(options: argparse.Namespace) -> dict[str, Any]:
    from slideway_inference.model.package import file_digest, packed, unpack
    from slideway_inference.model.spec import parse_model

    spec = parse_model(options.model.read_bytes())
    files: dict[str, Path] = {"model.json": options.model, **_content(options.source)}
    if options.head is not None:
        if spec.head is None:
            raise ModelPackageInvalid("model.json: a head is given, but model.json has no head.")
        files[spec.head.file] = options.head
    options.out.parent.mkdir(parents=True, exist_ok=True)
    made = options.out.with_name(options.out.name + ".part")
    made.write_bytes(packed(files))
    try:
        with tempfile.TemporaryDirectory() as folder:
            package = unpack(made, Path(folder))
        made.replace(options.out)
    finally:
        made.unlink(missing_ok=True)
    return {
        "ok": True,
        "file": str(options.out),
        "name": spec.name,
        "version": spec.version,
        "digest": file_digest(options.out),
        "bytes": options.out.stat().st_size,
        "format": package.format,
        "files": [{"name": name, "bytes": file.stat().st_size} for name, file in files.items()],
    }


def _content(source: Path) -> dict[str, Path]:
    """What of a file or folder goes into the package, sorted by name; nothing hidden, nothing compiled."""
    if source.is_dir():
        found = {
            str(file.relative_to(source).as_posix()): file
            for file in sorted(source.rglob("*"))
            if file.is_file()
            and not any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(source).parts)
        }
        found.pop("model.json", None)
        if "code/inference.py" not in found:
            raise ModelPackageInvalid(f"{source.name}/ holds no code/inference.py.")
        return found
    name = {".pt": "model.pt", ".pth": "model.pt", ".onnx": "model.onnx"}.get(source.suffix)
    if name is None:
        raise ModelPackageInvalid(f"{source.name} is neither .pt, .onnx nor a folder with code/inference.py.")
    return {name: source}


# --- check -----------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace, out: TextIO) -> dict[str, Any]:
    from slideway_inference.model.package import file_digest, unpack
    from slideway_inference.model.predictors import load_predictors
    from slideway_inference.pipeline import processors

    if not options.package.is_file():
        raise ModelPackageInvalid(f"{options.package.name} is not there.")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        package = unpack(options.package, root / "model")
        if options.no_code and package.format == "code":
            raise ModelFormatNotSupported("code/inference.py is refused: export the model as TorchScript or ONNX.")
        spec = package.spec
        predictors = load_predictors(package, processors())
        head = package.head()
        tiles = generated_tiles(spec.px, max(2, options.tiles))
        warnings = _warnings(package)
        tolerance = _HALF_TOLERANCE if predictors[0].on_gpu else _TOLERANCE
        with _within(options.seconds, root, out):
            expected, direct, slowest = _directly(predictors, tiles, spec.batch)
            _same(expected[:1], predictors[0].run(tiles[:1]), tolerance, "alone and in a batch")
        served, over_http = _served(root, tiles, options.seconds)
        difference = _same(expected, served, tolerance, "in a Processing job and behind serve")
        limit = spec.model_seconds or MODEL_SECONDS
        if slowest > limit:
            warnings.append(
                f"A batch of {min(spec.batch, len(tiles))} tiles took {slowest:.1f} s on "
                f"{predictors[0].device_name}, but may take {limit} s: give the model more (modelSeconds), or make "
                "its batch smaller."
            )
        if expected.std(axis=0).max() == 0:
            warnings.append("Every generated tile has the same answer: is the model trained?")
        if spec.task == "classification" and not ((expected >= 0) & (expected <= 1)).all():
            warnings.append("A classification's outputs are not within 0 and 1: put the softmax into the model.")
        report: dict[str, Any] = {
            "ok": True,
            "name": spec.name,
            "version": spec.version,
            "license": spec.license,
            "digest": file_digest(options.package),
            "bytes": options.package.stat().st_size,
            "format": package.format,
            "task": spec.task,
            "mode": spec.mode,
            **({"dimensions": len(spec.outputs)} if spec.task == "embedding" else {"outputs": list(spec.outputs)}),
            "tile": {"px": spec.px, "mpp": spec.mpp, "overlap": spec.overlap},
            "device": predictors[0].device_name,
            "tiles": len(tiles),
            "maxDifference": difference,
            "tilesPerSecond": {"processing": direct, "transform": over_http},
            "sample": dict(zip(spec.outputs[:_SHOWN], expected[0].tolist(), strict=False)),
        }
        if head is not None:
            answer = head.run(expected)
            report["head"] = {
                "task": head.spec.task,
                "outputs": answer.outputs,
                "attention": head.spec.attention,
            }
        return {**report, "warnings": warnings}


@contextmanager
def _within(seconds: float, scratch: Path, out: TextIO) -> Iterator[None]:
    """Ends the process where it takes longer: nothing else ends a model that never answers."""

    def give_up() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        error = ModelError(f"The model did not answer within {seconds:g} s.")
        _print({"ok": False, "error": error.name, "message": str(error)}, out)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def generated_tiles(px: int, count: int) -> Tiles:
    """Pictures with structure of every size in the colours of tissue, light and dark, each other than the rest."""
    random = np.random.default_rng(1)
    tiles = np.empty((count, px, px, 3), np.uint8)
    for index in range(count):
        field = np.zeros((px, px, 3))
        for cells in (2, 8, 32):
            small = random.normal(size=(cells, cells, 3))
            steps = -(-px // cells)
            field += small.repeat(steps, 0)[:px].repeat(steps, 1)[:, :px] / np.sqrt(cells)
        colour = np.array([205, 150, 190]) + 40 * (random.random() - 0.5)
        tiles[index] = np.clip(colour + 45 * field, 0, 255)
    return tiles


def _warnings(package: Package) -> list[str]:
    found = []
    if (package.folder / "code/requirements.txt").is_file():
        found.append("code/requirements.txt is not installed: jobs have no network. The image must hold it.")
    if package.spec.batch * package.spec.px**2 * 3 > 32 << 20:
        held = max(1, (32 << 20) // (package.spec.px**2 * 3))
        found.append(f"batch is held to {held}: 32 MB of pixels.")
    return found


def _directly(
    predictors: list[Predictor], tiles: Tiles, batch: int
) -> tuple[npt.NDArray[np.float32], float, float]:
    """Answers for the tiles, tiles a second, the first batch left out, and the seconds of the slowest batch."""
    took: list[float] = []

    def run(first: int) -> npt.NDArray[np.float32]:
        started = time.perf_counter()
        answer = predictors[0].run(tiles[first : first + batch])
        took.append(time.perf_counter() - started)
        return answer

    run(0)
    answers = [run(first) for first in range(0, len(tiles), batch)]
    return np.concatenate(answers), round(len(tiles) / sum(took[1:]), 1), max(took)


def _same(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32], tolerance: float, when: str) -> float:
    """The largest difference. Raises ModelDiffers."""
    difference = np.abs(one - other)
    if (difference > tolerance * np.maximum(1, np.abs(one))).any():
        raise ModelDiffers(
            f"The model answers differently {when}: by up to {difference.max():.3g}. Does it look at other "
            "tiles of its batch, keep something between calls, or draw random numbers?"
        )
    return float(difference.max())


def _served(root: Path, tiles: Tiles, seconds: float) -> tuple[npt.NDArray[np.float32], float]:
    """The same tiles as a pack of plain pixels through a `serve` process. Raises ServeFailed, ModelError."""
    pack = _pack(tiles)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "SLIDEWAY_ML_ROOT": str(root),
        "SLIDEWAY_BIND_HOST": "127.0.0.1",
        "SLIDEWAY_MODEL_SECONDS": str(seconds),
        "SAGEMAKER_BIND_TO_PORT": str(port),
        "SAGEMAKER_MAX_PAYLOAD_IN_MB": str(max(100, (len(pack) >> 20) + 1)),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_CONTAINER), os.environ.get("PYTHONPATH", "")])),
    }
    server = subprocess.Popen([sys.executable, "-m", "slideway_inference", "serve"], env=environment)
    try:
        _await(server, port, max(seconds, _START_SECONDS))
        _post(port, _pack(tiles[:2]), seconds)
        started = time.perf_counter()
        lines = _post(port, pack, seconds)
        took = time.perf_counter() - started
    except (OSError, http.client.HTTPException) as error:
        raise ServeFailed(f"serve does not answer: {type(error).__name__}: {error}") from error
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
    answers = [json.loads(line) for line in lines.splitlines()]
    errors = [answer["error"] for answer in answers if "error" in answer]
    if errors:
        raise ModelError(f"Behind serve {len(errors)} of {len(answers)} tiles failed: {errors[0]['message']}")
    return np.array([answer["values"] for answer in answers], np.float32), round(len(tiles) / took, 1)


def _pack(tiles: Tiles) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index, tile in enumerate(tiles):
            pixels = io.BytesIO()
            np.save(pixels, tile)
            member = tarfile.TarInfo(f"{index}_0.npy")
            member.size = len(pixels.getvalue())
            tar.addfile(member, io.BytesIO(pixels.getvalue()))
    return out.getvalue()


def _await(server: subprocess.Popen[bytes], port: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.poll() is not None:
            raise ServeFailed(f"serve has ended with exit code {server.returncode}; its log says why.")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=max(1.0, until - time.monotonic()))
            connection.request("GET", "/ping")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise ServeFailed(f"serve was not ready within {seconds:g} s.")


def _post(port: int, pack: bytes, seconds: float) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds + 30)
    connection.request("POST", "/invocations", pack, {"Content-Type": "application/x-tar"})
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        try:
            told = json.loads(body)
            reason = f"{told['error']}: {told['message']}"
        except (ValueError, KeyError, TypeError):
            reason = body.decode(errors="replace")[:200]
        raise ServeFailed(f"serve answered {response.status}: {reason}")
    return body
