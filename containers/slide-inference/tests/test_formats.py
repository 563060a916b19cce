"""TorchScript, ONNX and a package's own code: one network, the same numbers; what user code may do and not do."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import packages
import pytest
import torch
from conftest import CONTAINER
from serving import Served, pack_of

from slideway_inference.contracts import ModelRef
from slideway_inference.errors import ModelError, ModelFormatNotSupported, ModelPackageInvalid
from slideway_inference.model.package import Package, open_package, packed
from slideway_inference.model.predictors import load_predictors

INPUT = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
PX = 64


class Convolutions(torch.nn.Module):
    """A small network of the usual parts, three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 5, 2),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, 16, 3, 2),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(16, 3),
            torch.nn.Softmax(1),
        )

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return self.body(tiles)


def network() -> Convolutions:
    torch.manual_seed(3)
    return Convolutions().eval()


def tiles(count: int = 21) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, PX, PX, 3), np.uint8)


def onnx_bytes(module: torch.nn.Module, batch: int | None = None) -> bytes:
    """Written with onnx alone: PyTorch's exporter wants another package. `batch`: for this size only."""
    from onnx import TensorProto, helper, numpy_helper

    body = module.body
    weights = {name: value.detach().numpy() for name, value in body.state_dict().items()}
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "3.weight", "3.bias"]
    make = helper.make_node
    nodes = [
        make("Conv", ["tiles", "0.weight", "0.bias"], ["a"], strides=[2, 2]),
        make("BatchNormalization", ["a", *names[2:6]], ["b"], epsilon=1e-5),
        make("Relu", ["b"], ["c"]),
        make("Conv", ["c", "3.weight", "3.bias"], ["d"], strides=[2, 2]),
        make("Relu", ["d"], ["e"]),
        make("GlobalAveragePool", ["e"], ["f"]),
        make("Flatten", ["f"], ["g"]),
        make("Gemm", ["g", "7.weight", "7.bias"], ["h"], transB=1),
        make("Softmax", ["h"], ["classes"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("tiles", TensorProto.FLOAT, [batch or "n", 3, PX, PX])],
        [helper.make_tensor_value_info("classes", TensorProto.FLOAT, [batch or "n", 3])],
        [numpy_helper.from_array(weights[name], name) for name in [*names, "7.weight", "7.bias"]],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def document(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    return packages.document(
        task="classification", outputs=["one", "two", "three"], tile={"px": PX, "mpp": 0.5}, input=INPUT, **changes
    )


def described(files: dict[str, bytes], **changes: Any) -> bytes:  # noqa: ANN401
    return packed({"model.json": json.dumps(document(**changes)).encode(), **files})


def weights() -> bytes:
    out = io.BytesIO()
    torch.save(network().state_dict(), out)
    return out.getvalue()


NETWORK = """
import torch
class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 5, 2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3, 2),
            torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 3),
            torch.nn.Softmax(1))
    def forward(self, tiles):
        return self.body(tiles)
"""
ONLY_MODEL = """
import os, torch
from convolutions import Convolutions
def model_fn(model_dir):
    model = Convolutions()
    model.load_state_dict(torch.load(os.path.join(model_dir, "weights.pth"), weights_only=True))
    return model
"""
AS_SAGEMAKER = (
    ONLY_MODEL
    + """
import io, json
import numpy as np
def input_fn(body, content_type, context):
    assert content_type == "application/x-npy", content_type
    tiles = torch.from_numpy(np.load(io.BytesIO(body))).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (tiles - mean.view(3, 1, 1)) / std.view(3, 1, 1)
def predict_fn(data, model):
    with torch.no_grad():
        return model.eval()(data)
def output_fn(prediction, accept):
    assert accept == "application/json"
    return json.dumps(prediction.tolist()), accept
"""
)
TRANSFORM = (
    ONLY_MODEL
    + """
import io
import numpy as np
def transform_fn(model, body, content_type, accept):
    tiles = torch.from_numpy(np.load(io.BytesIO(body))).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    out = io.BytesIO()
    np.save(out, model.eval()((tiles - mean.view(3, 1, 1)) / std.view(3, 1, 1)).numpy())
    return out.getvalue()
"""
)


def coded(code: str) -> dict[str, bytes]:
    return {"code/inference.py": code.encode(), "code/convolutions.py": NETWORK.encode(), "weights.pth": weights()}


def formats() -> dict[str, bytes]:
    module = network()
    return {
        "torchscript": described({"model.pt": packages.script(module)}),
        "onnx": described({"model.onnx": onnx_bytes(module)}),
        "onnx-of-8": described({"model.onnx": onnx_bytes(module, batch=8)}),
        "code-model": described(coded(ONLY_MODEL)),
        "code-all": described(coded(AS_SAGEMAKER)),
        "code-transform": described(coded(TRANSFORM)),
    }


def unpacked(package: bytes, folder: Path) -> Package:
    archive = folder / "model.tar.gz"
    archive.write_bytes(package)
    digest = f"sha256:{hashlib.sha256(package).hexdigest()}"
    return open_package(archive, ModelRef("tried", "1", digest), folder / digest[-8:])


@pytest.fixture(autouse=True)
def threads() -> Any:  # noqa: ANN401
    """Loading divides the processors; others are to find them as they were."""
    before, path = torch.get_num_threads(), list(sys.path)
    yield
    torch.set_num_threads(before)
    sys.path[:] = path
    sys.modules.pop("convolutions", None)


@pytest.mark.parametrize("name", sorted(formats()))
def test_one_network_gives_the_same_numbers_in_every_format(name: str, tmp_path: Path) -> None:
    normal = (tiles() / 255 - INPUT["mean"]) / INPUT["std"]
    with torch.no_grad():
        expected = network()(torch.from_numpy(normal).permute(0, 3, 1, 2).float()).numpy()
    predictors = load_predictors(unpacked(formats()[name], tmp_path), 2)
    assert len(predictors) == (1 if name.startswith("code") else 2)
    for predictor in predictors:
        values = predictor.run(tiles())
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, atol=1e-5)
    assert expected.std() > 0.01


@pytest.mark.parametrize("name", ["onnx", "code-all"])
def test_serve_runs_the_other_formats_too(name: str, tmp_path: Path) -> None:
    expected = load_predictors(unpacked(formats()[name], tmp_path), 1)[0].run(tiles())
    served = Served(tmp_path / "ml", formats()[name]).ready()
    try:
        np.testing.assert_allclose(served.invoke(pack_of(list(tiles()))).values, expected, atol=1e-6)
    finally:
        served.end()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def predict_fn(data, model): pass", "no model_fn"),
        ("def model_fn(): pass", "model_fn must take 1 arguments, not 0"),
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("def model_fn(folder): raise ValueError('no weights')", "ValueError: no weights"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def model_fn(folder: pass", "SyntaxError"),
        (
            "def model_fn(a): pass\ndef transform_fn(a, b, c, d): pass\ndef input_fn(a, b): pass",
            "in place of input_fn, predict_fn and output_fn",
        ),
    ],
)
def test_code_that_does_not_load_makes_the_package_invalid(code: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelPackageInvalid, match=said):
        load_predictors(unpacked(packages.code_package(code), tmp_path), 1)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def predict_fn(data, model): raise KeyError('layer')", "KeyError: 'layer'"),
        ("def predict_fn(data, model): import sys; sys.exit('enough')", "SystemExit: enough"),
        ("def predict_fn(data, model): return 'nothing'", "JSONDecodeError"),
        ("def predict_fn(data, model): return [[1, 2]] * len(data)", r"shape \(2, 1\), not \(2, 2\)"),
        ("def predict_fn(data, model): return [['a']] * len(data)", "could not convert string"),
        ("def predict_fn(data, model): return [[float('nan')]] * len(data)", "not finite"),
        ("def input_fn(body, kind): raise ValueError(kind)", "ValueError: application/x-npy"),
        ("def output_fn(prediction, accept): return {'a': 1}", r"shape \(2, 1\), not dict"),
    ],
)
def test_what_the_code_raises_is_the_models_error(code: str, said: str, tmp_path: Path) -> None:
    package = packages.code_package(f"def model_fn(folder): return lambda data: data.mean((1, 2, 3))\n{code}")
    (predictor,) = load_predictors(unpacked(package, tmp_path), 1)
    with pytest.raises(ModelError, match=said):
        predictor.run(tiles(2))


