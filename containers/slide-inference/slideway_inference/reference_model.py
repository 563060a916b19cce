"""Builds the reference model's package: `python -m slideway_inference.reference_model <out folder>` writes
model.tar.gz. See models/haematoxylin-area/README.md for what it measures.

The bytes depend on PyTorch's version alone: the archive carries no times or owners, and the TorchScript none of
the debug records in which PyTorch keeps the path of its source."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from slideway_inference.model.package import packed
from slideway_inference.model.torchscript import torchscript_bytes

THRESHOLD = 0.4
"""Haematoxylin optical density above which a pixel counts."""

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical densities (red, green, blue) of haematoxylin, eosin and DAB: Ruifrok and Johnston, 2001."""

_SOURCE = Path(__file__).resolve().parents[1] / "models/haematoxylin-area/model.json"


class HaematoxylinArea(torch.nn.Module):  # type: ignore[misc]
    """(n, 3, h, w), whole numbers in 0…255, to (n, 1): the fraction of pixels with haematoxylin above the
    threshold.

    A pixel's amount grows with its blue, so that for each red and green there is one blue from which on it counts:
    a table of them, made in double precision, stands in place of three logarithms a pixel. Whole numbers up to 255
    are exact in half precision too, so that every device gives the same answer."""

    def __init__(self) -> None:
        super().__init__()
        rows = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
        weights = np.linalg.inv(rows)[:, 0]
        density = -np.log10(np.maximum(np.arange(256) / 255, 1e-6))
        red, green, blue = (density * weight for weight in weights)
        counts = red[:, None, None] + green[None, :, None] + blue[None, None, :] > THRESHOLD
        assert (np.diff(counts.astype(np.int8), axis=2) >= 0).all(), "the amount grows with blue"
        self.register_buffer("blue_from", torch.from_numpy((256 - counts.sum(axis=2)).ravel()).float())

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        # A processor's cache holds the intermediate results of one tile, not of a batch.
        step = tiles.shape[0] if tiles.is_cuda else 1
        areas: list[torch.Tensor] = []
        for part in tiles.split(step):
            part = part.float()
            index = torch.add(part[:, 1], part[:, 0], alpha=256.0).int().flatten()
            blue_from = torch.index_select(self.blue_from, 0, index)
            counted = part[:, 2].flatten() >= blue_from
            areas.append(counted.view(part.shape[0], -1).float().mean(1, keepdim=True))
        return torch.cat(areas)


def package_bytes() -> bytes:
    """model.tar.gz: model.json, which is read first, then model.pt."""
    model = torchscript_bytes(torch.jit.script(HaematoxylinArea().eval()))
    return packed({"model.json": _SOURCE, "model.pt": model})


def write_package(module: str, package: Callable[[], bytes]) -> int:
    """What a bundled model's module does as a program; its exit code."""
    if len(sys.argv) != 2:
        print(f"usage: python -m slideway_inference.{module} <out folder>", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    data = package()
    (folder / "model.tar.gz").write_bytes(data)
    print(f"{folder / 'model.tar.gz'} sha256:{hashlib.sha256(data).hexdigest()}")
    return 0


if __name__ == "__main__":
    from slideway_inference import reference_model  # TorchScript writes the module's name: let it be the same

    sys.exit(write_package("reference_model", reference_model.package_bytes))
