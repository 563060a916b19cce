"""Small slides drawn for tests: tiled pyramidal TIFFs that OpenSlide opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

U8 = npt.NDArray[np.uint8]

GLASS = (244, 243, 245)
PINK = (205, 120, 170)
PURPLE = (110, 70, 150)
INKS = {"blue": (50, 90, 200), "green": (40, 150, 80), "black": (30, 30, 32), "red": (215, 30, 35)}


def glass(width: int, height: int) -> U8:
    image = np.empty((height, width, 3), np.uint8)
    image[:] = GLASS
    noise = np.random.default_rng(width * 7919 + height).integers(-3, 4, (height, width, 1))
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def tissue(image: U8, x: int, y: int, width: int, height: int) -> U8:
    """Draws a block of stroma with nuclei."""
    part = image[y : y + height, x : x + width]
    part[:] = PINK
    rng = np.random.default_rng(x + y)
    for _ in range(width * height // 600):
        cx, cy = int(rng.integers(0, width)), int(rng.integers(0, height))
        part[max(cy - 5, 0) : cy + 5, max(cx - 5, 0) : cx + 5] = PURPLE
    return image


def pen(image: U8, colour: str, x: int, y: int, width: int, height: int) -> U8:
    """A stroke with a paler rim, as ink dries."""
    ink = np.array(INKS[colour])
    rim = (ink + 2 * np.array(GLASS)) // 3
    image[y : y + height, x : x + width] = rim
    image[y + 12 : y + height - 12, x + 12 : x + width - 12] = ink
    return image


def stained(image: U8, densities: tuple[float, float, float]) -> U8:
    """The same tissue in one stain: red, green and blue are so many times as dense as a pixel is on average."""
    density = np.clip(-np.log10(np.maximum(image, 1) / 244), 0, None).mean(axis=2, keepdims=True)
    return np.clip(244 * 10 ** -(density * densities), 0, 255).astype(np.uint8)


def save(path: Path, image: U8, mpp: tuple[float, float] | float | None, downsamples: tuple[int, ...] = ()) -> Path:
    """Writes level 0 and reduced levels."""
    mpp_x, mpp_y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    resolution = (1e4 / mpp_x, 1e4 / mpp_y) if mpp_x and mpp_y else None
    with tifffile.TiffWriter(path) as tiff:
        for index, reduction in enumerate((1, *downsamples)):
            size = image.shape[1] // reduction, image.shape[0] // reduction
            level = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
            tiff.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                metadata=None,
                subfiletype=0 if index == 0 else 1,
                resolution=resolution,
                resolutionunit="CENTIMETER" if resolution else None,
            )
    return path
