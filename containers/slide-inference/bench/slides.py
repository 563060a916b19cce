"""Makes the gigapixel slides of the bench: a bank of H&E-like JPEG tiles is drawn once, and a slide is laid out of
them byte by byte, so that 1.6 gigapixels take seconds. Tiles repeat, but each has bytes of its own in the file, and
every reader has to fetch and decode every one.

    python slides.py --out <folder> [--side 40000]

writes, where they are missing, `native-256.svs` (the model's grid falls on native tiles) and `native-240.svs` (it
does not), both at 0.5 µm per pixel with levels of 1, 1/4 and 1/16: about 1.4 bits a pixel under tissue."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
import make_slides

U8 = npt.NDArray[np.uint8]

MPP = 0.5
LEVELS = (1, 4, 16)
_QUALITY = 65
_TISSUE = 0.6
"""Share of the slide's width and height that tissue spans."""


def bank(folder: Path, side: int) -> tuple[list[U8], U8]:
    """Tiles full of tissue and one of glass, cut from a drawn slide."""
    drawn = folder / "drawn.tiff"
    if not drawn.exists():
        make_slides.make_slide(drawn, seed=2, size=(4096, 3072))
    with tifffile.TiffFile(drawn) as tiff:
        image = tiff.pages[0].asarray()[768:]  # below the pen's line
    tiles = [
        image[y : y + side, x : x + side]
        for y in range(0, image.shape[0] - side, side)
        for x in range(0, image.shape[1] - side, side)
    ]
    tiles.sort(key=lambda tile: float(tile.mean()))
    return tiles[: len(tiles) // 4], tiles[-1]


def jpeg(tile: U8) -> bytes:
    target = io.BytesIO()
    Image.fromarray(tile).save(target, "JPEG", quality=_QUALITY, subsampling="4:2:0")
    return target.getvalue()


def layout(columns: int, rows: int, kinds: int) -> npt.NDArray[np.int64]:
    """Which tile of the bank lies where; -1 is glass. Tissue is an ellipse."""
    y, x = np.mgrid[0:rows, 0:columns]
    inside = ((x + 0.5) / columns * 2 - 1) ** 2 + ((y + 0.5) / rows * 2 - 1) ** 2 < _TISSUE**2 * 4 / np.pi * 1.4
    chosen = np.random.default_rng(1).integers(0, kinds, (rows, columns))
    return np.where(inside, chosen, -1)


def make(path: Path, side: int, tile: int) -> None:
    """Writes a slide of side × side pixels in native tiles of tile × tile."""
    full, glass = bank(path.parent, tile)
    plan = layout(-(-side // tile), -(-side // tile), len(full))
    encoded = [jpeg(picture) for picture in [*full, glass]]
    temporary = path.with_suffix(".part")
    with tifffile.TiffWriter(temporary, bigtiff=True) as tiff:
        for reduction in LEVELS:
            size = side // reduction
            tiff.write(
                _tiles(plan, full, glass, encoded, reduction, size, tile),
                shape=(size, size, 3),
                dtype=np.uint8,
                tile=(tile, tile),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                metadata=None,
                software=False,
                description=f"Aperio Image Library v0.0.0\n{side}x{side} ({tile}x{tile}) JPEG/RGB|MPP = {MPP}"
                if reduction == 1
                else f"Aperio Image Library v0.0.0\n{size}x{size} -> {size}x{size}",
            )
    temporary.replace(path)


def _tiles(
    plan: npt.NDArray[np.int64],
    full: list[U8],
    glass: U8,
    encoded: list[bytes],
    reduction: int,
    size: int,
    tile: int,
) -> Iterator[bytes]:
    count = -(-size // tile)
    if reduction == 1:
        yield from (encoded[index] for index in plan.ravel())
        return
    small = tile // reduction
    reduced = [
        np.asarray(Image.fromarray(picture).resize((small, small), Image.Resampling.BOX))
        for picture in [*full, glass]
    ]
    for row in range(count):
        for column in range(count):
            made = np.full((tile, tile, 3), 245, np.uint8)
            part = plan[row * reduction : (row + 1) * reduction, column * reduction : (column + 1) * reduction]
            for (y, x), index in np.ndenumerate(part):
                made[y * small : (y + 1) * small, x * small : (x + 1) * small] = reduced[index]
            yield jpeg(made)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--side", type=int, default=40_000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for tile in (256, 240):
        path = options.out / f"native-{tile}.svs"
        if not path.exists():
            make(path, options.side, tile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
