"""Packages with their own code, `code/inference.py`, called as SageMaker's PyTorch serving calls it: `model_fn`
once, then `input_fn`, `predict_fn` and `output_fn` for each batch, or `transform_fn` in place of these three.

    model_fn(model_dir)                     the folder of the package
    input_fn(body, content_type)            .npy of uint8 (n, px, px, 3), `application/x-npy`; without it the batch
                                            is normalised by model.json's `input`, as it is for TorchScript
    predict_fn(data, model)                 without it: model(data)
    output_fn(prediction, accept)           `application/json`; without it the prediction itself is the answer
    transform_fn(model, body, content_type, accept)

Each may take one argument more, which SageMaker calls context: None here. An answer is an array or a tensor
(n, outputs), or its JSON or .npy, or (body, content type) of those.

The code runs in the container's own process, with everything that the job may do."""

from __future__ import annotations

import importlib.util
import inspect
import io
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import torch

from slideway_inference.errors import ModelError, ModelPackageInvalid
from slideway_inference.model.package import Package
from slideway_inference.model.predictor import Normaliser, Predictor, Tiles, first_line

_NPY, _JSON = "application/x-npy", "application/json"


class CodePredictor(Predictor):
    """One for each GPU, or one alone on the processors: nobody knows whether the code bears several threads."""

    def __init__(self, package: Package, device: torch.device) -> None:
        """Raises ModelPackageInvalid when the code cannot be imported or `model_fn` raises."""
        super().__init__(package.spec, device)
        try:
            with self._here():
                module = _module(package)
                functions = _Functions(module)
                self._functions = functions
                self._model = functions.model(str(package.folder))
        except ModelPackageInvalid:
            raise
        except (Exception, SystemExit) as error:
            raise ModelPackageInvalid(f"code/inference.py cannot be loaded: {_reason(error)}") from error
        self._normalise = Normaliser(package.spec, device, torch.float32)
        if isinstance(self._model, torch.nn.Module) and functions.predict is None and functions.transform is None:
            self._model = self._model.to(device).eval()

    def _here(self) -> Any:  # noqa: ANN401
        """What the code calls "cuda" is this predictor's own GPU."""
        return torch.cuda.device(self.device) if self.on_gpu else nullcontext()

    def twin(self) -> Predictor:
        raise NotImplementedError("A package's own code runs in one thread a device.")

    def _begin(self, tiles: Tiles) -> Callable[[], object]:
        try:
            with self._here():
                answer = self._answer(tiles)
        except (Exception, SystemExit) as error:
            raise ModelError(f"code/inference.py raised: {_reason(error)}") from error
        return lambda: answer

    def _answer(self, tiles: Tiles) -> object:
        functions = self._functions
        if functions.transform is not None:
            return _decoded(functions.transform(self._model, _npy(tiles), _NPY, _JSON))
        data: object
        if functions.input is not None:
            data = functions.input(_npy(tiles), _NPY)
        else:
            batch = torch.from_numpy(tiles).to(self.device, torch.float32, copy=True)
            data = self._normalise(batch)
        predict = functions.predict
        prediction = predict(data, self._model) if predict else self._model(_moved(data, self.device))
        if functions.output is None:
            return _decoded(prediction)
        return _decoded(functions.output(prediction, _JSON))


class _Functions:
    """What the package's code brings. Raises ModelPackageInvalid."""

    def __init__(self, module: ModuleType) -> None:
        model = _function(module, "model_fn", 1)
        if model is None:
            raise ModelPackageInvalid("code/inference.py has no model_fn.")
        self.model = model
        self.transform = _function(module, "transform_fn", 4)
        self.input = _function(module, "input_fn", 2)
        self.predict = _function(module, "predict_fn", 2)
        self.output = _function(module, "output_fn", 2)
        if self.transform and (self.input or self.predict or self.output):
            raise ModelPackageInvalid(
                "code/inference.py has transform_fn, which stands in place of input_fn, predict_fn and output_fn."
            )


def _function(module: ModuleType, name: str, count: int) -> Callable[..., Any] | None:
    """The function as it is called with `count` arguments, whether or not it takes SageMaker's context too."""
    found = getattr(module, name, None)
    if found is None:
        return None
    try:
        takes = len(inspect.signature(found).parameters)
    except (TypeError, ValueError) as error:
        raise ModelPackageInvalid(f"code/inference.py's {name} is no function.") from error
    if takes not in (count, count + 1):
        raise ModelPackageInvalid(f"code/inference.py's {name} must take {count} arguments, not {takes}.")
    return found if takes == count else lambda *given: found(*given, None)


def _module(package: Package) -> ModuleType:
    """Imports it under the name that SageMaker gives it; modules beside it are found by their own names."""
    folder = str(package.weights.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location("inference", package.weights)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["inference"] = module
    spec.loader.exec_module(module)
    return module


def _moved(data: object, device: torch.device) -> object:
    return data.to(device) if isinstance(data, torch.Tensor) else data


def _npy(tiles: Tiles) -> bytes:
    out = io.BytesIO()
    np.save(out, tiles)
    return out.getvalue()


def _decoded(answer: object) -> object:
    """An array of whatever the code answered with, where it can be one."""
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], str):
        answer = answer[0]
    if isinstance(answer, bytearray | memoryview):
        answer = bytes(answer)
    if isinstance(answer, bytes) and answer.startswith(b"\x93NUMPY"):
        answer = np.load(io.BytesIO(answer), allow_pickle=False)
    elif isinstance(answer, bytes | str):
        answer = json.loads(answer)
        if isinstance(answer, dict):
            answer = answer.get("predictions")
    return np.asarray(answer, np.float32) if isinstance(answer, list) else answer


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
