"""Model packages: what model.json says (`spec`), what a model.tar.gz holds (`package`), how its tile model runs,
whatever format it has (`predictor`; TorchScript, ONNX, or the package's own code), and its slide-level `head`."""

from slideway_inference.model.head import Head, HeadAnswer
from slideway_inference.model.package import Package, open_folder, open_package
from slideway_inference.model.predictor import Predictor, Tiles, Values
from slideway_inference.model.predictors import load_predictors
from slideway_inference.model.spec import Encoding, HeadSpec, ModelSpec, parse_model

__all__ = [
    "Encoding",
    "Head",
    "HeadAnswer",
    "HeadSpec",
    "ModelSpec",
    "Package",
    "Predictor",
    "Tiles",
    "Values",
    "load_predictors",
    "open_folder",
    "open_package",
    "parse_model",
]
