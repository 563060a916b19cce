"""Decodes one native tile. Whatever a stream declares is checked before anything is decoded, and whatever a decoder
complains of is an error: a decoder's guess at damaged data is never a tile. None of them holds the interpreter's
lock while it decodes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from slideway_inference.fast.source import Data

try:
    imagecodecs: Any = import_module("imagecodecs")
    simplejpeg: Any = import_module("simplejpeg")
except ImportError:  # the caller then reads with OpenSlide
    imagecodecs = simplejpeg = None

U8 = npt.NDArray[np.uint8]
Colour = Literal["rgb", "ycbcr", "stream"]
"""What a JPEG's components are: as the file says, or as the stream itself does."""

_SCANS = 64
"""Most scans of a progressive JPEG; a bomb has thousands of empty ones."""


class TileError(Exception):
    """A native tile cannot be decoded. `retry`: OpenSlide may know more than this reader does; where it is False
    the data itself is bad, and a reader that answers nevertheless would be guessing."""

    def __init__(self, reason: str, *, retry: bool) -> None:
        super().__init__(reason)
        self.retry = retry


class Codec(Protocol):
    """`reductions` are the divisors of a tile's size that it can decode at directly."""

    name: str
    reductions: tuple[int, ...]

    def decode(self, data: Data, width: int, height: int, reduction: int, out: U8) -> None:
        """Decodes a tile that must be width × height into `out` (height / reduction, width / reduction, 3), which
        is contiguous. Raises TileError."""
        ...

    def stored(self, data: Data, width: int, height: int) -> bytes | None:
        """The tile as a JPEG that stands by itself and decodes to the same pixels, without decoding it; None where
        it must be decoded."""
        ...


class Jpeg:
    """JPEG with libjpeg-turbo. `tables` is what TIFF keeps apart from abbreviated streams."""

    name = "jpeg"
    reductions: tuple[int, ...] = (1, 2, 4, 8)

    def __init__(self, colour: Colour, tables: bytes = b"") -> None:
        self._colour: Colour = colour
        kept = _without(tables, {0xE0, 0xEE}) if tables else b"\xff\xd8\xff\xd9"
        if kept[:2] != b"\xff\xd8":
            raise ValueError("the JPEG tables are damaged")
        self._tables = kept[2:-2] if kept.endswith(b"\xff\xd9") else kept[2:]
        self._known: tuple[bytes, int, int, bytes] = (b"\0", 0, 0, b"")

    def decode(self, data: Data, width: int, height: int, reduction: int, out: U8) -> None:
        stream = self._stream(data, width, height)[0]
        try:
            made = _decoded(stream, out)
        except (ValueError, RuntimeError) as error:
            for less in _unpadded(stream):
                with suppress(ValueError, RuntimeError):
                    made = _decoded(less, out)
                    break
            else:
                raise TileError(str(error) or "the JPEG decoder failed", retry=False) from error
        if made.shape != out.shape:
            raise TileError("the JPEG decoded to another size than its tile", retry=True)

    def stored(self, data: Data, width: int, height: int) -> bytes | None:
        """The header is checked as for decoding, and that one scan follows which ends where the bytes do. Anything
        else, and streams that only a decoder can judge, are left to it (one in forty ends in a zero of its own, and
        is decoded to tell that it is no padding); what is damaged within the scan shows when the tile is used."""
        try:
            stream, scan = self._stream(data, width, height)
        except TileError:
            return None
        begin = scan + 2 + int.from_bytes(stream[scan + 2 : scan + 4], "big")
        if begin + 2 > len(stream):
            return None
        coded = np.frombuffer(stream, np.uint8, offset=begin)
        at = np.flatnonzero(coded[:-1] == 0xFF)
        marker = coded[at + 1]
        at = at[(marker != 0) & ((marker < 0xD0) | (marker > 0xD7))]  # neither a stuffed byte nor a restart
        end = begin + int(at[0]) if len(at) else 0
        if not end or stream[end + 1] != 0xD9 or stream[end + 2 :].strip(b"\0\xff"):
            return None
        if stream[end - 1] == 0 != stream[end - 2] - 0xFF:  # it may be padded, which a strict decoder refuses
            try:
                _decoded(stream, np.empty((height, width, 3), np.uint8))
            except (ValueError, RuntimeError):
                return None
        return stream[: end + 2]

    def _stream(self, data: Data, width: int, height: int) -> tuple[bytes, int]:
        """The tile as a stream that stands by itself, and where its first scan's header begins."""
        start, known_width, known_height, head = self._known
        if bytes(data[: len(start)]) != start or (known_width, known_height) != (width, height):
            start, head = self._head(bytes(data), width, height)
            self._known = (start, width, height, head)
        return b"".join((head, memoryview(data)[len(start) :])), len(head)

    def _head(self, data: bytes, width: int, height: int) -> tuple[bytes, bytes]:
        """What stands before the first scan, and what is to stand there instead: tables spliced in, and an Adobe
        marker that says which colours the components are, as libjpeg would otherwise guess."""
        if data[:2] != b"\xff\xd8":
            raise TileError("it is no JPEG", retry=False)
        at, kept, frame, markers = 2, [b"\xff\xd8"], b"", set()
        while True:
            while data[at : at + 2] == b"\xff\xff":
                at += 1
            if at + 4 > len(data) or data[at] != 0xFF:
                raise TileError("its JPEG header is damaged", retry=False)
            marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
            if marker == 0xDA:
                break
            body = data[at : at + 2 + size]
            if size < 2 or len(body) != 2 + size or marker == 0xD8:
                raise TileError("its JPEG header is damaged", retry=False)
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                if frame:
                    raise TileError("its JPEG header has two frames", retry=False)
                frame = body
            markers.add(marker)
            if marker not in (0xE0, 0xEE) or self._colour == "stream":
                kept.append(body)
            at += 2 + size
        if len(frame) < 10:
            raise TileError("its JPEG header names no frame", retry=False)
        if frame[1] not in (0xC0, 0xC1, 0xC2) or frame[4] != 8:
            raise TileError("its JPEG is not baseline or progressive with 8 bits", retry=True)
        high, wide = struct.unpack(">HH", frame[5:9])
        if (wide, high) != (width, height):
            raise TileError(f"its JPEG is {wide} × {high} where the tile is {width} × {height}", retry=True)
        if frame[9] != 3 or len(frame) != 19:
            raise TileError(f"its JPEG has {frame[9]} components", retry=True)
        if frame[1] == 0xC2 and data.count(b"\xff\xda") > _SCANS:
            raise TileError(f"its progressive JPEG has more than {_SCANS} scans", retry=False)
        transform = {"rgb": 0, "ycbcr": 1, "stream": None}[self._colour]
        if self._colour == "stream" and not markers & {0xE0, 0xEE}:
            subsampled = len({frame[11], frame[14], frame[17]}) > 1
            transform = 1 if subsampled else 0
        if transform is not None:
            kept.insert(1, b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes((transform,)))
        kept.insert(1, self._tables)
        start = data[:at] if frame[1] != 0xC2 else data  # of a progressive stream the scans are counted each time
        return start, b"".join(kept) + (b"" if frame[1] != 0xC2 else data[at:])


