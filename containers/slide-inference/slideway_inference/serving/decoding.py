"""Decodes one tile of a request. No decoder holds the interpreter's lock while it works, and whatever one complains
of is an error: a decoder's guess at damaged data is never a tile."""

from __future__ import annotations

import io
import struct
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from slideway_inference.errors import TileUnreadable

try:
    imagecodecs: Any = import_module("imagecodecs")
    simplejpeg: Any = import_module("simplejpeg")
except ImportError:  # Pillow then decodes, at about half the speed
    imagecodecs = simplejpeg = None

_NPY = b"\x93NUMPY"
_PNG = b"\x89PNG\r\n\x1a\n"


def decode(data: memoryview, out: npt.NDArray[np.uint8]) -> None:
    """A JPEG, PNG or .npy (height, width, 3) uint8 into `out`, of whose size it must be. Raises TileUnreadable,
    and MemoryError, which says nothing of the tile."""
    start = bytes(data[:8])
    try:
        if start[:2] == b"\xff\xd8":
            _jpeg(data, out)
        elif start == _PNG:
            _png(data, out)
        elif start[:6] == _NPY:
            _npy(data, out)
        else:
            raise TileUnreadable("It is no JPEG, PNG or .npy.")
    except (TileUnreadable, MemoryError):
        raise
    except Exception as error:  # the codecs' errors have no common class
        raise TileUnreadable(f"It cannot be decoded: {str(error)[:200] or type(error).__name__}") from error


def _jpeg(data: memoryview, out: npt.NDArray[np.uint8]) -> None:
    if simplejpeg is None:
        _with_pillow(data, out)
        return
    try:
        made = simplejpeg.decode_jpeg(data, "RGB", buffer=out, strict=True)
    except ValueError:
        high, wide, *_ = simplejpeg.decode_jpeg_header(data, strict=False)
        _check(wide, high, out)
        raise
    _check(made.shape[1], made.shape[0], out)


def _png(data: memoryview, out: npt.NDArray[np.uint8]) -> None:
    if len(data) < 24:
        raise TileUnreadable("It ends early.")
    wide, high = struct.unpack(">II", data[16:24])
    _check(wide, high, out)  # before anything is decoded
    if imagecodecs is None:
        _with_pillow(data, out)
        return
    made = imagecodecs.png_decode(data)
    if made.shape != out.shape or made.dtype != np.uint8:
        _with_pillow(data, out)  # grey, with alpha, or of 16 bits
        return
    out[:] = made


def _npy(data: memoryview, out: npt.NDArray[np.uint8]) -> None:
    made = np.load(io.BytesIO(data), allow_pickle=False)
    if made.dtype != np.uint8 or made.ndim != 3 or made.shape[2] != 3:
        raise TileUnreadable("Its array is not (height, width, 3) of uint8.")
    _check(made.shape[1], made.shape[0], out)
    out[:] = made


def _with_pillow(data: memoryview, out: npt.NDArray[np.uint8]) -> None:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        _check(image.width, image.height, out)
        out[:] = np.asarray(image.convert("RGB"))


def _check(wide: int, high: int, out: npt.NDArray[np.uint8]) -> None:
    if (high, wide) != out.shape[:2]:
        raise TileUnreadable(f"It is {wide} × {high} pixels where the model takes {out.shape[1]} × {out.shape[0]}.")