def test_a_stage_can_refuse_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIDEWAY_ALLOW_MODEL_CODE", "false")
    with pytest.raises(ModelFormatNotSupported, match="does not run code"):
        unpacked(formats()["code-model"], tmp_path)
    assert unpacked(formats()["onnx"], tmp_path).format == "onnx"


def test_code_goes_before_weights_and_two_kinds_of_weights_are_refused(tmp_path: Path) -> None:
    both = {"model.pt": packages.script(network()), "model.onnx": onnx_bytes(network())}
    assert unpacked(described({**both, **coded(ONLY_MODEL)}), tmp_path).format == "code"
    with pytest.raises(ModelPackageInvalid, match=r"both model\.pt and model\.onnx"):
        unpacked(described(both), tmp_path)


def test_onnx_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelPackageInvalid, match=r"model\.onnx does not load"):
        load_predictors(unpacked(described({"model.onnx": b"weights"}), tmp_path), 1)


def test_without_onnx_runtime_or_h5py_what_needs_them_is_refused_by_name(tmp_path: Path) -> None:
    archive = tmp_path / "model.tar.gz"
    archive.write_bytes(formats()["onnx"])
    code = """
import sys
sys.modules["onnxruntime"] = sys.modules["h5py"] = None
from pathlib import Path
from slideway_inference.errors import ModelFormatNotSupported
from slideway_inference.features import import_h5py
from slideway_inference.model.predictors import load_predictors
from slideway_inference.model.package import unpack
for step in (lambda: load_predictors(unpack(Path(sys.argv[1]), Path(sys.argv[2])), 1), import_h5py):
    try:
        step()
    except ModelFormatNotSupported as error:
        print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(archive), str(tmp_path / "m")],
        cwd=CONTAINER,
        capture_output=True,
        text=True,
    )
    onnx, h5py = ran.stdout.splitlines()
    assert "install onnxruntime" in onnx
    assert "needs h5py" in h5py
