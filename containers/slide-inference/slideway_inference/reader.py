"""What a slide reader is. Everything above it (tissue, tiles, thumbnails) knows this class alone, so that a
faster reader takes the place of another by implementing `read_region`, and `read_tiles` where it knows better.

Only the pixels of the pyramid's levels are ever read: label and macro images can show patients' names."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
from PIL import Image

from slideway_inference.errors import SlideUnopenable
from slideway_inference.grid import Level, TileGeometry
from slideway_inference.resample import area_resample
from slideway_inference.resolution import Mpp

U8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]

_BLOCK_PIXELS = 12 << 20
"""Most pixels of a level held at once while an overview is made."""
_CELL_PIXELS = 256 * 256
_FAILURES = 200
"""Failed reads after which an overview no longer looks for what is readable around them."""
NOT_SCANNED = "not scanned"
"""Why a tile is unreadable of which more than half is not in the file."""


class RegionUnreadable(Exception):
    """The pixels of a region cannot be read."""


@dataclass(frozen=True)
class Region:
    """Pixels of a level. `x` and `y` are where its first pixel lies, in level pixels; they may differ by a
    fraction from what was asked. Unscanned areas are white, and False in `scanned`; None: all is scanned."""

    rgb: U8
    scanned: Bool | None
    x: float
    y: float


@dataclass(frozen=True)
class Overview:
    """The whole slide, small. All arrays are (height, width[, 3]); unreadable pixels are white and unscanned."""

    rgb: U8
    scanned: Bool
    unreadable: Bool


class SlideReader(ABC):
    """An open slide. Used by one thread. `name` says which reader and version, `mpp` what the file says."""

    name: str
    vendor: str
    levels: tuple[Level, ...]
    mpp: Mpp | None

    @abstractmethod
    def read_region(self, level: int, x: int, y: int, width: int, height: int) -> Region:
        """Reads a region in pixels of `level`, wholly inside it. After RegionUnreadable the reader is as before."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def width(self) -> int:
        return self.levels[0].width

    @property
    def height(self) -> int:
        return self.levels[0].height

    def read_tiles(self, geometry: TileGeometry, positions: npt.NDArray[np.int32], out: U8) -> Bool:
        """Reads tiles at `positions` (n, 2; level-0 x, y) into `out` (n, px, px, 3). Returns which were readable;
        what `out` holds for the others means nothing."""
        readable = np.ones(len(positions), np.bool_)
        for index, (x, y) in enumerate(positions):
            try:
                out[index] = self._read_tile(geometry, int(x), int(y))
            except RegionUnreadable:
                readable[index] = False
        return readable

    def _read_tile(self, geometry: TileGeometry, x: int, y: int) -> U8:
        level = self.levels[geometry.level]
        left, top = x / level.downsample_x, y / level.downsample_y
        if geometry.native:
            left_px = min(round(left), level.width - geometry.px)
            top_px = min(round(top), level.height - geometry.px)
            region = self.read_region(geometry.level, left_px, top_px, geometry.px, geometry.px)
            _check_scanned(region, (0, 0, geometry.px, geometry.px))
            return region.rgb
        width, height = geometry.footprint_x / level.downsample_x, geometry.footprint_y / level.downsample_y
        x0, y0 = int(left), int(top)
        x1 = min(int(np.ceil(left + width + 1e-6)), level.width)
        y1 = min(int(np.ceil(top + height + 1e-6)), level.height)
        region = self.read_region(geometry.level, x0, y0, x1 - x0, y1 - y0)
        left, top = max(left - region.x, 0.0), max(top - region.y, 0.0)
        box = (left, top, min(left + width, x1 - x0), min(top + height, y1 - y0))
        _check_scanned(region, box)
        return area_resample(region.rgb, box, geometry.px)

    def overview(self, width: int, height: int) -> Overview:
        """The slide as width × height pixels, from the deepest level that is not coarser, block by block, so that
        memory stays bounded whatever the levels are. What cannot be read is marked, never taken for glass."""
        fine = [i for i, level in enumerate(self.levels) if level.width >= width and level.height >= height]
        index = max(fine, key=lambda i: self.levels[i].downsample_x) if fine else 0
        level = self.levels[index]
        view = Overview(
            rgb=np.full((height, width, 3), 255, np.uint8),
            scanned=np.zeros((height, width), np.bool_),
            unreadable=np.zeros((height, width), np.bool_),
        )
        scale_x, scale_y = level.width / width, level.height / height
        failures = 0
        blocks = [(0, 0, width, height)]
        while blocks:
            x0, y0, x1, y1 = blocks.pop()
            pixels = (x1 - x0) * scale_x * (y1 - y0) * scale_y
            if pixels > _BLOCK_PIXELS and (x1 - x0 > 1 or y1 - y0 > 1):
                blocks += _halves(x0, y0, x1, y1, tall=y1 - y0 > 1)
                continue
            try:
                self._fill(view, index, (x0, y0, x1, y1), (scale_x, scale_y))
            except RegionUnreadable:
                failures += 1
                if pixels > _CELL_PIXELS and failures < _FAILURES and (x1 - x0 > 1 or y1 - y0 > 1):
                    tall = x1 - x0 == 1 or (y1 - y0 > 1 and (y1 - y0) * scale_y >= (x1 - x0) * scale_x)
                    blocks += _halves(x0, y0, x1, y1, tall=tall)
                else:
                    view.unreadable[y0:y1, x0:x1] = True
        return view

    def _fill(
        self, view: Overview, index: int, block: tuple[int, int, int, int], scale: tuple[float, float]
    ) -> None:
        x0, y0, x1, y1 = block
        level = self.levels[index]
        left, top, right, bottom = x0 * scale[0], y0 * scale[1], x1 * scale[0], y1 * scale[1]
        lx, ly = int(left), int(top)
        rx, ry = min(int(np.ceil(right - 1e-9)), level.width), min(int(np.ceil(bottom - 1e-9)), level.height)
        region = self.read_region(index, lx, ly, rx - lx, ry - ly)
        box = (left - lx, top - ly, min(right - lx, rx - lx), min(bottom - ly, ry - ly))
        size = (x1 - x0, y1 - y0)
        image = Image.fromarray(region.rgb).resize(size, Image.Resampling.BOX, box)
        view.rgb[y0:y1, x0:x1] = np.asarray(image)
        if region.scanned is None:
            view.scanned[y0:y1, x0:x1] = True
        else:
            scanned = Image.fromarray(region.scanned.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX, box)
            view.scanned[y0:y1, x0:x1] = np.asarray(scanned) >= 128


