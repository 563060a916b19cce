"""A slide as native tiles: for each level of the pyramid where each tile's bytes lie and what decodes them. And how
a TIFF is one: which of its directories are levels is chosen as OpenSlide chooses for each vendor; labels and macro
images are never among them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from slideway_inference.errors import SlideUnopenable
from slideway_inference.fast.codecs import Codec, Colour, Jpeg, Jpeg2000, Raw
from slideway_inference.fast.source import ByteSource
from slideway_inference.fast.tiff import Directory, Tiff, TiffDamaged

_TILES = 8 << 20
"""Most tiles of a level; a slide of a million pixels squared has as many in tiles of 360."""
_TILE_PIXELS = 4096 * 4096
_SIDE = 4 << 20
_SLIVER = 1 / 32
"""Of a tile: what lies under another by less does so because levels are rounded to whole pixels."""
_TABLE_BYTES = 16 << 10
_XML_BYTES = 16 << 20
_SUFFIXES = {".svs", ".tif", ".tiff", ".btf", ".tf2", ".tf8", ".gtif"}
"""Other formats are TIFFs inside, whose first directory can be the label."""

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _DESCRIPTION = 256, 257, 258, 259, 262, 270
_STRIPS, _SAMPLES, _ROWS, _STRIP_SIZES, _PLANAR, _SOFTWARE = 273, 277, 278, 279, 284, 305
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_SIZES, _SUBIFDS = 317, 322, 323, 324, 325, 330
_TABLES, _DEPTH, _SUBFILE, _XMP = 347, 32997, 254, 700
_NDPI = 65420
_NO_LEVEL = re.compile("label|macro|overview|thumbnail", re.IGNORECASE)
_JPEG2000 = {33003, 33004, 33005, 34712}
"""Aperio's two, Bio-Formats' lossy and lossless, and the registered one."""


_Means = Literal["aperio", "tag", "stream"]
"""What tells whether components are YCbCr: Aperio's numbers of compressions, the photometric tag, or the stream."""


class NotFast(Exception):
    """The fast reader does not read this by design; OpenSlide may."""


class PlanesNotSupported(SlideUnopenable):
    """The slide has several focal planes or channels, where a model wants one brightfield picture."""


class Part(NamedTuple):
    """Tiles of a level: columns left…right, rows top…bottom."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass
class NativeLevel:
    """A level as it is stored. Tile i lies at column i % columns, row i // columns, in `sources[source[i]]`, or in
    the first where `source` is None. A size of 0 is a tile that was not scanned; -1 one that is to be drawn from
    the next finer level, as OpenSlide does."""

    width: int
    height: int
    tile_width: int
    tile_height: int
    codec: Codec
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    sources: Sequence[ByteSource]
    source: npt.NDArray[np.uint16] | None = None
    ragged: bool = False
    """Whether tiles of the last row are stored only as high as the level reaches, as strips are."""

    def __post_init__(self) -> None:
        self.columns = -(-self.width // self.tile_width)
        self.rows = -(-self.height // self.tile_height)

    def part(self, part: Part) -> NativeLevel:
        """Some of its tiles as a level of their own."""
        rows, columns = slice(part.top, part.bottom), slice(part.left, part.right)

        def of(tiles: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return tiles.reshape(self.rows, self.columns)[rows, columns].ravel()

        return replace(
            self,
            width=min(self.width, part.right * self.tile_width) - part.left * self.tile_width,
            height=min(self.height, part.bottom * self.tile_height) - part.top * self.tile_height,
            offsets=of(self.offsets),
            sizes=of(self.sizes),
            source=None if self.source is None else of(self.source),
        )

    def under(self, coarse: NativeLevel) -> tuple[Spans, Spans]:
        """Which of its columns lie under each column of a coarser level, and which rows under each row."""
        return (
            _spans(self.columns, self.tile_width, self.width, coarse.columns, coarse.tile_width, coarse.width),
            _spans(self.rows, self.tile_height, self.height, coarse.rows, coarse.tile_height, coarse.height),
        )

    def tile_size(self, index: int) -> tuple[int, int]:
        """Width and height of a tile as stored."""
        if self.ragged:
            top = index // self.columns * self.tile_height
            return self.tile_width, min(self.tile_height, self.height - top)
        return self.tile_width, self.tile_height


Spans = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""The first of each, and one past the last."""


