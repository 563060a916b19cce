"""Slides made for the fast reader's tests: TIFFs whose tiles are encoded here, so that every way of storing JPEG
occurs, and what is asked of a reader on them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from slideway_inference.fast import FastReader, FileSource, open_fast
from slideway_inference.grid import TileGeometry, grid_axis, plan_tiles

imagecodecs = pytest.importorskip("imagecodecs")
simplejpeg = pytest.importorskip("simplejpeg")

U8 = npt.NDArray[np.uint8]


def picture(width: int, height: int, seed: int = 1) -> U8:
    """Something with edges and colours, smooth enough that JPEG keeps it."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 240, (height // 12 + 2, width // 12 + 2, 3)).astype(np.float32)
    fine = coarse.repeat(12, 0).repeat(12, 1)[:height, :width]
    for axis in (0, 1):
        fine = (fine + np.roll(fine, 5, axis) + np.roll(fine, -3, axis)) / 3
    return np.clip(fine + rng.normal(0, 4, (height, width, 1)), 0, 255).astype(np.uint8)


def jpeg(tile: U8, *, ycbcr: bool, subsampling: str = "444", quality: int = 80) -> bytes:
    """A JPEG without JFIF or Adobe markers' help where it is RGB, as scanners write it."""
    space = "YCBCR" if ycbcr else "RGB"
    stream: bytes = imagecodecs.jpeg8_encode(
        tile, quality, colorspace="RGB", outcolorspace=space, subsampling=subsampling
    )
    kept, tables = split(stream, {0xE0, 0xEE})
    assert tables
    return kept


def jpeg2000_halved(tile: U8, down: int = 1) -> bytes:
    """YCbCr as Aperio stores it, its chroma of half width, and of half height where `down` is 2. No encoder here
    makes such a stream, so it is put together of one for each component: in the order component by component
    (CPRL) their packets follow one another. `tile` holds the three components; of less than 128 pixels the
    encoder makes fewer resolutions, which would not fit together."""
    planes = (tile[..., 0], tile[::down, ::2, 1], tile[::down, ::2, 2])
    made = [
        imagecodecs.jpeg2k_encode(np.ascontiguousarray(p), 0, codecformat="j2k", resolutions=4, reversible=True)
        for p in planes
    ]
    luma = made[0]
    siz = luma[4:40] + b"\x00\x03" + b"\x07\x01\x01" + 2 * bytes((7, 2, down))
    siz = struct.pack(">H", len(siz)) + siz[2:]
    at = luma.index(b"\xff\x52")
    cod, qcd = luma[at : at + 14], luma[at + 14 : at + 29]
    body = b"".join(stream[stream.index(b"\xff\x93") + 2 : -2] for stream in made)
    sot = b"\xff\x90" + struct.pack(">HHIBB", 10, 0, len(body) + 14, 0, 1)
    return b"\xff\x4f\xff\x51" + siz + cod[:5] + b"\x04" + cod[6:] + qcd + sot + b"\xff\x93" + body + b"\xff\xd9"


def split(stream: bytes, apart: set[int]) -> tuple[bytes, bytes]:
    """A JPEG without the segments of `apart`, and those segments."""
    at, kept, taken = 2, [stream[:2]], []
    while stream[at + 1] != 0xDA:
        size = 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        (taken if stream[at + 1] in apart else kept).append(stream[at : at + size])
        at += size
    return b"".join([*kept, stream[at:]]), b"".join(taken)


def tiles_of(image: U8, tile: tuple[int, int]) -> Iterator[U8]:
    """Row by row, (height, width); those at the edges are filled up with their last pixels."""
    high, wide = tile
    for y in range(0, image.shape[0], high):
        for x in range(0, image.shape[1], wide):
            part = image[y : y + high, x : x + wide]
            yield np.pad(part, ((0, high - part.shape[0]), (0, wide - part.shape[1]), (0, 0)), "edge")


def save_jpeg(
    path: Path,
    image: U8,
    *,
    tile: tuple[int, int] = (240, 240),
    ycbcr: bool = False,
    subsampling: str = "444",
    tables: bool = False,
    missing: set[int] | None = None,
    downsamples: tuple[int, ...] = (),
    description: str | None = None,
    **changes: Any,  # noqa: ANN401
) -> Path:
    """A pyramidal TIFF in JPEG. `tile` is (height, width); tiles in `missing` have no bytes."""
    options = {"bigtiff": changes.pop("bigtiff", False), "byteorder": changes.pop("byteorder", "<")}
    with tifffile.TiffWriter(path, **options) as tiff:
        for index, reduction in enumerate((1, *downsamples)):
            level = np.ascontiguousarray(image[::reduction, ::reduction])
            streams = [jpeg(t, ycbcr=ycbcr, subsampling=subsampling) for t in tiles_of(level, tile)]
            shared = split(streams[0], {0xDB, 0xC4})[1]
            if tables:
                streams = [split(stream, {0xDB, 0xC4})[0] for stream in streams]
            if missing and index == 0:
                streams = [b"" if number in missing else stream for number, stream in enumerate(streams)]
            tiff.write(
                iter(streams),
                shape=level.shape,
                dtype=np.uint8,
                tile=tile,
                photometric="ycbcr" if ycbcr else "rgb",
                subsampling={"444": (1, 1), "422": (2, 1), "420": (2, 2)}[subsampling] if ycbcr else None,
                compression="jpeg",
                jpegtables=b"\xff\xd8" + shared + b"\xff\xd9" if tables else None,
                metadata=None,
                description=description if index == 0 else None,
                subfiletype=0 if index == 0 else 1,
                resolution=(1e4 / 0.5, 1e4 / 0.5),
                resolutionunit="CENTIMETER",
                **changes,
            )
    return path


def fast(path: Path, threads: int = 2) -> FastReader:
    return open_fast(FileSource(path), name=path.name, threads=threads)


def grid(reader: FastReader, px: int, mpp: float, slide_mpp: float = 0.5) -> tuple[TileGeometry, Any]:
    """The geometry, and all positions of the grid."""
    geometry = plan_tiles(reader.levels, (slide_mpp, slide_mpp), px, mpp, 0, 0.02)
    xs = grid_axis(reader.width, geometry.footprint_x, geometry.stride_x)
    ys = grid_axis(reader.height, geometry.footprint_y, geometry.stride_y)
    return geometry, np.array([(x, y) for y in ys for x in xs], np.int32).reshape(-1, 2)
