"""Model packages: model.tar.gz is checked against the digest that the run pinned, its model.json against the
contract (`modelSchema` of core/contracts.ts), and its TorchScript is loaded onto every device of the machine."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch

from slideway_inference.contracts import ModelRef
from slideway_inference.errors import (
    ModelDigestMismatch,
    ModelError,
    ModelFormatNotSupported,
    ModelPackageInvalid,
)

_JSON_LIMIT = 1 << 20
_CPU_WORKERS = 8
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}")
_OUTPUT = re.compile(r"[a-z][a-z0-9_]{0,62}")
_AGGREGATES = {"mean", "median", "p10", "p90", "max", "top_k_mean"}


@dataclass(frozen=True)
class ModelSpec:
    """What model.json says, as far as inference needs it."""

    name: str
    version: str
    task: Literal["classification", "regression", "embedding"]
    outputs: tuple[str, ...]
    px: int
    mpp: float
    overlap: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: Literal["NCHW", "NHWC"]
    range: tuple[float, float]
    mode: Literal["processing", "transform"]
    batch: int

    @property
    def columns(self) -> list[str]:
        """Columns of tiles.parquet."""
        prefix = "prob" if self.task == "classification" else "value"
        return [f"{prefix}_{output}" for output in self.outputs]


def parse_model(text: str | bytes) -> ModelSpec:
    """Raises ModelPackageInvalid, naming the field and what it must be."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ModelPackageInvalid(f"model.json is not JSON: {error}") from error
    top = _Fields(document, "model.json")
    tile = _Fields(top.get("tile"), "tile")
    given = _Fields(top.get("input"), "input")
    heatmap = top.get("heatmap", None)
    spec = ModelSpec(
        name=top.text("name", _NAME),
        version=top.text("version", _VERSION),
        task=cast(Any, top.choice("task", ("classification", "regression", "embedding"))),
        outputs=tuple(top.texts("outputs", _OUTPUT)),
        px=tile.integer("px", 16, 4096),
        mpp=tile.number("mpp", above=0, most=100),
        overlap=tile.integer("overlap", 0, 4096, default=0),
        mean=tuple(given.numbers("mean", 3)),
        std=tuple(given.numbers("std", 3)),
        layout=cast(Any, given.choice("layout", ("NCHW", "NHWC"), default="NCHW")),
        range=cast(Any, tuple(given.numbers("range", 2, default=[0, 1]))),
        mode=cast(Any, top.choice("mode", ("processing", "transform"))),
        batch=top.integer("batch", 1, 65536, default=64),
    )
    top.text("license", re.compile(r"(?s).+"))
    top.integer("top_k", 1, 1 << 53, default=10)
    if set(top.texts("aggregate", _OUTPUT, default=["mean"])) - _AGGREGATES:
        raise ModelPackageInvalid(f"model.json: aggregate must be of {', '.join(sorted(_AGGREGATES))}")
    if min(spec.std) <= 0:
        raise ModelPackageInvalid("model.json: input.std must be positive")
    if len(set(spec.outputs)) != len(spec.outputs):
        raise ModelPackageInvalid("model.json: outputs must differ from each other")
    if spec.overlap >= spec.px:
        raise ModelPackageInvalid("model.json: tile.overlap must be less than tile.px")
    if heatmap is not None and _Fields(heatmap, "heatmap").text("output", _OUTPUT) not in spec.outputs:
        raise ModelPackageInvalid("model.json: heatmap.output must be one of outputs")
    return spec


_REQUIRED = object()


