"""Reads slides with OpenSlide, the reference for their pixels.

An OpenSlide object latches its first error: every later call fails with it. So after an error the slide is opened
anew, and only the region that failed is lost. All differences between OpenSlide's versions are in this file.

One thing is mended: a DICOM slide whose header says RGB over JPEG frames with subsampled chroma holds YCbCr (RGB
is never subsampled); OpenSlide believes the header and shows glass in red. The reader's name then says so."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from slideway_inference.errors import SlideUnopenable, SlideUnreadable
from slideway_inference.jpeg import subsampled
from slideway_inference.reader import Region, RegionUnreadable, SlideReader, levels_of
from slideway_inference.resolution import mpp_of_file

_CACHE_BYTES = 256 << 20
"""Holds a row of tiles of a wide slide, so that each is decoded once for the tiles cut from it."""
_REOPEN_SECONDS = 600.0


class NotASlide(SlideUnopenable):
    """OpenSlide does not know the format."""


class OpenSlideReader(SlideReader):
    """Raises NotASlide, SlideUnopenable."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reopening = 0.0
        self._slide = self._open()
        self.name = f"openslide {openslide.__library_version__}"
        self.vendor = self._slide.properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
        self.levels = levels_of(list(self._slide.level_dimensions))
        self.mpp = mpp_of_file(self._slide.properties)
        self._ycbcr = _mislabelled(path, self._slide.properties)
        if self._ycbcr:
            self.name += " (YCbCr)"

    def _open(self) -> openslide.OpenSlide:
        try:
            slide = openslide.OpenSlide(str(self._path))
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise NotASlide("OpenSlide does not know the format, or the file is damaged.") from error
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideUnopenable(f"OpenSlide cannot open it: {error}.") from error
        if hasattr(openslide, "OpenSlideCache"):
            with suppress(openslide.OpenSlideError):  # the library is older than its Python package, before 4.0
                slide.set_cache(openslide.OpenSlideCache(_CACHE_BYTES))
        return slide

    def read_region(self, level: int, x: int, y: int, width: int, height: int) -> Region:
        # OpenSlide addresses every level in whole level-0 pixels, by the mean downsample of both axes.
        downsample = self._slide.level_downsamples[level]
        x0, y0 = round(x * downsample), round(y * downsample)
        try:
            image = self._slide.read_region((x0, y0), level, (width, height))
        except (openslide.OpenSlideError, OSError) as error:
            self._reopen()
            raise RegionUnreadable(str(error)) from error
        rgba = np.asarray(image)
        at = (x0 / downsample, y0 / downsample)
        rgb, alpha = np.ascontiguousarray(rgba[..., :3]), rgba[..., 3]
        if self._ycbcr:
            rgb = np.asarray(Image.frombytes("YCbCr", (width, height), rgb.tobytes()).convert("RGB"))
        if alpha.min() == 255:
            return Region(rgb, None, *at)
        weight = alpha[..., None].astype(np.uint16)
        rgb = ((rgb * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)
        return Region(rgb, alpha >= 128, *at)

    def _reopen(self) -> None:
        if self._reopening > _REOPEN_SECONDS:
            raise SlideUnreadable(
                f"So much of it cannot be read that {_REOPEN_SECONDS:.0f} s went on opening it anew."
            )
        started = time.monotonic()
        self._slide.close()
        self._slide = self._open()
        self._reopening += time.monotonic() - started

    def close(self) -> None:
        self._slide.close()


def _mislabelled(path: Path, properties: Mapping[str, str]) -> bool:
    if properties.get("dicom.PhotometricInterpretation") != "RGB":
        return False
    with path.open("rb") as file:
        head = file.read(1 << 20)
    frame = head.find(b"\xff\xd8\xff")
    return frame >= 0 and subsampled(head[frame:])