def _check_scanned(region: Region, box: tuple[float, float, float, float]) -> None:
    """Raises RegionUnreadable where more than half of the pixels that `box` (left, top, right, bottom) touches was
    not scanned."""
    if region.scanned is not None:
        left, top, right, bottom = box
        part = region.scanned[
            int(top + 1e-6) : math.ceil(bottom - 1e-6), int(left + 1e-6) : math.ceil(right - 1e-6)
        ]
        if 2 * np.count_nonzero(part) < part.size:
            raise RegionUnreadable(NOT_SCANNED)


def _halves(x0: int, y0: int, x1: int, y1: int, tall: bool) -> list[tuple[int, int, int, int]]:
    """The second half first, so that a stack is worked from top to bottom, as the slide's tiles lie."""
    if tall:
        middle = (y0 + y1) // 2
        return [(x0, middle, x1, y1), (x0, y0, x1, middle)]
    middle = (x0 + x1) // 2
    return [(middle, y0, x1, y1), (x0, y0, middle, y1)]


def levels_of(sizes: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Levels from their sizes, level 0 first; the downsample is that of each axis."""
    width, height = sizes[0]
    return tuple(Level(w, h, width / w, height / h) for w, h in sizes)


def open_slide(path: Path) -> SlideReader:
    """Opens a slide with the reader that knows it: OpenSlide, else, for a file that is called a TIFF, the plain
    TIFF reader. Other formats can be TIFFs inside whose first page is the label. Raises SlideUnopenable."""
    from slideway_inference.openslide_reader import NotASlide, OpenSlideReader
    from slideway_inference.tiff_reader import TiffReader

    try:
        return OpenSlideReader(path)
    except NotASlide as error:
        if path.suffix.lower() not in (".tif", ".tiff"):
            raise SlideUnopenable(str(error)) from error
        try:
            return TiffReader(path)
        except SlideUnopenable as reason:
            raise SlideUnopenable(f"{error} {reason}") from reason
