"""Builds the package of stain-and-focus: `python -m slideway_inference.quality_model <out folder>` writes
model.tar.gz. See models/stain-and-focus/README.md for what its numbers are and where they come from."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from slideway_inference.model.package import packed
from slideway_inference.model.torchscript import torchscript_bytes
from slideway_inference.reference_model import STAINS, write_package

TISSUE_DENSITY = 0.1
"""Mean optical density of the three channels above which a pixel is tissue: a fifth of the light is gone."""
INK_SATURATION = 0.3
INK_DARK = 40.0
"""Below this in every channel a pixel is black."""

_SOURCE = Path(__file__).resolve().parents[1] / "models/stain-and-focus/model.json"


class StainAndFocus(torch.nn.Module):  # type: ignore[misc]
    """(n, 3, h, w), numbers in 0…255, to (n, 6): haematoxylin, eosin, brightness, saturation, ink, focus."""

    def __init__(self) -> None:
        super().__init__()
        rows = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
        self.register_buffer("amounts", torch.from_numpy(np.linalg.inv(rows)[:, :2].copy()).float())
        self.register_buffer("luminance", torch.tensor([0.299, 0.587, 0.114]))
        self.tissue_density = TISSUE_DENSITY
        self.ink_saturation = INK_SATURATION
        self.ink_dark = INK_DARK

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        # A processor's cache holds the intermediate results of one tile, not of a batch.
        step = tiles.shape[0] if tiles.is_cuda else 1
        return torch.cat([self.measure(part.float()) for part in tiles.split(step)])

    def measure(self, tiles: torch.Tensor) -> torch.Tensor:
        red, green, blue = tiles[:, 0], tiles[:, 1], tiles[:, 2]
        grey = red * self.luminance[0] + green * self.luminance[1] + blue * self.luminance[2]

        density = -torch.log10(tiles.clamp(min=1.0) / 255)
        tissue = (density.mean(1) > self.tissue_density).float().flatten(1)
        pixels = tissue.sum(1).clamp(min=1.0)
        haematoxylin = self.stain(density, tissue, 0) / pixels
        eosin = self.stain(density, tissue, 1) / pixels

        high, low = tiles.amax(1), tiles.amin(1)
        chroma = high - low
        saturation = chroma / high.clamp(min=1.0)
        # Hue from 60° (yellow) over green and cyan to 210°: red is below both others, and blue not far above green.
        inky = (red == low) & (blue - green <= 0.5 * chroma) & (saturation > self.ink_saturation)
        ink = (inky | (high < self.ink_dark)).float().flatten(1).mean(1)

        laplacian = (
            grey[:, 1:-1, :-2]
            + grey[:, 1:-1, 2:]
            + grey[:, :-2, 1:-1]
            + grey[:, 2:, 1:-1]
            - 4 * grey[:, 1:-1, 1:-1]
        ).flatten(1)
        focus = torch.log10(1 + laplacian.var(1, unbiased=False))
        brightness = grey.flatten(1).mean(1) / 255
        return torch.stack([haematoxylin, eosin, brightness, saturation.flatten(1).mean(1), ink, focus], 1)

    def stain(self, density: torch.Tensor, tissue: torch.Tensor, index: int) -> torch.Tensor:
        """The sum over tissue of what of a pixel's density is this stain's."""
        weights = self.amounts[:, index]
        amount = density[:, 0] * weights[0] + density[:, 1] * weights[1] + density[:, 2] * weights[2]
        return (amount.clamp(min=0.0).flatten(1) * tissue).sum(1)


def package_bytes() -> bytes:
    """model.tar.gz."""
    model = torchscript_bytes(torch.jit.script(StainAndFocus().eval()))
    return packed({"model.json": _SOURCE, "model.pt": model})


if __name__ == "__main__":
    from slideway_inference import quality_model  # TorchScript writes the module's name: let it be the same

    sys.exit(write_package("quality_model", quality_model.package_bytes))