class _Fields:
    """Typed access to a JSON object; every complaint names the field."""

    def __init__(self, document: object, where: str) -> None:
        if not isinstance(document, dict):
            raise ModelPackageInvalid(f"model.json: {where} must be an object")
        self._document = document
        self._where = "" if where == "model.json" else f"{where}."

    def get(self, field: str, default: object = _REQUIRED) -> object:
        value = self._document.get(field, default)
        if value is _REQUIRED:
            raise self._wrong(field, "given")
        return value

    def text(self, field: str, pattern: re.Pattern[str]) -> str:
        value = self.get(field)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self._wrong(field, f"a string like {pattern.pattern}")
        return value

    def texts(self, field: str, pattern: re.Pattern[str], default: object = _REQUIRED) -> list[str]:
        value = self.get(field, default)
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(item, str) and pattern.fullmatch(item) for item in value)
        ):
            raise self._wrong(field, f"a list of strings like {pattern.pattern}")
        return value

    def choice(self, field: str, choices: tuple[str, ...], default: object = _REQUIRED) -> str:
        value = self.get(field, default)
        if value not in choices:
            raise self._wrong(field, f"one of {', '.join(choices)}")
        return str(value)

    def integer(self, field: str, least: int, most: int, default: object = _REQUIRED) -> int:
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise self._wrong(field, "an integer")
        if not least <= value <= most:
            raise self._wrong(field, f"from {least} to {most}")
        return int(value)

    def number(self, field: str, above: float, most: float) -> float:
        value = self.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= most:
            raise self._wrong(field, f"a number above {above}, at most {most}")
        return float(value)

    def numbers(self, field: str, count: int, default: object = _REQUIRED) -> list[float]:
        value = self.get(field, default)
        if (
            not isinstance(value, list)
            or len(value) != count
            or not all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
        ):
            raise self._wrong(field, f"a list of {count} numbers")
        return [float(item) for item in value]

    def _wrong(self, field: str, wanted: str) -> ModelPackageInvalid:
        return ModelPackageInvalid(f"model.json: {self._where}{field} must be {wanted}")


def open_package(archive: Path, ref: ModelRef, folder: Path) -> tuple[ModelSpec, Path]:
    """Checks a package against its pin and unpacks what inference needs: the spec and the path of model.pt.
    Raises ModelDigestMismatch, ModelPackageInvalid, ModelFormatNotSupported."""
    if not archive.is_file():
        raise ModelPackageInvalid("The job has no model.tar.gz.")
    sha256 = hashlib.sha256()
    with archive.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    if f"sha256:{sha256.hexdigest()}" != ref.digest:
        raise ModelDigestMismatch(f"model.tar.gz is sha256:{sha256.hexdigest()}; the run pinned {ref.digest}.")
    text, weights, names = _unpack(archive, folder)
    if text is None:
        raise ModelPackageInvalid("model.tar.gz holds no model.json.")
    spec = parse_model(text)
    if (spec.name, spec.version) != (ref.name, ref.version):
        raise ModelPackageInvalid(
            f"model.json is {spec.name} {spec.version}; the run asked for {ref.name} {ref.version}."
        )
    if spec.mode != "processing":
        raise ModelFormatNotSupported(f"The mode {spec.mode} is not run by this job: set mode to processing.")
    if weights is None:
        other = (
            "model.onnx" if "model.onnx" in names else "code/inference.py" if "code/inference.py" in names else ""
        )
        if other:
            raise ModelFormatNotSupported(f"{other} is not run yet: export the model as TorchScript, model.pt.")
        raise ModelPackageInvalid("model.tar.gz holds no model.pt.")
    return spec, weights


def _unpack(archive: Path, folder: Path) -> tuple[bytes | None, Path | None, set[str]]:
    """Only plain files below the package's root are accepted, and only model.pt is written, by our own name."""
    text: bytes | None = None
    weights: Path | None = None
    names = set()
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if member.isdir():
                    continue
                if path.is_absolute() or ".." in path.parts or not member.isreg():
                    raise ModelPackageInvalid("model.tar.gz holds a link, a device or a path outside of it.")
                names.add(str(path))
                source = tar.extractfile(member)
                assert source is not None
                if str(path) == "model.json":
                    if member.size > _JSON_LIMIT:
                        raise ModelPackageInvalid("model.json is larger than 1 MB.")
                    text = source.read()
                elif str(path) == "model.pt":
                    weights = folder / "model.pt"
                    with weights.open("wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ModelPackageInvalid(f"model.tar.gz cannot be unpacked: {error}") from error
    return text, weights, names


Tiles = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float32]

