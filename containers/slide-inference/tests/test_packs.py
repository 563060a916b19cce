"""Packs hold tiles in their order, in whatever order they come."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from slideway_inference.encode import encode
from slideway_inference.errors import InternalError, PackTooSmall
from slideway_inference.packs import Packer, header


def tiles(count: int) -> list[bytes]:
    rng = np.random.default_rng(count)
    return [rng.bytes(int(rng.integers(1, 3000))) for _ in range(count)]


def packed(
    order: list[int], data: list[bytes], folder: Path, limit: int = 20_000, held: int = 1 << 20
) -> list[bytes]:
    given: list[bytes] = []

    def give(number: int, body: bytes) -> None:
        assert number == len(given)
        given.append(body)

    packer = Packer([f"{index}_0.jpg" for index in range(len(data))], limit, folder, give, held)
    for index in order:
        packer.put(index, data[index])
    readable = np.zeros(len(data), np.bool_)
    readable[order] = True
    packer.finish(readable)
    packer.close()
    assert [(len(body), pack.bytes) for body, pack in zip(given, packer.packs, strict=True)] == [
        (pack.bytes, pack.bytes) for pack in packer.packs
    ]
    for index in range(len(data)):
        if readable[index]:
            start = packer.offset[index]
            assert given[packer.pack[index]][start : start + packer.length[index]] == data[index]
        else:
            assert (packer.pack[index], packer.entry[index], packer.length[index]) == (-1, -1, 0)
    return given


@pytest.mark.parametrize("held", [1 << 20, 5000, 0])
def test_the_order_in_which_tiles_come_makes_no_difference(tmp_path: Path, held: int) -> None:
    data = tiles(60)
    inorder = packed(list(range(60)), data, tmp_path)
    assert len(inorder) > 2
    assert packed(list(range(59, -1, -1)), data, tmp_path, held=held) == inorder
    shuffled = np.random.default_rng(0).permutation(60).tolist()
    assert packed(shuffled, data, tmp_path, held=held) == inorder
    assert not list(tmp_path.iterdir())


def test_packs_are_given_as_soon_as_they_are_full(tmp_path: Path) -> None:
    given: list[int] = []
    packer = Packer([f"{n}_0.jpg" for n in range(5)], 4096, tmp_path, lambda number, _: given.append(number))
    for index in (0, 2, 3, 4):
        packer.put(index, bytes(1500))
    assert given == []
    packer.put(1, bytes(1500))
    assert given == [0, 1, 2, 3]
    packer.finish(np.ones(5, np.bool_))
    assert given == [0, 1, 2, 3, 4]


def test_a_pack_may_be_full_to_its_last_byte_and_no_further(tmp_path: Path) -> None:
    whole = 2 * (512 + 1024) + 1024
    assert [len(p) for p in packed([0, 1], [bytes(1024)] * 2, tmp_path, whole)] == [whole]
    assert len(packed([0, 1], [bytes(1024)] * 2, tmp_path, whole - 1)) == 2
    with pytest.raises(PackTooSmall):
        packed([0], [bytes(1024)], tmp_path, 512 + 1024 + 1023)


def test_unreadable_tiles_are_left_out_and_lost_ones_are_a_fault(tmp_path: Path) -> None:
    data = tiles(10)
    (one,) = packed([1, 2, 4, 5, 9], data, tmp_path, 100_000)
    with tarfile.open(fileobj=io.BytesIO(one)) as tar:
        assert tar.getnames() == ["1_0.jpg", "2_0.jpg", "4_0.jpg", "5_0.jpg", "9_0.jpg"]
    packer = Packer(["0_0.jpg"], 4096, tmp_path, lambda *_: None)
    with pytest.raises(InternalError):
        packer.finish(np.ones(1, np.bool_))


def test_no_tiles_make_no_pack(tmp_path: Path) -> None:
    assert packed([], [], tmp_path) == []
    assert packed([], tiles(3), tmp_path) == []


def test_the_header_is_what_pythons_tarfile_writes() -> None:
    for name, size in (("0_0.jpg", 0), ("123456_98765.npy", 50_331_776)):
        member = tarfile.TarInfo(name)
        member.size = size
        assert header(name, size) == member.tobuf(tarfile.USTAR_FORMAT)


def test_png_and_raw_are_lossless() -> None:
    tile = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    assert np.array_equal(np.load(io.BytesIO(encode(tile, "raw", None))), tile)
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(tile, "png", None)))), tile)


def test_jpeg_keeps_the_colours_of_every_pixel() -> None:
    """Stripes of one pixel that differ in colour alone, which subsampling would mix."""
    tile = np.zeros((32, 32, 3), np.uint8)
    tile[:, ::2], tile[:, 1::2] = (200, 60, 120), (60, 130, 160)
    from PIL import Image

    image = np.asarray(Image.open(io.BytesIO(encode(tile, "jpeg", 95))).convert("RGB"))
    assert np.abs(image.astype(int) - tile).max() < 20
