"""Turns a PyTorch checkpoint into a model package, and tries it before anybody waits for a job:

    python export_model.py <network.py> <checkpoint.pth> <model.json> <model.tar.gz>

`network.py` has a function `network()` that builds the untrained network; `checkpoint.pth` is its state_dict. The
network is scripted, or traced where it cannot be scripted, and run on one batch by the container's own code."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import io
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slideway_inference.contracts import ModelRef
from slideway_inference.errors import SlidewayError
from slideway_inference.model import ModelSpec, Predictor, open_package, parse_model


def build(path: Path) -> torch.nn.Module:
    """The network that `network()` of a Python file builds."""
    spec = importlib.util.spec_from_file_location("network", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: torch.nn.Module = module.network()
    return network


def torchscript(network: torch.nn.Module, model: ModelSpec) -> bytes:
    """model.pt. Tracing follows one batch only: it is wrong for networks that branch on their input."""
    shape = (2, 3, model.px, model.px) if model.layout == "NCHW" else (2, model.px, model.px, 3)
    try:
        scripted = torch.jit.script(network)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        print(f"Scripting failed ({reason}); tracing instead.", file=sys.stderr)
        with torch.inference_mode():
            scripted = torch.jit.trace(network, torch.rand(shape))
    raw, clean = io.BytesIO(), io.BytesIO()
    torch.jit.save(scripted, raw)
    # Without PyTorch's debug records, which hold the path of the source and so differ from place to place.
    with zipfile.ZipFile(raw) as source, zipfile.ZipFile(clean, "w", zipfile.ZIP_STORED) as target:
        for name in sorted(source.namelist()):
            if not name.endswith(".debug_pkl"):
                target.writestr(zipfile.ZipInfo(name), source.read(name))
    return clean.getvalue()


def packed(files: dict[str, bytes]) -> bytes:
    """model.tar.gz without times and owners, so that equal content gives an equal digest."""
    raw = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return raw.getvalue()


def attempt(package: Path, model: ModelSpec, digest: str) -> None:
    """Loads the package as a job does and runs random tiles through it. Raises what a job would."""
    with tempfile.TemporaryDirectory() as folder:
        spec, weights = open_package(package, ModelRef(model.name, model.version, digest), Path(folder))
        tiles = np.random.default_rng(0).integers(0, 256, (2, spec.px, spec.px, 3), np.uint8)
        values = Predictor(spec, weights, torch.device("cpu")).run(tiles)
    for column, value in zip(spec.columns, values[0], strict=True):
        print(f"  {column} = {value:.4f} on a tile of noise")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("network", "checkpoint", "model", "package"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    try:
        text = given.model.read_bytes()
        model = parse_model(text)
        network = build(given.network)
        network.load_state_dict(torch.load(given.checkpoint, map_location="cpu", weights_only=True))
        data = packed({"model.json": text, "model.pt": torchscript(network.eval(), model)})
        given.package.parent.mkdir(parents=True, exist_ok=True)
        given.package.write_bytes(data)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        print(f"{given.package}: {model.name} {model.version}, {digest}")
        attempt(given.package, model, digest)
    except SlidewayError as error:
        print(f"{error.name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
