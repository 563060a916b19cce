"""How a DICOM series is a slide. Each file is a level or a part of one; of a file the header is read, and where its
frames lie. Only what says so is parsed: a small reader of explicit little-endian data sets, which skips the rest
and checks every length. Labels and overviews are told by their headers, and their pixels never read."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from slideway_inference.errors import SlideUnopenable
from slideway_inference.fast.codecs import Codec, Jpeg, Jpeg2000, Raw, TileError
from slideway_inference.fast.pyramid import NativeLevel, NotFast, PlanesNotSupported, Pyramid
from slideway_inference.fast.source import Blocks, ByteSource, Data
from slideway_inference.jpeg import subsampled

U8 = npt.NDArray[np.uint8]

_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_PLAIN, _JPEG, _JPEG2000 = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.9"
_LEVELS = {("ORIGINAL", "NONE"), ("DERIVED", "NONE"), ("DERIVED", "RESAMPLED")}
_LONG = {b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV", b"UV"}
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXELS = 0x7FE00010

_DEPTH = 12
_ELEMENTS = 4_000_000
_VALUE_BYTES = 64 << 20
_FRAMES = 8 << 20
_FRAGMENTS = 4096
_WALK_BYTES = 64 << 20
"""Largest file whose frames are found by going through it, where no table says where they are."""

_FIRST_READ, _LONGEST_READ = 64 << 10, 4 << 20
"""Of a header at once."""

_CLASS, _SYNTAX = 0x00020002, 0x00020010
_TYPE, _INSTANCE, _SERIES = 0x00080008, 0x00080018, 0x0020000E
_FRAME_OFFSET, _WHOLE, _ORGANISATION = 0x00200228, 0x00200242, 0x00209311
_SAMPLES, _COLOURS, _PLANAR, _FRAME_COUNT = 0x00280002, 0x00280004, 0x00280006, 0x00280008
_ROWS, _COLUMNS, _BITS, _SIGNED = 0x00280010, 0x00280011, 0x00280100, 0x00280103
_WIDTH, _HEIGHT, _PATHS, _PLANES = 0x00480006, 0x00480007, 0x00480302, 0x00480303
_SHARED, _MEASURES, _SPACING = 0x52009229, 0x00289110, 0x00280030
_PER_FRAME, _POSITION, _POSITION_X, _POSITION_Y = 0x52009230, 0x0048021A, 0x0048021E, 0x0048021F
_TABLE = 0x7FE00001

Wanted = Mapping[int, Any]
"""Attributes to keep: of a sequence, those of its items."""
_WANTED: Wanted = {
    **dict.fromkeys((_CLASS, _SYNTAX, _TYPE, _INSTANCE, _SERIES, _FRAME_OFFSET, _WHOLE, _ORGANISATION)),
    **dict.fromkeys((_SAMPLES, _COLOURS, _PLANAR, _FRAME_COUNT, _ROWS, _COLUMNS, _BITS, _SIGNED)),
    **dict.fromkeys((_WIDTH, _HEIGHT, _PATHS, _PLANES, _TABLE)),
    _SHARED: {_MEASURES: {_SPACING: None}},
    _PER_FRAME: {_POSITION: {_POSITION_X: None, _POSITION_Y: None}},
}


class NotDicom(Exception):
    """The bytes are no DICOM slide."""


class DicomDamaged(SlideUnopenable):
    """The DICOM header cannot be followed."""


@dataclass
class _Instance:
    """One file: its wanted values, and where its pixels begin. `pixel_bytes` is None where they are
    encapsulated."""

    source: ByteSource
    values: dict[int, Any]
    at: int
    pixel_bytes: int | None

    def number(self, tag: int, default: int | None = None) -> int:
        value = self.values.get(tag, b"")
        try:
            if len(value) in (2, 4) and tag != _FRAME_COUNT:
                return int.from_bytes(value, "little")
            return int(value.decode("ascii").strip(" \0"))
        except (ValueError, UnicodeDecodeError):
            if default is None:
                raise DicomDamaged(f"DICOM attribute {tag:08x} is missing or damaged.") from None
            return default

    def text(self, tag: int) -> str:
        value = self.values.get(tag, b"")
        return str(value.decode("ascii", "replace")).strip(" \0")


def dicom_pyramid(sources: Mapping[str, ByteSource], name: str) -> Pyramid:
    """Raises NotDicom, NotFast, PlanesNotSupported, DicomDamaged."""
    opened = _Reader(sources[name]).instance()
    if opened.text(_CLASS) != _SLIDE:
        raise NotFast("DICOM, but no slide")
    others = [source for other, source in sources.items() if other != name]
    with ThreadPoolExecutor(8, "header") as pool:
        found = [opened, *(i for i in pool.map(_instance_of, others) if i is not None)]
    series = opened.text(_SERIES)
    groups: dict[tuple[int, int], list[_Instance]] = {}
    for instance in found:
        kinds = instance.text(_TYPE).split("\\")
        is_level = len(kinds) == 4 and kinds[1:3] == ["PRIMARY", "VOLUME"] and (kinds[0], kinds[3]) in _LEVELS
        if instance.text(_SERIES) == series and instance.text(_CLASS) == _SLIDE and is_level:
            groups.setdefault((instance.number(_WIDTH), instance.number(_HEIGHT)), []).append(instance)
    if not groups:
        raise NotFast("a DICOM series without a level")
    ordered = sorted(groups.items(), key=lambda item: -item[0][0])
    notes: set[str] = set()
    levels = [_level(width, height, instances, notes) for (width, height), instances in ordered]
    properties = {"openslide.vendor": "dicom"}
    spacing = _spacing(ordered[0][1][0])
    if spacing is not None:
        properties |= {"openslide.mpp-x": repr(spacing[0]), "openslide.mpp-y": repr(spacing[1])}
    return Pyramid("dicom", levels, properties, note=", ".join(sorted(notes)))


def _instance_of(source: ByteSource) -> _Instance | None:
    """A neighbour that is no DICOM is none of the slide."""
    try:
        return _Reader(source).instance()
    except (NotDicom, NotFast, DicomDamaged):
        return None


def _spacing(instance: _Instance) -> tuple[float, float] | None:
    """µm per pixel in x and y."""
    try:
        text = instance.values[_SHARED][0][_MEASURES][0][_SPACING].decode("ascii").strip(" \0")
        rows, columns = (float(part) * 1e3 for part in text.split("\\"))
    except (KeyError, IndexError, ValueError, UnicodeDecodeError):
        return None
    return columns, rows


# --- a level -----------------------------------------------------------------------------------------------------


def _level(width: int, height: int, instances: list[_Instance], notes: set[str]) -> NativeLevel:
    first = instances[0]
    tile_width, tile_height = first.number(_COLUMNS), first.number(_ROWS)
    if not (0 < width <= 4 << 20 and 0 < height <= 4 << 20 and 0 < tile_width <= 4096 and 0 < tile_height <= 4096):
        raise DicomDamaged(f"A level of {width} × {height} in tiles of {tile_width} × {tile_height} is absurd.")
    columns, rows = -(-width // tile_width), -(-height // tile_height)
    if columns * rows > _FRAMES:
        raise DicomDamaged(f"A level of {columns * rows} tiles is absurd.")
    offsets, sizes = np.zeros(columns * rows, np.int64), np.zeros(columns * rows, np.int64)
    source = np.zeros(columns * rows, np.uint16)
    taken = np.zeros(columns * rows, np.bool_)
    codecs = []
    for number, instance in enumerate(instances):
        if (instance.number(_COLUMNS), instance.number(_ROWS)) != (tile_width, tile_height):
            raise NotFast("a level in tiles of different sizes")
        if (instance.text(_WHOLE) or instance.text(_INSTANCE)) != (first.text(_WHOLE) or first.text(_INSTANCE)):
            raise NotFast("two pictures of one level's size")
        _check_pixels(instance)
        frame_offsets, frame_sizes = _frames(instance, tile_width * tile_height * 3)
        tiles = _tiles(instance, len(frame_offsets), tile_width, tile_height, columns, rows)
        new = ~taken[tiles]
        taken[tiles] = True
        offsets[tiles[new]], sizes[tiles[new]] = frame_offsets[new], frame_sizes[new]
        source[tiles[new]] = number
        codecs.append(_codec(instance, frame_offsets, frame_sizes, notes))
    if len({codec.key for codec in codecs}) != 1:
        raise NotFast("a level whose files are encoded differently")
    return NativeLevel(
        width=width,
        height=height,
        tile_width=tile_width,
        tile_height=tile_height,
        codec=codecs[0],
        offsets=offsets,
        sizes=sizes,
        sources=[instance.source for instance in instances],
        source=source if len(instances) > 1 else None,
    )


def _check_pixels(instance: _Instance) -> None:
    if instance.number(_PLANES, 1) != 1:
        raise PlanesNotSupported(f"It has {instance.number(_PLANES)} focal planes: give one as a slide of its own.")
    if instance.number(_PATHS, 1) != 1:
        raise PlanesNotSupported(f"It has {instance.number(_PATHS)} channels: it is no brightfield slide.")
    for tag, wanted in ((_SAMPLES, 3), (_PLANAR, 0), (_BITS, 8), (_SIGNED, 0)):
        if instance.number(tag) != wanted:
            raise NotFast(f"DICOM attribute {tag:08x} of {instance.number(tag)}")


def _tiles(
    instance: _Instance, frames: int, tile_width: int, tile_height: int, columns: int, rows: int
) -> npt.NDArray[np.int64]:
    """The tile that each frame is."""
    positions = instance.values.get(_PER_FRAME, [])
    if instance.text(_ORGANISATION) == "TILED_FULL" or not positions:
        first = instance.number(_FRAME_OFFSET, 0)
        if first + frames > columns * rows:
            raise DicomDamaged("A level has more frames than tiles.")
        return np.arange(first, first + frames)
    if len(positions) != frames:
        raise DicomDamaged("A level's frames and their positions are not as many.")
    tiles = np.empty(frames, np.int64)
    for index, item in enumerate(positions):
        try:
            place = item[_POSITION][0]
            x, y = (struct.unpack("<i", place[tag])[0] - 1 for tag in (_POSITION_X, _POSITION_Y))
        except (KeyError, IndexError, struct.error) as error:
            raise DicomDamaged("A frame does not say where it lies.") from error
        if x % tile_width or y % tile_height:
            raise NotFast("frames that lie across one another")
        if not (0 <= x // tile_width < columns and 0 <= y // tile_height < rows):
            raise DicomDamaged("A frame lies outside its level.")
        tiles[index] = y // tile_height * columns + x // tile_width
    if len(np.unique(tiles)) != frames:
        raise PlanesNotSupported("Several frames lie at one place: focal planes or channels.")
    return tiles


def _codec(
    instance: _Instance, offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], notes: set[str]
) -> _Frame:
    """A JPEG that the header calls RGB though its chroma is subsampled holds YCbCr: RGB never is."""
    syntax, colours = instance.text(_SYNTAX), instance.text(_COLOURS)
    if syntax == _PLAIN and colours == "RGB":
        return _Frame(Raw("none"), "plain", packed=False)
    if syntax == _JPEG and colours in ("RGB", "YBR_FULL", "YBR_FULL_422"):
        ycbcr = colours != "RGB"
        if not ycbcr and len(offsets):
            start = int(offsets[0])
            size = min(int(sizes[0]), 1 << 20, instance.source.size - start)
            if start < 0 or size < 8:
                raise DicomDamaged("The first frame lies outside the file.")
            (head,) = instance.source.read([(start, size)])
            ycbcr = subsampled(bytes(head[8:]))
            notes |= {"YCbCr"} if ycbcr else set()
        return _Frame(Jpeg("ycbcr" if ycbcr else "rgb"), f"jpeg {ycbcr}", packed=True)
    if syntax in (_JPEG2000 + "0", _JPEG2000 + "1") and colours in ("RGB", "YBR_ICT", "YBR_RCT"):
        ycbcr = colours != "RGB"  # what the stream itself turns comes out as RGB whatever the header says
        return _Frame(Jpeg2000(ycbcr=ycbcr), f"jpeg2000 {ycbcr}", packed=True)
    raise NotFast(f"DICOM transfer syntax {syntax} with {colours}")


class _Frame:
    """Decodes a frame, put together from the fragments it is stored in where it is `packed`."""

    def __init__(self, codec: Codec, key: str, *, packed: bool) -> None:
        self.name = codec.name
        self.reductions = codec.reductions
        self.key = key
        self._codec = codec
        self._packed = packed

    def decode(self, data: Data, width: int, height: int, reduction: int, out: U8) -> None:
        self._codec.decode(self._whole(data), width, height, reduction, out)

    def stored(self, data: Data, width: int, height: int) -> bytes | None:
        try:
            return self._codec.stored(self._whole(data), width, height)
        except TileError:
            return None

    def _whole(self, data: Data) -> Data:
        if self._packed:
            parts, at = [], 0
            while at + 8 <= len(data):
                tag, size = _tag(data, at), int.from_bytes(data[at + 4 : at + 8], "little")
                if tag != _ITEM or at + 8 + size > len(data):
                    raise TileError("its DICOM fragments are damaged", retry=False)
                parts.append(data[at + 8 : at + 8 + size])
                at += 8 + size
            data = parts[0] if len(parts) == 1 else b"".join(parts)
        return data


# --- frames ------------------------------------------------------------------------------------------------------


def _frames(instance: _Instance, plain: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Offset and size of each frame; of encapsulated ones with the headers of their fragments."""
    count = instance.number(_FRAME_COUNT, 1)
    if not 0 < count <= _FRAMES:
        raise DicomDamaged(f"{count} frames are absurd.")
    if instance.pixel_bytes is not None:
        if instance.pixel_bytes < count * plain:
            raise DicomDamaged("The frames do not fit into the pixel data.")
        return instance.at + np.arange(count) * plain, np.full(count, plain)
    blocks = Blocks(instance.source)
    try:
        head = blocks.read(instance.at, 8)
        size = int.from_bytes(head[4:], "little")
        if _tag(head, 0) != _ITEM or size > _VALUE_BYTES:
            raise DicomDamaged("The pixel data does not begin with an offset table.")
        base = instance.at + 8 + size
        table = np.frombuffer(blocks.read(instance.at + 8, size // 4 * 4), "<u4").astype(np.int64)
        extended = instance.values.get(_TABLE, b"")
        if len(extended) == 8 * count:
            table = np.frombuffer(extended, "<u8").astype(np.int64)
        if len(table) == 0:
            return _walk(instance, base, count)
        if len(table) != count or (np.diff(table) < 8).any() or table[0] != 0 or table[-1] > instance.source.size:
            raise DicomDamaged("The table of frame offsets is damaged.")
        starts = base + table
        end = _end(blocks, int(starts[-1]))
    except EOFError as error:
        raise DicomDamaged("The pixel data ends early: the file is cut short.") from error
    return starts, np.diff(np.append(starts, end))


def _end(blocks: Blocks, at: int) -> int:
    """Where the fragments that begin at `at` end."""
    for _ in range(_FRAGMENTS):
        if at >= blocks.size:
            return at
        head = blocks.read(at, 8)
        if _tag(head, 0) != _ITEM:
            return at
        at += 8 + int.from_bytes(head[4:], "little")
    raise DicomDamaged("A frame of absurdly many fragments.")


def _walk(instance: _Instance, at: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Goes from fragment to fragment, each of them a frame."""
    if instance.source.size > _WALK_BYTES:
        raise NotFast("a large DICOM file without a table of frame offsets")
    blocks = Blocks(instance.source, 1 << 20, 4)
    starts = []
    while True:
        head = blocks.read(at, 8)
        if _tag(head, 0) != _ITEM:
            break
        starts.append(at)
        if len(starts) > count:
            raise NotFast("frames in several fragments without a table of frame offsets")
        at += 8 + int.from_bytes(head[4:], "little")
    if len(starts) != count:
        raise DicomDamaged(f"The pixel data holds {len(starts)} frames where the header tells of {count}.")
    return np.array(starts), np.diff([*starts, at])


# --- the header --------------------------------------------------------------------------------------------------


def _tag(data: Data, at: int) -> int:
    group, element = struct.unpack_from("<HH", data, at)
    return int(group << 16 | element)


class _Ahead:
    """Reads forward through a source, more at once the longer it goes on: the header of a level whose frames each
    say where they lie is megabytes of small things. Raises EOFError outside the source."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._at, self._held = 0, b""
        self._step = _FIRST_READ

    def read(self, offset: int, size: int) -> bytes:
        end = self._at + len(self._held)
        if offset < self._at or offset + size > end:
            if offset < 0 or offset + size > self._source.size:
                raise EOFError(f"{size} bytes at {offset} are outside the file")
            if self._at < end and self._at <= offset <= end:
                self._step = min(2 * self._step, _LONGEST_READ)
            else:
                self._step = _FIRST_READ
            more = min(max(size, self._step), self._source.size - offset)
            self._at, self._held = offset, bytes(self._source.read([(offset, more)])[0]) if more else b""
        return self._held[offset - self._at : offset - self._at + size]


class _Reader:
    """Goes through a data set. Raises NotDicom, NotFast, DicomDamaged."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._blocks = _Ahead(source)
        self._elements = 0
        self._held = 0
        self._pixels: tuple[int, int] | None = None

    def instance(self) -> _Instance:
        if self._source.size < 132 or self._blocks.read(128, 4) != b"DICM":
            raise NotDicom
        values: dict[int, Any] = {}
        try:
            self._data_set(132, self._source.size, values, _WANTED, 0)
        except EOFError as error:
            raise DicomDamaged("The DICOM header is cut short.") from error
        if self._pixels is None:
            raise DicomDamaged("The DICOM file has no pixel data.")
        at, size = self._pixels
        return _Instance(self._source, values, at, None if size == _UNDEFINED else size)

    def _data_set(self, at: int, end: int, values: dict[int, Any], wanted: Wanted, depth: int) -> int:
        """Reads elements into `values` up to `end`, a delimiter or the pixels; returns where it ended."""
        if depth > _DEPTH:
            raise DicomDamaged("DICOM sequences are nested absurdly deep.")
        while at < end:
            self._count()
            head = self._blocks.read(at, min(12, self._source.size - at))
            if len(head) < 8:
                raise EOFError
            tag, kind = _tag(head, 0), head[4:6]
            if tag in (_ITEM_END, _SEQUENCE_END):
                return at + 8
            if depth == 0 and tag >> 16 > 2:
                self._check_syntax(values)
            if kind in _LONG:
                if len(head) < 12:
                    raise EOFError
                size, start = int.from_bytes(head[8:12], "little"), at + 12
            else:
                size, start = int.from_bytes(head[6:8], "little"), at + 8
            if depth == 0 and tag == _PIXELS:
                self._pixels = start, size
                return at
            if kind == b"SQ":
                items: list[dict[int, Any]] = []
                at = self._items(start, size, items, wanted.get(tag), depth + 1)
                if wanted.get(tag) is not None:
                    values[tag] = items
                continue
            if size == _UNDEFINED:
                raise NotFast("DICOM elements of undefined length")
            if start + size > self._source.size:
                raise DicomDamaged("A DICOM element reaches beyond the file.")
            if tag in wanted and wanted[tag] is None:
                self._held += size
                if self._held > _VALUE_BYTES:
                    raise DicomDamaged("The DICOM header's values are absurdly long.")
                values[tag] = self._blocks.read(start, size)
            at = start + size
        return at

    def _items(self, at: int, size: int, items: list[dict[int, Any]], wanted: Wanted | None, depth: int) -> int:
        """Reads a sequence's items; returns where it ended."""
        if size != _UNDEFINED:
            if at + size > self._source.size:
                raise DicomDamaged("A DICOM sequence reaches beyond the file.")
            if wanted is None:
                return at + size
        end = self._source.size if size == _UNDEFINED else at + size
        while at < end:
            self._count()
            head = self._blocks.read(at, 8)
            tag, length = _tag(head, 0), int.from_bytes(head[4:], "little")
            if tag == _SEQUENCE_END:
                return at + 8
            if tag != _ITEM:
                raise DicomDamaged("A DICOM sequence holds something that is no item.")
            start = at + 8
            stop = self._source.size if length == _UNDEFINED else start + length
            if stop > self._source.size:
                raise DicomDamaged("A DICOM item reaches beyond the file.")
            values: dict[int, Any] = {}
            items.append(values)
            skipped = wanted is None and length != _UNDEFINED
            at = stop if skipped else self._data_set(start, stop, values, wanted or {}, depth)
        return at

    def _count(self) -> None:
        self._elements += 1
        if self._elements > _ELEMENTS:
            raise DicomDamaged("The DICOM header has absurdly many elements.")

    def _check_syntax(self, values: dict[int, Any]) -> None:
        syntax = values.get(_SYNTAX, b"").strip(b" \0").decode("ascii", "replace")
        if syntax not in (_PLAIN, _JPEG, _JPEG2000 + "0", _JPEG2000 + "1"):
            raise NotFast(f"DICOM transfer syntax {syntax[:64]}")