def _spans(tiles: int, tile: int, length: int, coarse_tiles: int, coarse_tile: int, coarse_length: int) -> Spans:
    edges = np.arange(coarse_tiles + 1) * (coarse_tile * (length / coarse_length) / tile)
    first = np.minimum((edges[:-1] + _SLIVER).astype(np.int64), tiles - 1)
    return first, np.clip(np.ceil(edges[1:] - _SLIVER).astype(np.int64), first + 1, tiles)


@dataclass
class Pyramid:
    """`like_openslide`: the levels are those that OpenSlide has, so that it can read what fails here."""

    vendor: str
    levels: list[NativeLevel]
    properties: dict[str, str] = field(default_factory=dict)
    like_openslide: bool = True
    note: str = ""


def tiff_pyramid(source: ByteSource, name: str) -> Pyramid:
    """Raises NotTiff, NotFast, PlanesNotSupported, TiffDamaged."""
    tiff = Tiff(source)
    if PurePosixPath(name).suffix.lower() not in _SUFFIXES:
        raise NotFast("a TIFF under another name")
    first = tiff.directories[0]
    description, software = _text(first, _DESCRIPTION), _text(first, _SOFTWARE)
    _refuse_foreign(first, description, software)
    if any(directory.integer(_DEPTH, 1) != 1 for directory in tiff.directories):
        raise PlanesNotSupported("It has several focal planes (ImageDepth): give one plane as a slide of its own.")
    tiled = _TILE_WIDTH in first
    if tiled and description.startswith("Aperio"):
        pyramid = _aperio(tiff, source, description)
    elif software.startswith("Philips") and "<DataObject" in description:
        pyramid = _philips(tiff, source, description)
    elif "<OME" in description:
        first, description, others = _series(tiff, description)
        pyramid = _ome(tiff, source, first, description, alone=not others)
        pyramid.note = f"{others} other series passed over" if others else ""
    else:
        pyramid = _generic(tiff, source)
    if tiff.order == ">" and not tiff.big:
        pyramid.like_openslide = False  # it does not open them
    pyramid.properties |= _properties(first, description if pyramid.vendor != "philips" else "")
    return pyramid


def _text(directory: Directory, tag: int) -> str:
    """A text, or nothing where its type is not one."""
    try:
        return directory.text(tag)
    except TiffDamaged:
        return ""


def _refuse_foreign(first: Directory, description: str, software: str) -> None:
    foreign = {
        "Hamamatsu NDPI": _NDPI in first,
        "Leica SCN": "leica-microsystems.com/scn" in description,
        "Ventana BIF": _XMP in first and b"iScan" in first.data(_XMP),
        "Trestle": software.startswith("MedScan"),
        "PerkinElmer QPTIFF": "PerkinElmer-QPI" in description,
        "Huron": description.startswith("Source = Bright Field") or software.startswith("Huron"),
        "Argos": "Argos.Scan" in description,
    }
    for vendor, is_it in foreign.items():
        if is_it:
            raise NotFast(f"{vendor} is left to OpenSlide")


def _properties(first: Directory, description: str) -> dict[str, str]:
    """What OpenSlide's properties say of a TIFF's resolution, by the same names."""
    unit = {1: "none", 2: "inch", 3: "centimeter"}.get(first.integer(296, 2), "unknown")
    found = {"tiff.ResolutionUnit": unit, "tiff.ImageDescription": description}
    for key, tag in (("tiff.XResolution", 282), ("tiff.YResolution", 283)):
        value = first.rational(tag)
        if value is not None:
            found[key] = repr(value)
    return found


# --- vendors -----------------------------------------------------------------------------------------------------


