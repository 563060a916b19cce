"""Damaged files cost a slide or a tile, never the process: mutants of real slides and of small ones made here are
opened and read in a process of their own, with a limit on its memory and on the time for each. Where tiles carry
checksums, those that can still be read must have the pixels of the undamaged slide. SLIDEWAY_MUTANTS sets how many
there are."""

from __future__ import annotations

import io
import json
import os
import queue
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import CONTAINER, REAL_SLIDES, needs_real_slides
from dicom_files import JPEG_2000, save_level
from fast_slides import fast, imagecodecs, jpeg, picture, save_jpeg, simplejpeg, tiles_of
from PIL import Image

from slideway_inference.errors import SlideUnopenable
from slideway_inference.fast import FastReader, NotFast, TiffDamaged, open_fast
from slideway_inference.fast.codecs import Jpeg, Jpeg2000, Raw, TileError
from slideway_inference.fast.source import Range
from slideway_inference.grid import plan_tiles

MUTANTS = int(os.environ.get("SLIDEWAY_MUTANTS", "250"))
SECONDS_EACH = 10.0
"""Of processor time; what waits for ever meets the time-out of the whole."""
MEMORY = 1 << 30
BASES = (
    "CMU-1-Small-Region.svs",
    "CMU-1-Small-Region.svs",
    "boxes.tiff",
    "OS-1-detail.ome.tif",
    "cmu-1-dicom/level-1-frames-0-9.dcm",
    "bad/unreadable.svs",
    "TCGA-CR-7395-01A-01-TS1.svs",
    "deflate.tif",
    "lzw.tif",
    "jpeg-2000.dcm",
    "deflate-big.tif",
)
CHECKED = {"deflate.tif", "deflate-big.tif"}
"""Whose tiles carry checksums."""


