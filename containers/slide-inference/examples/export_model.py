"""Turns a PyTorch checkpoint into a model package, and tries it before anybody waits for a job:

    python export_model.py <network.py> <checkpoint.pth> <model.json> <model.tar.gz>

`network.py` has a function `network()` that builds the untrained network, or `network(state)` that looks at the
checkpoint for its shape; `checkpoint.pth` is its state_dict. The network is scripted, or traced where it cannot be
scripted, and run on one batch by the container's own code."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slideway_inference.errors import SlidewayError
from slideway_inference.model.package import file_digest, packed, unpack
from slideway_inference.model.predictors import load_predictor
from slideway_inference.model.spec import ModelSpec, parse_model
from slideway_inference.model.torchscript import torchscript_bytes


def build(path: Path, checkpoint: Path) -> torch.nn.Module:
    """The network of a Python file, with the weights of the checkpoint."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    spec = importlib.util.spec_from_file_location("network", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sized = len(inspect.signature(module.network).parameters) > 0
    network: torch.nn.Module = module.network(state) if sized else module.network()
    network.load_state_dict(state)
    return network.eval()


def torchscript(network: torch.nn.Module, model: ModelSpec) -> bytes:
    """model.pt. Tracing follows one batch only: it is wrong for networks that branch on their input."""
    shape = (2, 3, model.px, model.px) if model.layout == "NCHW" else (2, model.px, model.px, 3)
    try:
        return torchscript_bytes(torch.jit.script(network))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        print(f"Scripting failed ({reason}); tracing instead.", file=sys.stderr)
        with torch.inference_mode():
            return torchscript_bytes(torch.jit.trace(network, torch.rand(shape)))


def attempt(archive: Path) -> None:
    """Loads the package as a job does and runs random tiles through it. Raises what a job would."""
    with tempfile.TemporaryDirectory() as folder:
        package = unpack(archive, Path(folder))
        px, columns = package.spec.px, package.spec.columns
        tiles = np.random.default_rng(0).integers(0, 256, (2, px, px, 3), np.uint8)
        values = load_predictor(package, torch.device("cpu")).run(tiles)
    for column, value in list(zip(columns, values[0], strict=True))[:8]:
        print(f"  {column} = {value:.4f} on a tile of noise")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("network", "checkpoint", "model", "package"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    try:
        model = parse_model(given.model.read_bytes())
        network = build(given.network, given.checkpoint)
        data = packed({"model.json": given.model, "model.pt": torchscript(network, model)})
        given.package.parent.mkdir(parents=True, exist_ok=True)
        given.package.write_bytes(data)
        print(f"{given.package}: {model.name} {model.version}, {file_digest(given.package)}")
        attempt(given.package)
    except SlidewayError as error:
        print(f"{error.name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
