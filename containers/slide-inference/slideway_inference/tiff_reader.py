"""Reads plain RGB TIFFs that OpenSlide does not take for slides: OME-TIFFs of Bio-Formats and QuPath with broken
directory chains, and striped files. Tiles or strips, 8-bit RGB, JPEG, Deflate or uncompressed, one level.

JPEG colour follows the stream: JFIF and Adobe markers say what it is; without either, a photometric tag of RGB
means RGB unless the chroma is subsampled, which only YCbCr is."""

from __future__ import annotations

import io
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from slideway_inference.errors import SlideUnopenable
from slideway_inference.jpeg import segments, subsampled
from slideway_inference.reader import Region, RegionUnreadable, SlideReader, levels_of
from slideway_inference.resolution import mpp_of_file

_CACHE_TILES = 256
_STRIP_LIMIT = 64 << 20
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
"""APP14 with transform 0: the three components are red, green and blue."""


class TiffReader(SlideReader):
    """Raises SlideUnopenable."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as head, TiffImagePlugin.TiffImageFile(head) as image:
                tags = dict(image.tag_v2)
        except (OSError, SyntaxError, ValueError, TypeError, KeyError) as error:
            raise SlideUnopenable("It is no TIFF either.") from error
        self._width, self._height = int(tags.get(256, 0)), int(tags.get(257, 0))
        self._compression = tags.get(259, 1)
        self._photometric = tags.get(262)
        self._predictor = tags.get(317, 1)
        self._tables = tags.get(347, b"")
        self._tile_width = int(tags.get(322, self._width))
        self._tile_height = int(tags.get(323, min(tags.get(278, self._height), self._height)))
        self._offsets = _list(tags.get(324, tags.get(273)))
        self._sizes = _list(tags.get(325, tags.get(279)))
        plain = (
            tags.get(277, 1) == 3
            and set(_list(tags.get(258, 1))) == {8}
            and tags.get(284, 1) == 1
            and self._compression in (1, 7, 8, 32946)
            and self._photometric in (2, 6)
            and 0 < self._tile_width * self._tile_height * 3 <= _STRIP_LIMIT
        )
        if not plain:
            raise SlideUnopenable("As a TIFF it is not plain 8-bit RGB in JPEG, Deflate or no compression.")
        self._columns = -(-self._width // self._tile_width)
        if len(self._offsets) != self._columns * -(-self._height // self._tile_height) or len(self._sizes) != len(
            self._offsets
        ):
            raise SlideUnopenable("As a TIFF its tile offsets do not fit its size.")
        self._file = path.open("rb")
        self._cache: OrderedDict[int, npt.NDArray[np.uint8]] = OrderedDict()
        self.name = "tiff"
        self.vendor = "tiff"
        self.levels = levels_of([(self._width, self._height)])
        unit = {2: "inch", 3: "centimeter"}.get(tags.get(296, 2), "")
        self.mpp = mpp_of_file(
            {
                "tiff.ImageDescription": str(tags.get(270, "")),
                "tiff.ResolutionUnit": unit,
                "tiff.XResolution": str(float(tags.get(282, 0))),
                "tiff.YResolution": str(float(tags.get(283, 0))),
            }
        )

    def read_region(self, level: int, x: int, y: int, width: int, height: int) -> Region:
        rgb = np.empty((height, width, 3), np.uint8)
        for row in range(y // self._tile_height, -(-(y + height) // self._tile_height)):
            for column in range(x // self._tile_width, -(-(x + width) // self._tile_width)):
                tile = self._tile(row * self._columns + column)
                top, left = row * self._tile_height, column * self._tile_width
                y0, y1 = max(y, top), min(y + height, top + tile.shape[0])
                x0, x1 = max(x, left), min(x + width, left + tile.shape[1])
                rgb[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        return Region(rgb, None, x, y)

    def _tile(self, index: int) -> npt.NDArray[np.uint8]:
        tile = self._cache.get(index)
        if tile is None:
            try:
                tile = self._decode(index)
            except (OSError, ValueError, SyntaxError, zlib.error) as error:
                raise RegionUnreadable(str(error)) from error
            room = min(_CACHE_TILES, max(2, (128 << 20) // tile.nbytes))
            while len(self._cache) >= room:
                self._cache.popitem(last=False)
            self._cache[index] = tile
        else:
            self._cache.move_to_end(index)
        return tile

    def _decode(self, index: int) -> npt.NDArray[np.uint8]:
        self._file.seek(self._offsets[index])
        data = self._file.read(self._sizes[index])
        if len(data) != self._sizes[index] or not data:
            raise ValueError("the file ends before the tile does")
        rows = self._tile_height
        if self._tile_width == self._width:  # the last strip is as high as what is left
            rows = min(rows, self._height - index // self._columns * self._tile_height)
        if self._compression == 7:
            with Image.open(io.BytesIO(self._jpeg(data)), formats=["JPEG"]) as image:
                tile = np.asarray(image.convert("RGB"))
            if tile.shape[0] < rows or tile.shape[1] != self._tile_width:
                raise ValueError("the tile's JPEG has another size than its tile")
            return tile
        if self._compression != 1:
            stream = zlib.decompressobj()
            data = stream.decompress(data, self._tile_width * self._tile_height * 3 + 1)
            if not stream.eof:  # the checksum comes last
                raise ValueError("its Deflate stream is cut short, or longer than the tile")
        tile = np.frombuffer(data, np.uint8)[: rows * self._tile_width * 3].reshape(rows, self._tile_width, 3)
        return np.cumsum(tile, axis=1, dtype=np.uint8) if self._predictor == 2 else tile

    def _jpeg(self, data: bytes) -> bytes:
        head = b"\xff\xd8"
        markers = {marker for marker, _ in segments(data)}
        if self._photometric == 2 and not markers & {0xE0, 0xEE} and not subsampled(data):
            head += _ADOBE_RGB
        if self._tables:
            head += self._tables[2:-2]
        return head + data[2:]

    def close(self) -> None:
        self._file.close()


def _list(value: object) -> list[int]:
    return [int(item) for item in value] if isinstance(value, tuple) else [] if value is None else [int(str(value))]
