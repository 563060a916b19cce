"""Loads a package's model onto every device of the machine."""

from __future__ import annotations

import torch

from slideway_inference.model.code import CodePredictor
from slideway_inference.model.device_decoder import DeviceDecoder
from slideway_inference.model.onnx import OnnxPredictor
from slideway_inference.model.package import Format, Package
from slideway_inference.model.predictor import Predictor
from slideway_inference.model.torchscript import TorchScriptPredictor

_CPU_WORKERS = 8
_PREDICTORS: dict[Format, type[TorchScriptPredictor] | type[OnnxPredictor] | type[CodePredictor]] = {
    "torchscript": TorchScriptPredictor,
    "onnx": OnnxPredictor,
    "code": CodePredictor,
}


def load_predictor(package: Package, device: torch.device) -> Predictor:
    """Raises ModelPackageInvalid, ModelFormatNotSupported."""
    return _PREDICTORS[package.format](package, device)


def load_predictors(package: Package, cores: int, *, decode: bool = False) -> list[Predictor]:
    """One per GPU, or one per processor; with `decode` such that decode tiles themselves. Raises
    DecoderUnavailable, ModelPackageInvalid, ModelFormatNotSupported."""
    predictors = _load_predictors(package, cores)
    if decode:
        for predictor in predictors:
            predictor.decoder = DeviceDecoder(predictor.device)
    return predictors


def _load_predictors(package: Package, cores: int) -> list[Predictor]:
    """One per GPU. Without a GPU as many as there are processors to share, with the same weights: batches side by
    side need no waiting for each other, as threads within a batch do, and give way to decoding as it needs."""
    if torch.cuda.is_available():
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        return [load_predictor(package, device) for device in devices]
    workers = 1 if package.format == "code" else min(cores, _CPU_WORKERS)
    torch.set_num_threads(max(1, cores // workers))
    first = load_predictor(package, torch.device("cpu"))
    return [first, *(first.twin() for _ in range(workers - 1))]
