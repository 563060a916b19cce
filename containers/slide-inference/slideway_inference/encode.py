"""Encodes tiles. No encoder holds the interpreter's lock while it works. Where the fast reader's codecs are not
installed Pillow does it, more slowly."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from slideway_inference.contracts import TileFormat
from slideway_inference.fast.codecs import available, imagecodecs, simplejpeg

U8 = npt.NDArray[np.uint8]

SUFFIXES: dict[TileFormat, str] = {"jpeg": "jpg", "png": "png", "raw": "npy"}
CONTENT_TYPES: dict[TileFormat, str] = {"jpeg": "image/jpeg", "png": "image/png", "raw": "application/x-npy"}
_PNG = {"level": 1, "strategy": 3, "filter": 128}
"""Fast deflate, run lengths only, Paeth: of the fast ways the one with the smallest files of stained tissue."""


def encode(tile: U8, form: TileFormat, quality: int | None) -> bytes:
    """A tile (px, px, 3) as JPEG, with colours not subsampled, because stains are told by colour; as PNG; or as
    .npy."""
    if form == "raw":
        target = io.BytesIO()
        np.lib.format.write_array(target, tile, version=(1, 0), allow_pickle=False)
        return target.getvalue()
    if form == "jpeg":
        if not available():
            return _pillow(tile, "JPEG", quality=quality, subsampling=0)
        made: bytes = simplejpeg.encode_jpeg(tile, quality, "RGB", "444", fastdct=False)
    else:
        if not available():
            return _pillow(tile, "PNG", compress_level=1)
        made = imagecodecs.png_encode(tile, **_PNG)
    return made


def _pillow(tile: U8, form: str, **options: int | None) -> bytes:
    target = io.BytesIO()
    Image.fromarray(tile).save(target, form, **options)
    return target.getvalue()