def bases() -> dict[str, bytes]:
    """The files that are mutated, by name."""
    found = {name: (REAL_SLIDES / name).read_bytes() for name in BASES if (REAL_SLIDES / name).exists()}
    image = picture(512, 384)
    for name, compression in (("deflate.tif", "zlib"), ("lzw.tif", "lzw"), ("deflate-big.tif", "zlib")):
        target = io.BytesIO()
        options: dict[str, Any] = {"tile": (64, 64), "photometric": "rgb", "compression": compression}
        with tifffile.TiffWriter(target, bigtiff="big" in name) as tiff:
            tiff.write(image, predictor=True, metadata=None, **options)
            tiff.write(image[::4, ::4], predictor=True, metadata=None, subfiletype=1, **options)
        found[name] = target.getvalue()
    frames = [imagecodecs.jpeg2k_encode(tile, 40, codecformat="j2k") for tile in tiles_of(image, (64, 64))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jpeg-2000.dcm"
        save_level(path, frames, size=(512, 384), tile=(64, 64), syntax=JPEG_2000, colours="YBR_ICT")
        found[path.name] = path.read_bytes()
    return found


class Held:
    """A slide in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)
        self.requests = 0
        self.bytes_read = 0

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        assert all(start >= 0 and size > 0 and start + size <= self.size for start, size in ranges)
        return [self._data[start : start + size] for start, size in ranges]

    def close(self) -> None:
        """Nothing is open."""


def directories(data: bytes) -> list[int]:
    """Offsets of the entries of a TIFF's directories."""
    order, big = "<" if data[:2] == b"II" else ">", data[2:4] in (b"\x2b\0", b"\0\x2b")
    number, pointer, size = ("Q", "Q", 20) if big else ("H", "I", 12)
    wide, (at,) = struct.calcsize(number), struct.unpack_from(order + pointer, data, 8 if big else 4)
    found = []
    while at:
        (count,) = struct.unpack_from(order + number, data, at)
        found += [at + wide + size * index for index in range(count)]
        (at,) = struct.unpack_from(order + pointer, data, at + wide + size * count)
    return found


def mutate(base: bytes, rng: random.Random) -> bytes:
    data = bytearray(base)
    tiff = base[:2] in (b"II", b"MM")
    numbers = (0, 1, 2, 3, 7, 255, 256, 65535, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(data), len(data) - 1, 8)
    kind = rng.choice(["cut", "bytes", "block", "swap", "entry", "entry", "entry", "loop", "bits"])
    if kind == "cut":
        del data[rng.choice([rng.randrange(len(data)), rng.randrange(min(len(data), 2000))]) :]
    elif kind == "bytes":
        for _ in range(rng.randrange(1, 200)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == "block":
        start = rng.randrange(len(data))
        size = min(rng.choice([16, 512, 20_000, 200_000]), len(data) - start)
        data[start : start + size] = rng.choice([bytes(size), rng.randbytes(size), b"\xff" * size])
    elif kind == "swap":
        one, two, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(1, 5000)
        part = data[one : one + size]
        data[two : two + len(part)] = part
    elif kind == "bits" or not tiff:
        head = 4000 if not tiff else len(data)
        for _ in range(rng.randrange(1, 30)):
            data[rng.randrange(min(head, len(data)))] ^= 1 << rng.randrange(8)
    else:
        entries = directories(base)
        order, big = "<" if base[:2] == b"II" else ">", base[2:4] == b"\x2b\0"
        value, first, head = (12, 8, 8) if big else (8, 4, 2)
        for _ in range(rng.randrange(1, 3)):
            at = rng.choice(entries)
            if kind == "loop":
                target = rng.choice(entries) - head
                struct.pack_into(order + "I", data, rng.choice([first, at + value]), max(target, 0))
                continue
            field = rng.choice(["type", "count", "value", "value", "value"])
            if field == "type":
                struct.pack_into(order + "H", data, at + 2, rng.choice([*range(20), 0xFFFF]))
            else:
                number = rng.choice([*numbers, rng.randrange(1 << 32)])
                struct.pack_into(order + "I", data, at + (4 if field == "count" else value), number & 0xFFFFFFFF)
    return bytes(data)


def look(data: bytes, name: str, base: bytes) -> str:
    """Opens and reads what one would of a slide; anything but the named errors is a fault."""
    try:
        reader = open_fast({Path(name).name: Held(data)}, name=Path(name).name, threads=2)
    except NotFast:
        return "not fast"
    except SlideUnopenable:
        return "unopenable"
    with reader:
        assert isinstance(reader, FastReader)
        lost = read(reader)
        if name in CHECKED:
            compare(reader, data, name, base)
    return "damaged" if lost else "read"


def read(reader: FastReader) -> int:
    """Tiles of some levels and an overview; how many tiles were lost."""
    lost = 0
    for index in {0, len(reader.levels) - 1}:
        level = reader.levels[index]
        px = max(1, min(200, level.width, level.height))
        for scale in (1.0, 2.3):
            width = px * level.downsample_x * scale
            if width > min(reader.width, reader.height):
                continue
            geometry = plan_tiles(reader.levels, (1.0, 1.0), px, level.downsample_x * scale, 0, 0.001)
            rng = random.Random(index)
            xs = [rng.uniform(0, reader.width - geometry.footprint_x) for _ in range(4)]
            ys = [rng.uniform(0, reader.height - geometry.footprint_y) for _ in range(4)]
            if min(*xs, *ys) < 0:
                continue
            positions = np.array(list(zip(xs, ys, strict=True)), np.int32)
            buffers: queue.Queue[np.ndarray] = queue.Queue()
            buffers.put(np.empty((4, px, px, 3), np.uint8))
            for batch in reader.read_batches(geometry, positions, 4, buffers):
                lost += len(batch.unread)
                assert all(unread.reason for unread in batch.unread.values())
    top = reader.native[-1]
    if top.codec.name != "jpeg2000" or len(top.sizes) < 64:
        view = reader.overview(max(1, min(64, reader.width)), max(1, min(64, reader.height)))
        assert view.rgb.shape[:2] == view.unreadable.shape
    return lost


def compare(reader: FastReader, data: bytes, name: str, base: bytes) -> None:
    """Where nothing but tiles was damaged, those that can be read have the pixels they had."""
    with open_fast(Held(base), name=name, threads=2) as sound:
        assert isinstance(sound, FastReader)
        tiles = np.zeros(len(base), np.bool_)
        for level in sound.native:
            for offset, size in zip(level.offsets, level.sizes, strict=True):
                tiles[offset : offset + size] = True
        around = ~tiles[: len(data)]
        one, other = (np.frombuffer(each[: len(data)], np.uint8) for each in (base, data))
        if len(one) != len(other) or not np.array_equal(one[around], other[around]):
            return
        geometry = plan_tiles(sound.levels, (1.0, 1.0), 64, 1.0, 0, 0.001)
        positions = np.array([(x, y) for y in range(0, 384, 64) for x in range(0, 512, 64)], np.int32)
        wanted, found = (np.empty((len(positions), 64, 64, 3), np.uint8) for _ in range(2))
        assert sound.read_tiles(geometry, positions, wanted).all()
        readable = reader.read_tiles(geometry, positions, found)
        assert np.array_equal(found[readable], wanted[readable])


def peak_memory() -> int:
    """Of this process alone: what getrusage tells begins with the parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def work(seed: int, count: int) -> None:
    """Runs in a process of its own: prints a line for each mutant."""
    files = bases()
    for number in range(seed, seed + count):
        rng = random.Random(number)
        name = BASES[number % len(BASES)]
        data = mutate(files[name], rng)
        print(json.dumps({"mutant": number, "name": name}), flush=True)
        started = time.process_time()
        outcome = look(data, name, files[name])
        peak = peak_memory()
        seconds = time.process_time() - started
        print(json.dumps({"outcome": outcome, "seconds": seconds, "peak": peak}), flush=True)


@needs_real_slides
def test_mutants_of_slides_never_crash_hang_or_take_much_memory() -> None:
    run = subprocess.run(
        [sys.executable, __file__, "1", str(MUTANTS)],
        cwd=CONTAINER,
        env={
            **os.environ,
            "PYTHONPATH": f"{CONTAINER}{os.pathsep}{CONTAINER / 'tests'}",
            "OPENBLAS_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=120 + MUTANTS,
        check=False,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"{lines[-1:]} {run.stderr[-3000:]}"
    outcomes = [line for line in lines if "outcome" in line]
    assert len(outcomes) == MUTANTS
    assert max(line["seconds"] for line in outcomes) < SECONDS_EACH
    assert max(line["peak"] for line in outcomes) < MEMORY
    assert {"unopenable", "damaged", "read"} <= {line["outcome"] for line in outcomes}


# --- a tile is what the decoder says, or unread ------------------------------------------------------------------


@needs_real_slides
def test_a_tile_with_damaged_bytes_is_unread_wherever_the_decoder_complains() -> None:
    path = REAL_SLIDES / "CMU-1-Small-Region.svs"
    base = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        tables = page.tags[347].value
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    head = b"\xff\xd8\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00" + tables[2:-2]
    rng = random.Random(7)
    data = bytearray(base)
    for offset, size in places:
        for _ in range(rng.choice([0, 1, 1, 3])):
            start, count = offset + rng.randrange(size), rng.choice([1, 1, 4, 40])
            data[start : start + count] = rng.randbytes(count)
    damaged = bytes(data)
    expected: list[np.ndarray | None] = []
    for offset, size in places:
        stream = damaged[offset : offset + size]
        try:
            tile = simplejpeg.decode_jpeg(head + stream[2:], "RGB", strict=True)
            expected.append(tile if stream[:2] == b"\xff\xd8" and tile.shape == (240, 240, 3) else None)
        except ValueError:
            expected.append(None)
    assert 20 < sum(tile is None for tile in expected) < len(expected) - 20
    with open_fast(Held(damaged), name="s.svs", threads=2) as reader:
        geometry = plan_tiles(reader.levels, (0.5, 0.5), 240, 0.5, 0, 0.02)
        whole = [i for i in range(len(places)) if i % 10 < 9 and i // 10 < 12]
        positions = np.array([(i % 10 * 240, i // 10 * 240) for i in whole], np.int32)
        buffers: queue.Queue[np.ndarray] = queue.Queue()
        buffers.put(np.empty((len(whole), 240, 240, 3), np.uint8))
        (batch,) = reader.read_batches(geometry, positions, len(whole), buffers)
    for place, index in enumerate(whole):
        wanted = expected[index]
        assert (place in batch.unread) == (wanted is None)
        if wanted is None:
            assert not batch.unread[place].retry or "JPEG" in batch.unread[place].reason
        else:
            assert np.array_equal(batch.tiles[place], wanted)


@pytest.mark.parametrize("zeros", [1, 2, 3, 60])
def test_zeros_before_the_end_of_a_jpeg_are_no_damage(zeros: int) -> None:
    for seed in range(40):
        tile = picture(64, 64, seed)
        stream = jpeg(tile, ycbcr=True)
        out, expected = np.empty_like(tile), np.empty_like(tile)
        Jpeg("ycbcr").decode(stream, 64, 64, 1, expected)
        padded = stream[:-2] + bytes(zeros) + stream[-2:]
        Jpeg("ycbcr").decode(padded, 64, 64, 1, out)
        assert np.array_equal(out, expected)
        kept = Jpeg("ycbcr").stored(padded, 64, 64)
        assert kept is None or np.array_equal(simplejpeg.decode_jpeg(kept, "RGB", strict=True), expected)


def test_a_jpeg_whose_picture_ends_in_a_zero_is_still_passed_through() -> None:
    streams = (jpeg(picture(64, 64, seed), ycbcr=True) for seed in range(2000))
    stream = next(stream for stream in streams if stream[-3] == 0 and stream[-4] != 0xFF)
    kept = Jpeg("ycbcr").stored(stream, 64, 64)
    assert kept is not None
    assert kept.endswith(stream[-40:])


def test_a_jpeg_that_ends_early_in_zeros_is_damaged() -> None:
    for seed in range(40):
        stream = jpeg(picture(64, 64, seed), ycbcr=True)
        for zeros in (2, 3):
            with pytest.raises(TileError):
                decode(Jpeg("ycbcr"), stream[:-62] + bytes(zeros) + stream[-2:], 64)


def test_one_lost_native_tile_costs_only_the_tiles_that_it_lies_under(tmp_path: Path) -> None:
    path = save_jpeg(tmp_path / "s.tif", picture(960, 960))
    with tifffile.TiffFile(path) as tiff:
        offset, size = tiff.pages[0].dataoffsets[5], tiff.pages[0].databytecounts[5]
    with path.open("r+b") as file:
        file.seek(offset + size // 2)
        file.write(bytes(size // 2))
    with fast(path) as reader:
        geometry = plan_tiles(reader.levels, (0.5, 0.5), 100, 0.5, 0, 0.02)
        positions = np.array([(x, y) for y in range(0, 900, 100) for x in range(0, 900, 100)], np.int32)
        readable = reader.read_tiles(geometry, positions, np.empty((len(positions), 100, 100, 3), np.uint8))
        under = (positions + 100 > 240).all(axis=1) & (positions < 480).all(axis=1)
        assert np.array_equal(readable, ~under)
        view = reader.overview(96, 96)
        assert view.unreadable[24:48, 24:48].all()
        assert view.unreadable.sum() == 24 * 24
        assert not view.scanned[24:48, 24:48].any()


# --- bombs and absurdities ---------------------------------------------------------------------------------------


def decode(codec: Jpeg | Jpeg2000 | Raw, data: bytes, size: int = 256) -> None:
    codec.decode(data, size, size, 1, np.empty((size, size, 3), np.uint8))


def test_a_jpeg_that_declares_another_size_is_not_decoded() -> None:
    stream = bytearray(jpeg(picture(256, 256), ycbcr=True))
    at = stream.index(b"\xff\xc0")
    struct.pack_into(">HH", stream, at + 5, 65500, 65500)
    with pytest.raises(TileError, match="65500"):
        decode(Jpeg("ycbcr"), bytes(stream))


def test_a_progressive_jpeg_of_endless_scans_is_not_decoded() -> None:
    target = io.BytesIO()
    Image.fromarray(picture(256, 256)).save(target, "JPEG", progressive=True, quality=80)
    stream = target.getvalue()
    decode(Jpeg("ycbcr"), stream)
    last = stream.rindex(b"\xff\xda")
    bomb = stream[:-2] + stream[last:-2] * 500 + stream[-2:]
    with pytest.raises(TileError, match="scans"):
        decode(Jpeg("ycbcr"), bomb)


def test_what_unpacks_to_more_than_its_tile_is_cut_off_there_and_unread() -> None:
    bomb = zlib.compress(bytes(1 << 27), 1)
    tracemalloc.start()
    with pytest.raises(TileError, match="more than its tile"):
        decode(Raw("deflate"), bomb)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    with pytest.raises(TileError, match="early"):
        decode(Raw("deflate"), zlib.compress(bytes(1000)))


def pack(packing: Any, data: bytes) -> bytes:  # noqa: ANN401
    packed: bytes = zlib.compress(data) if packing == "deflate" else getattr(imagecodecs, f"{packing}_encode")(data)
    return packed


@pytest.mark.parametrize("packing", ["deflate", "lzw", "zstd"])
def test_a_packed_tile_that_is_cut_short_or_of_another_length_is_unread(packing: Any) -> None:  # noqa: ANN401
    tile = picture(256, 256).tobytes()
    stream = pack(packing, tile)
    decode(Raw(packing), stream)
    for damaged in (stream[: len(stream) // 2], stream[:-3], pack(packing, tile + b"\0"), pack(packing, tile[:-1])):
        with pytest.raises(TileError):
            decode(Raw(packing), damaged)


def test_a_flipped_bit_in_a_deflate_tile_is_always_noticed() -> None:
    tile = picture(256, 256)
    stream, rng = zlib.compress(tile), random.Random(3)
    for _ in range(60):
        damaged = bytearray(stream)
        damaged[rng.randrange(len(stream))] ^= 1 << rng.randrange(8)
        with pytest.raises(TileError):
            decode(Raw("deflate"), bytes(damaged))


def test_a_jpeg_2000_that_declares_another_size_is_not_decoded() -> None:
    stream = bytearray(imagecodecs.jpeg2k_encode(picture(256, 256), codecformat="j2k"))
    decode(Jpeg2000(ycbcr=False), bytes(stream))
    struct.pack_into(">I", stream, 8, 1 << 30)
    with pytest.raises(TileError, match="another size"):
        decode(Jpeg2000(ycbcr=False), bytes(stream))


def entry(path: Path, tag: int, value: int, *, field: int = 8) -> None:
    """Overwrites a number of the first directory's entry."""
    data = bytearray(path.read_bytes())
    at = next(at for at in directories(bytes(data)) if struct.unpack_from("<H", data, at)[0] == tag)
    struct.pack_into("<I", data, at + field, value)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("tag", "value", "field", "told"),
    [
        (256, 1 << 31, 8, "absurd"),
        (256, 0, 8, "absurd"),
        (257, 100_000, 8, "tile offsets"),
        (322, 0, 8, "no size"),
        (324, 0xFFFFFF00, 8, "outside the file"),
        (324, 1 << 30, 4, "tile offsets"),
        (325, 1, 4, "tile offsets"),
    ],
)
def test_absurd_numbers_in_a_directory_are_told(
    tmp_path: Path, tag: int, value: int, field: int, told: str
) -> None:
    path = save_jpeg(tmp_path / "s.tif", picture(700, 600))
    entry(path, tag, value, field=field)
    with pytest.raises(TiffDamaged, match=told):
        fast(path)


def test_directories_that_run_in_a_circle_are_told(tmp_path: Path) -> None:
    path = save_jpeg(tmp_path / "s.tif", picture(300, 300))
    data = bytearray(path.read_bytes())
    last = directories(bytes(data))[-1]
    (first,) = struct.unpack_from("<I", data, 4)
    struct.pack_into("<I", data, last + 12, first)
    path.write_bytes(data)
    with pytest.raises(TiffDamaged, match="circle"):
        fast(path)


def test_a_file_cut_short_keeps_the_tiles_it_still_has(tmp_path: Path) -> None:
    """Directories at the front, as in a cloud-optimised TIFF."""
    path = save_jpeg(tmp_path / "s.tif", picture(960, 960))
    data = path.read_bytes()
    with tifffile.TiffFile(path) as tiff:
        offsets = tiff.pages[0].dataoffsets
    short = Held(data[: offsets[8] + 10])
    with open_fast(short, name="s.tif", threads=1) as reader:
        geometry = plan_tiles(reader.levels, (0.5, 0.5), 240, 0.5, 0, 0.02)
        positions = np.array([(i % 4 * 240, i // 4 * 240) for i in range(16)], np.int32)
        readable = reader.read_tiles(geometry, positions, np.empty((16, 240, 240, 3), np.uint8))
    assert readable.tolist() == [True] * 8 + [False] * 8


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]))