_CACHED_BYTES = 6 << 20
"""Floats that a processor's model gets at once: larger batches leave the cache, and processors then wait for memory
instead of working side by side."""
_IN_FLIGHT = 2
"""Batches on a GPU at once: while one is computed the next is copied."""


class Predictor:
    """The model on one device, for one thread."""

    def __init__(self, spec: ModelSpec, weights: Path, device: torch.device, model: object = None) -> None:
        """`model` is one that is loaded already, on the same device; its weights are shared. Raises
        ModelPackageInvalid when the weights cannot be loaded."""
        self._spec = spec
        self._device = device
        try:
            self._model: Any = model or torch.jit.load(str(weights), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelPackageInvalid(f"model.pt is not TorchScript that loads: {_first_line(error)}") from error
        low, high = spec.range
        self._scale = self._channels([(high - low) / 255 / std for std in spec.std])
        self._shift = self._channels([(low - mean) / std for mean, std in zip(spec.mean, spec.std, strict=True)])
        self._scaled = any((high - low) / 255 != std for std in spec.std)
        self._shifted = any(mean != low for mean in spec.mean)
        self._input: torch.Tensor | None = None
        self._stages: list[_Stage] = []
        self._turn = 0
        if self.on_gpu:
            self._copying = torch.cuda.Stream(device)
            self._computing = torch.cuda.Stream(device)

    def _channels(self, values: list[float]) -> torch.Tensor | float:
        """A number per channel as it broadcasts over a batch; one number where they are equal, which is faster."""
        if len(set(values)) == 1:
            return values[0]
        tensor = torch.tensor(values, dtype=torch.float16 if self.on_gpu else torch.float32, device=self._device)
        return tensor.reshape((1, 3, 1, 1) if self._spec.layout == "NCHW" else (1, 1, 1, 3))

    @property
    def on_gpu(self) -> bool:
        return str(self._device.type) == "cuda"

    @property
    def device_name(self) -> str:
        return str(torch.cuda.get_device_name(self._device)) if self.on_gpu else "cpu"

    @property
    def in_flight(self) -> int:
        """How many batches may be submitted before the first of their answers is asked for."""
        return _IN_FLIGHT if self.on_gpu else 1

    def twin(self) -> Predictor:
        """Another predictor with the same weights, for another thread."""
        return Predictor(self._spec, Path(), self._device, self._model)

    def run(self, tiles: Tiles) -> Values:
        """Tiles (n, px, px, 3) to outputs (n, outputs), float32. Raises ModelError."""
        return self.submit(tiles)()

    def submit(self, tiles: Tiles) -> Callable[[], Values]:
        """Begins with a batch; `tiles` may be overwritten afterwards. What it answers waits for the outputs, as
        `run` gives them. Both raise ModelError."""
        try:
            with torch.inference_mode():
                answer = self._on_gpu(tiles) if self.on_gpu else self._on_cpu(tiles)
        except Exception as error:  # TorchScript's own error is no RuntimeError
            raise ModelError(f"The model raised: {_first_line(error)}") from error
        return lambda: self._checked(answer(), len(tiles))

    def _checked(self, answer: object, count: int) -> Values:
        expected = (count, len(self._spec.outputs))
        if not isinstance(answer, torch.Tensor) or tuple(answer.shape) != expected:
            shape = tuple(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
            raise ModelError(f"The model must answer with a tensor of shape {expected}, not {shape}.")
        values = answer.float().numpy()
        if not np.isfinite(values).all():
            raise ModelError("The model answered with numbers that are not finite.")
        return cast(Values, values)

    def _on_cpu(self, tiles: Tiles) -> Callable[[], object]:
        step = max(1, _CACHED_BYTES // (tiles[0].size * 4))
        if self._input is None or self._input.shape[1:] != tiles.shape[1:]:
            self._input = torch.empty((step, *tiles.shape[1:]))  # kept: new pages would cost more than the sums
        answers: list[object] = []
        for part in torch.from_numpy(tiles).split(step):
            answer = self._forward(part, self._input[: len(part)])
            # It may be a view of the input, which the next part overwrites.
            answers.append(answer.clone() if isinstance(answer, torch.Tensor) else answer)
        whole = len(answers) > 1 and all(isinstance(answer, torch.Tensor) for answer in answers)
        together = torch.cat(cast(list[torch.Tensor], answers)) if whole else answers[0]
        return lambda: together

    def _on_gpu(self, tiles: Tiles) -> Callable[[], object]:
        """Pageable memory to pinned by the processor, from there to the device beside the batch before."""
        stage = self._stage(tiles.shape)
        count = len(tiles)
        stage.pinned[:count].copy_(torch.from_numpy(tiles))
        with torch.cuda.stream(self._copying):
            stage.device[:count].copy_(stage.pinned[:count], non_blocking=True)
        self._computing.wait_stream(self._copying)
        with torch.cuda.stream(self._computing), torch.autocast("cuda", torch.float16):
            answer = self._forward(stage.device[:count], None)
            if isinstance(answer, torch.Tensor):
                target = torch.empty(answer.shape, dtype=torch.float32, pin_memory=True)
                answer = target.copy_(answer, non_blocking=True)
            stage.done.record(self._computing)

        def wait() -> object:
            try:
                stage.done.synchronize()
            except RuntimeError as error:
                raise ModelError(f"The model raised: {_first_line(error)}") from error
            return answer

        return wait

    def _stage(self, shape: tuple[int, ...]) -> _Stage:
        """The next of the buffers, once the batch that was in it is computed."""
        if not self._stages or self._stages[0].pinned.shape[0] < shape[0]:
            torch.cuda.synchronize(self._device)
            self._stages = [_Stage(shape, self._device) for _ in range(_IN_FLIGHT)]
        self._turn = (self._turn + 1) % _IN_FLIGHT
        stage = self._stages[self._turn]
        stage.done.synchronize()
        return stage

    def _forward(self, tiles: torch.Tensor, target: torch.Tensor | None) -> object:
        """`target` is where the batch's floats go; None: new ones, in half precision."""
        try:
            batch = tiles.to(torch.float16) if target is None else target.copy_(tiles)
            if self._spec.layout == "NCHW":
                # A view with channels last: no copy, and the memory format that convolutions like best.
                batch = batch.permute(0, 3, 1, 2)
            if self._scaled:
                batch.mul_(self._scale)
            if self._shifted:
                batch.add_(self._shift)
            return self._model(batch)
        except Exception as error:
            # Where a batch does not fit in the GPU's memory, halves may.
            if "out of memory" not in str(error) or len(tiles) == 1:
                raise
        if tiles.is_cuda:
            torch.cuda.empty_cache()
        half = len(tiles) // 2
        parts = [
            self._forward(tiles[part], None if target is None else target[part])
            for part in (slice(half), slice(half, None))
        ]
        if not all(isinstance(part, torch.Tensor) for part in parts):
            return parts[0]
        return torch.cat(cast(list[torch.Tensor], parts))


class _Stage:
    """What a batch passes through on its way to a GPU."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        self.device = torch.empty(shape, dtype=torch.uint8, device=device)
        self.done = torch.cuda.Event()


def _first_line(error: Exception) -> str:
    """TorchScript puts the reason last, after its stack of code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def load_predictors(spec: ModelSpec, weights: Path, cores: int) -> list[Predictor]:
    """One per GPU. Without a GPU as many as there are processors to share, with the same weights: batches side by
    side need no waiting for each other, as threads within a batch do, and give way to decoding as it needs."""
    if torch.cuda.is_available():
        return [Predictor(spec, weights, torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    workers = min(cores, _CPU_WORKERS)
    torch.set_num_threads(max(1, cores // workers))
    first = Predictor(spec, weights, torch.device("cpu"))
    return [first, *(first.twin() for _ in range(workers - 1))]