def _aperio(tiff: Tiff, source: ByteSource, description: str) -> Pyramid:
    """Tiled directories are levels, in their order. Where level 0 lacks a tile, OpenSlide mistrusts the tiles made
    from it and draws them from the finer level; where that has none of them, there is nothing to draw."""
    levels = [_level(d, source, "aperio") for d in tiff.directories if _TILE_WIDTH in d]
    for fine, coarse in pairwise(levels):
        coarse.sizes[coarse.sizes == 0] = -1
        missing = np.flatnonzero(fine.sizes <= 0)
        if len(missing):
            across = max(1, round(fine.columns / coarse.columns))
            down = max(1, round(fine.rows / coarse.rows))
            column = np.minimum(missing % fine.columns // across, coarse.columns - 1)
            row = np.minimum(missing // fine.columns // down, coarse.rows - 1)
            coarse.sizes[row * coarse.columns + column] = -1
            (left, right), (top, bottom) = fine.under(coarse)
            sums = np.zeros((fine.rows + 1, fine.columns + 1), np.int64)
            sums[1:, 1:] = (fine.sizes != 0).reshape(fine.rows, fine.columns).cumsum(axis=0).cumsum(axis=1)
            held = sums[bottom][:, right] - sums[top][:, right] - sums[bottom][:, left] + sums[top][:, left]
            coarse.sizes[(coarse.sizes < 0) & (held.ravel() == 0)] = 0
    properties = {"openslide.vendor": "aperio"}
    for part in description.split("|")[1:]:
        key, equals, value = part.partition("=")
        if equals:
            properties[f"aperio.{key.strip()}"] = value.strip()
    if "aperio.MPP" in properties:
        properties["openslide.mpp-x"] = properties["openslide.mpp-y"] = properties["aperio.MPP"]
    if "aperio.AppMag" in properties:
        properties["openslide.objective-power"] = properties["aperio.AppMag"]
    return Pyramid("aperio", levels, properties)


def _generic(tiff: Tiff, source: ByteSource) -> Pyramid:
    """The first directory, and every tiled one that calls itself a reduced image: of its SubIFDs, which OpenSlide
    does not know, where it has any."""
    first = tiff.directories[0]
    if _TILE_WIDTH not in first:
        levels = [_level(first, source, "stream")]
        return Pyramid("tiff", levels, {"openslide.vendor": "tiff"}, like_openslide=False)
    children = [d for d in first.children() if _reduced(d)]
    levels = [_level(first, source, "tag")]
    for directory in children or filter(_reduced, tiff.directories[1:]):
        if directory.integer(_SUBFILE, 0) & 4:
            raise NotFast("a TIFF with transparency masks")
        levels.append(_level(directory, source, "tag"))
    levels.sort(key=lambda level: -level.width)
    return Pyramid("generic-tiff", levels, {"openslide.vendor": "generic-tiff"}, like_openslide=not children)


def _reduced(directory: Directory) -> bool:
    return _TILE_WIDTH in directory and bool(directory.integer(_SUBFILE, 0) & 1)


def _philips(tiff: Tiff, source: ByteSource, description: str) -> Pyramid:
    """Levels are stored padded to whole tiles; their true sizes follow from the pixel spacings in the XML."""
    levels = [_level(d, source, "tag") for d in tiff.directories if _TILE_WIDTH in d]
    if not levels:
        raise NotFast("a Philips TIFF without tiles")
    root = _xml(description)
    images = [
        image
        for image in root.findall("./Attribute[@Name='PIM_DP_SCANNED_IMAGES']/Array/DataObject")
        if any(a.get("Name") == "PIM_DP_IMAGE_TYPE" and (a.text or "").strip() == "WSI" for a in image)
    ]
    if len(images) != 1:
        raise NotFast(f"a Philips TIFF with {len(images)} scans")
    spacings = [
        _spacing(attribute.text)
        for attribute in images[0].findall(
            "./Attribute[@Name='PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE']/Array"
            "/DataObject[@ObjectType='PixelDataRepresentation']/Attribute[@Name='DICOM_PIXEL_SPACING']"
        )
    ]
    if len(spacings) != len(levels):
        raise NotFast("a Philips TIFF whose XML tells of other levels")
    for level, spacing in zip(levels[1:], spacings[1:], strict=True):
        downsample = round((spacing[0] / spacings[0][0] + spacing[1] / spacings[0][1]) / 2)
        width, height = levels[0].width // max(downsample, 1), levels[0].height // max(downsample, 1)
        if downsample < 1 or not 0 < width <= level.width or not 0 < height <= level.height:
            raise NotFast("a Philips TIFF whose levels do not fit their spacings")
        level.width, level.height = width, height
    properties = {"openslide.vendor": "philips"}
    whole = images[0].find("./Attribute[@Name='DICOM_PIXEL_SPACING']")
    if whole is not None and whole.text:
        x, y = _spacing(whole.text)
        properties |= {"openslide.mpp-x": repr(x * 1e3), "openslide.mpp-y": repr(y * 1e3)}
    return Pyramid("philips", levels, properties)


def _series(tiff: Tiff, description: str) -> tuple[Directory, str, int]:
    """Of an OME-TIFF's images the largest that is called neither label nor macro: its first directory, the OME-XML
    without the others, and how many those are. The first image where they cannot be told apart."""
    root = _xml(description)
    images = root.findall("./{*}Image")
    if len(images) < 2:
        return tiff.directories[0], description, 0
    chosen, first, most = images[0], tiff.directories[0], 0
    for image in images:
        pixels, data = image.find("./{*}Pixels"), image.find("./{*}Pixels/{*}TiffData")
        number = "0" if data is None else data.get("IFD") or "0"
        if pixels is None or _NO_LEVEL.search(image.get("Name") or "") or not number.isdecimal():
            continue
        if int(number) >= len(tiff.directories):
            continue
        directory = tiff.directories[int(number)]
        width, height = directory.integer(_WIDTH), directory.integer(_HEIGHT)
        told = (pixels.get("SizeX"), pixels.get("SizeY")) == (str(width), str(height))
        if told and width * height > most:
            chosen, first, most = image, directory, width * height
    for image in images:
        if image is not chosen:
            root.remove(image)
    for element in root.iter():  # else they would be written with prefixes
        element.tag = element.tag.rpartition("}")[2]
    return first, ElementTree.tostring(root, "unicode"), len(images) - 1


def _ome(tiff: Tiff, source: ByteSource, first: Directory, description: str, *, alone: bool) -> Pyramid:
    """A directory with its SubIFDs, or the reduced ones after it: those that follow at once, unless it is `alone`.
    OpenSlide knows the first directory alone."""
    pixels = _xml(description).find("./{*}Image/{*}Pixels")
    if pixels is not None:
        samples = [int(c.get("SamplesPerPixel") or 1) for c in pixels.findall("./{*}Channel") if _is_number(c)]
        for axis, what in (("SizeZ", "focal planes"), ("SizeT", "time points")):
            if (pixels.get(axis) or "1") != "1":
                raise PlanesNotSupported(f"It has {pixels.get(axis)} {what}: give one as a slide of its own.")
        if len(samples) > 1 or (samples == [1] and pixels.get("SizeC") not in (None, "1")):
            raise PlanesNotSupported(f"It has {pixels.get('SizeC')} channels: it is no brightfield slide.")
    levels = [_level(directory, source, "stream") for directory in (first, *first.children())]
    if _SUBIFDS not in first:
        following = tiff.directories[tiff.directories.index(first) + 1 :]
        reduced = filter(_reduced, following) if alone else takewhile(_reduced, following)
        levels += [_level(directory, source, "stream") for directory in reduced]
    levels.sort(key=lambda level: -level.width)
    return Pyramid("ome-tiff", levels, {"openslide.vendor": "ome-tiff"}, like_openslide=False)


def _is_number(channel: ElementTree.Element) -> bool:
    return (channel.get("SamplesPerPixel") or "1").isdecimal()


def _xml(text: str) -> ElementTree.Element:
    """Raises NotFast. Documents that declare entities are not read: that is how XML bombs are made."""
    if len(text) > _XML_BYTES or re.search(r"<!(DOCTYPE|ENTITY)", text, re.IGNORECASE):
        raise NotFast("its XML is not plain")
    try:
        return ElementTree.fromstring(text.strip().rstrip("\0").encode())
    except (ElementTree.ParseError, ValueError) as error:
        raise NotFast("its XML is damaged") from error


def _spacing(text: str | None) -> tuple[float, float]:
    """DICOM's pixel spacing, in quotes, rows before columns; x and y in mm."""
    try:
        rows, columns = (float(part) for part in (text or "").replace('"', " ").split())
    except ValueError as error:
        raise NotFast("a Philips TIFF with unreadable spacings") from error
    if not (0 < rows < 1e3 and 0 < columns < 1e3):
        raise NotFast("a Philips TIFF with absurd spacings")
    return columns, rows


# --- one directory -----------------------------------------------------------------------------------------------


def _level(directory: Directory, source: ByteSource, colour: _Means) -> NativeLevel:
    """Raises NotFast for what others must read, TiffDamaged for what cannot be."""
    width, height = directory.integer(_WIDTH), directory.integer(_HEIGHT)
    if not (0 < width <= _SIDE and 0 < height <= _SIDE):
        raise TiffDamaged(f"A level of {width} × {height} pixels is absurd.")
    tiled = _TILE_WIDTH in directory
    if tiled:
        tile_width, tile_height = directory.integer(_TILE_WIDTH), directory.integer(_TILE_HEIGHT)
        offsets_tag, sizes_tag = _TILE_OFFSETS, _TILE_SIZES
    else:
        tile_width, tile_height = width, min(directory.integer(_ROWS, height), height)
        offsets_tag, sizes_tag = _STRIPS, _STRIP_SIZES
    if tile_width < 1 or tile_height < 1:
        raise TiffDamaged("A level's tiles have no size.")
    if tile_width * tile_height > _TILE_PIXELS:
        raise NotFast(f"tiles of {tile_width} × {tile_height} pixels")
    tiles = -(-width // tile_width) * -(-height // tile_height)
    if tiles > _TILES:
        raise TiffDamaged(f"A level of {tiles} tiles is absurd.")
    _check_pixels(directory)
    codec = _codec(directory, colour)
    if directory.count(offsets_tag) != tiles or directory.count(sizes_tag) != tiles:
        raise TiffDamaged(f"A level has {directory.count(offsets_tag)} tile offsets where its size needs {tiles}.")
    return NativeLevel(
        width=width,
        height=height,
        tile_width=tile_width,
        tile_height=tile_height,
        codec=codec,
        offsets=directory.integers(offsets_tag),
        sizes=directory.integers(sizes_tag),
        sources=(source,),
        ragged=not tiled,
    )


def _check_pixels(directory: Directory) -> None:
    samples = directory.integer(_SAMPLES, 1)
    bits = directory.integers(_BITS, 8)
    if samples != 3:
        raise NotFast(f"{samples} samples per pixel")
    if not len(bits) or any(int(value) != 8 for value in bits):
        raise NotFast("samples that are not of 8 bits")
    if directory.integer(_PLANAR, 1) != 1:
        raise NotFast("colours in separate planes")
    if directory.integer(_PHOTOMETRIC) not in (2, 6):
        raise NotFast("colours that are neither RGB nor YCbCr")
    if directory.integer(274, 1) != 1:
        raise NotFast("a picture that is stored turned")


def _codec(directory: Directory, colour: _Means) -> Codec:
    compression, ycbcr = directory.integer(_COMPRESSION, 1), directory.integer(_PHOTOMETRIC) == 6
    if compression == 7:
        meant: Colour = "ycbcr" if ycbcr else "stream" if colour == "stream" else "rgb"
        try:
            if directory.count(_TABLES) > _TABLE_BYTES:
                raise TiffDamaged("Its JPEG tables are absurdly long.")
            return Jpeg(meant, directory.data(_TABLES))
        except ValueError as error:
            raise TiffDamaged(f"Its {error}.") from error
    if compression in _JPEG2000:  # Aperio's photometric tag says RGB of either
        return Jpeg2000(ycbcr=compression == 33003 if colour == "aperio" else ycbcr)
    if ycbcr:
        raise NotFast("YCbCr without JPEG")
    predictor = directory.integer(_PREDICTOR, 1)
    if predictor not in (1, 2):
        raise NotFast(f"TIFF predictor {predictor}")
    packings: Mapping[int, Literal["none", "deflate", "lzw", "zstd"]] = {
        1: "none",
        5: "lzw",
        8: "deflate",
        32946: "deflate",
        50000: "zstd",
    }
    if compression not in packings:
        raise NotFast(f"TIFF compression {compression}")
    return Raw(packings[compression], predictor=predictor == 2 and compression != 1)