class _NeverStored:
    """A codec whose tiles are no JPEG."""

    def stored(self, data: Data, width: int, height: int) -> None:
        return None


class Jpeg2000(_NeverStored):
    """JPEG 2000 codestreams with OpenJPEG. `ycbcr`: the components are so, unless the stream turns them itself.
    Chroma may then be of half size, as Aperio's is, and is repeated over the pixels, as OpenSlide does.

    Not at reduced size: what its wavelet leaves at half size is no mean over pixels (4.5 grey levels beside it on
    average, 73 at most, on a real slide, where JPEG's is 0.4), and takes four fifths of the time of the whole."""

    name = "jpeg2000"
    reductions: tuple[int, ...] = (1,)

    def __init__(self, *, ycbcr: bool) -> None:
        self._ycbcr = ycbcr

    def decode(self, data: Data, width: int, height: int, reduction: int, out: U8) -> None:
        halved = self._check(data, width, height)
        try:
            decoded = imagecodecs.jpeg2k_decode(data, numthreads=1)
        except Exception as error:  # the codec's errors have no common class
            raise TileError(str(error) or "the JPEG 2000 decoder failed", retry=True) from error
        if decoded.shape != (height, width, 3) or decoded.dtype != np.uint8:
            raise TileError("the JPEG 2000 decoded to another size than its tile", retry=True)
        if self._ycbcr and not halved and not turned(data):  # imagecodecs makes RGB of halved chroma
            _rgb_of_ycbcr(decoded, out)
        else:
            out[:] = decoded

    def _check(self, data: Data, width: int, height: int) -> bool:
        """Whether chroma is of half width, or half width and height."""
        if data[:4] != b"\xff\x4f\xff\x51" or len(data) < 51:
            raise TileError("it is no JPEG 2000 codestream", retry=data[4:8] == b"jP  ")
        right, bottom, left, top, wide, high = struct.unpack(">IIIIII", data[8:32])
        (components,) = struct.unpack(">H", data[40:42])
        if (right - left, bottom - top) != (width, height):
            raise TileError("its JPEG 2000 has another size than the tile", retry=False)
        whole, luma, chroma = data[42:51] == b"\x07\x01\x01" * 3, data[42:45], data[45:48]
        halved = luma == b"\x07\x01\x01" and chroma in (b"\x07\x02\x01", b"\x07\x02\x02") and chroma == data[48:51]
        if components != 3 or not (whole or (halved and self._ycbcr)):
            raise TileError("its JPEG 2000 is not 3 components of 8 bits at full size", retry=True)
        if not wide or not high or (-(-right // wide)) * (-(-bottom // high)) > 4096:
            raise TileError("its JPEG 2000 is cut into absurdly many tiles", retry=False)
        return halved


class Raw(_NeverStored):
    """Pixels, plain or packed by a general compressor, with or without TIFF's horizontal predictor. Deflate carries
    a checksum; LZW does not, nor does zstd unless its writer asked for one: of damage there only what breaks the
    code or changes the length shows."""

    reductions: tuple[int, ...] = (1,)

    def __init__(self, packing: Literal["none", "deflate", "lzw", "zstd"], *, predictor: bool = False) -> None:
        self.name: str = packing
        self._packing = packing
        self._predictor = predictor

    def decode(self, data: Data, width: int, height: int, reduction: int, out: U8) -> None:
        size = width * height * 3
        try:
            pixels = self._unpack(data, size)
        except Exception as error:  # zlib.error, and the codecs' errors, which have no common class
            raise TileError(str(error) or "the decoder failed", retry=False) from error
        if len(pixels) < size:
            raise TileError("its pixels end early", retry=False)
        if len(pixels) > size and self._packing != "none":
            raise TileError("it unpacks to more than its tile", retry=False)
        tile = np.frombuffer(pixels, np.uint8, size).reshape(height, width, 3)
        if self._predictor:
            np.cumsum(tile, axis=1, dtype=np.uint8, out=out)
        else:
            out[:] = tile

    def _unpack(self, data: Data, size: int) -> Data | bytearray:
        """One byte more than the tile's, if there is one: a stream that is damaged often has another length, and
        Deflate's checksum, which comes last, is looked at only where it is read to its end."""
        if self._packing == "none":
            return data
        if self._packing == "deflate":
            stream = zlib.decompressobj()
            pixels = stream.decompress(data, size + 1)
            if len(pixels) == size and not stream.eof:
                raise ValueError("its Deflate stream is cut short")
            return pixels
        unpack = imagecodecs.lzw_decode if self._packing == "lzw" else imagecodecs.zstd_decode
        made: bytes | bytearray = unpack(data, out=bytearray(size + 1))
        return made


def available() -> bool:
    """Whether the decoders are installed."""
    return simplejpeg is not None


def _decoded(stream: bytes, out: U8) -> U8:
    """Raises ValueError, RuntimeError where libjpeg-turbo complains of anything."""
    made: U8 = simplejpeg.decode_jpeg(
        stream, "RGB", min_width=out.shape[1], min_height=out.shape[0], buffer=out, strict=True
    )
    return made


def _unpadded(stream: bytes) -> Iterator[bytes]:
    """The stream without the zeros that some writers put before its end, of which libjpeg complains as it does of
    damage: without all but one, which can be the last of the picture, then without all. A decoder that misses
    what was taken off says so."""
    end = stream.rfind(b"\xff\xd9")
    if end > 0 and stream[end - 1] == 0:
        kept = len(stream[:end].rstrip(b"\0"))
        if kept + 1 < end:
            yield stream[: kept + 1] + stream[end:]
        yield stream[:kept] + stream[end:]


def turned(data: Data) -> bool:
    """Whether a JPEG 2000 codestream turns its components to RGB by itself (multiple component transform in COD,
    ISO/IEC 15444-1, A.6.1). Raises TileError."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF and data[at + 1] != 0x90:
        if data[at + 1] == 0x52:
            return data[at + 8] == 1
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise TileError("its JPEG 2000 header is damaged", retry=False)


def _without(stream: bytes, dropped: set[int]) -> bytes:
    """A tables-only JPEG stream without some of its segments. Raises ValueError where it is damaged."""
    if stream[:2] != b"\xff\xd8":
        raise ValueError("the JPEG tables are damaged")
    at, kept = 2, [b"\xff\xd8"]
    while at + 4 <= len(stream) and stream[at] == 0xFF and stream[at + 1] != 0xD9:
        size = int.from_bytes(stream[at + 2 : at + 4], "big")
        if size < 2 or at + 2 + size > len(stream):
            raise ValueError("the JPEG tables are damaged")
        if stream[at + 1] not in dropped:
            kept.append(stream[at : at + 2 + size])
        at += 2 + size
    return b"".join([*kept, b"\xff\xd9"])


def _rgb_of_ycbcr(ycc: U8, out: U8) -> None:
    """Full-range BT.601, as JPEG has it."""
    y = ycc[..., 0].astype(np.float32)
    cb = ycc[..., 1].astype(np.float32) - 128
    cr = ycc[..., 2].astype(np.float32) - 128
    for channel, plane in enumerate((y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb)):
        out[..., channel] = np.clip(np.rint(plane), 0, 255)
