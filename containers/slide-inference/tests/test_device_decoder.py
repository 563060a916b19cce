"""Tiles that come as parts are the tiles that come as pixels, whatever the grid; damage in them is found; a job
with them gives the same results. nvImageCodec decodes on the processor here."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slides
import torch
from conftest import REAL_SLIDES, Job, needs_real_slides
from fast_slides import U8, fast, grid, picture, save_jpeg

from slideway_inference.errors import TilesUnreadable
from slideway_inference.fast.parts import NativePart, Parts, get_parts, put_parts

pytest.importorskip("nvidia.nvimgcodec")

from slideway_inference.model.device_decoder import DeviceDecoder

BATCH = 16


def both(path: Path, px: int, mpp: float, held_bytes: int = 1 << 30) -> Iterator[tuple[U8, U8, U8]]:
    """Batches of a slide's grid: cut by the reader, made of parts by the decoder, and which of these came so."""
    decoder = DeviceDecoder(torch.device("cpu"), held_bytes)
    with fast(path) as reader:
        geometry, positions = grid(reader, px, mpp)
        expected = np.empty((len(positions), px, px, 3), np.uint8)
        assert reader.read_tiles(geometry, positions, expected).all()
        buffers: queue.Queue[U8] = queue.Queue()
        buffers.put(np.empty((BATCH, px, px, 3), np.uint8))
        for batch in reader.read_batches(geometry, positions, BATCH, buffers, form="parts"):
            assert not batch.unread
            made = decoder(batch.tiles, batch.stored)
            yield expected[batch.indices], made.numpy(), batch.stored
            buffers.put(batch.buffer)


def differences(path: Path, px: int, mpp: float, **more: Any) -> tuple[int, int, int]:  # noqa: ANN401
    """The largest in grey levels, tiles that came as parts, tiles in all."""
    largest = came = count = 0
    for expected, made, stored in both(path, px, mpp, **more):
        largest = max(largest, int(np.abs(expected.astype(int) - made).max()))
        came += int((stored > 0).sum())
        count += len(stored)
    return largest, came, count


def slide(tmp_path: Path, **changes: Any) -> Path:  # noqa: ANN401
    return save_jpeg(tmp_path / "slide.tiff", picture(1500, 1100), **{"tables": True, **changes})


@pytest.mark.parametrize(
    ("px", "mpp", "tolerance", "fit"),
    [(240, 0.5, 0, True), (256, 0.5, 0, True), (400, 0.55, 1, True), (400, 0.31, 1, True), (64, 0.5, 0, False)],
    ids=["native", "unaligned", "resampled", "enlarged", "too small for their parts"],
)
def test_parts_become_the_same_tiles(tmp_path: Path, px: int, mpp: float, tolerance: int, fit: bool) -> None:
    largest, came, count = differences(slide(tmp_path), px, mpp)
    assert largest <= tolerance
    assert came == (count if fit else 0)


@pytest.mark.parametrize(("ycbcr", "subsampling"), [(True, "444"), (True, "422"), (True, "420"), (False, "444")])
def test_colours_are_the_readers(tmp_path: Path, ycbcr: bool, subsampling: str) -> None:
    largest, came, _ = differences(slide(tmp_path, ycbcr=ycbcr, subsampling=subsampling), 256, 0.5)
    assert largest == 0
    assert came


@needs_real_slides
def test_a_real_slide_has_the_same_tiles() -> None:
    path = REAL_SLIDES / "CMU-1-Small-Region.svs"
    assert differences(path, 256, 0.499) == (0, 88, 88)
    largest, came, count = differences(path, 256, 0.75)
    assert largest <= 1
    assert came > 0.9 * count  # of the others nine native tiles need more room than the pixels


def test_what_is_decoded_at_reduced_size_or_was_not_scanned_is_left_to_the_reader(tmp_path: Path) -> None:
    assert differences(slide(tmp_path), 128, 1.0)[:2] == (0, 0)
    largest, came, count = differences(slide(tmp_path, missing={16}), 400, 0.5)
    assert largest == 0
    assert 0 < came < count


def test_a_small_pool_decodes_again_and_stays_right(tmp_path: Path) -> None:
    assert differences(slide(tmp_path), 256, 0.5, held_bytes=5 * 240 * 240 * 3)[0] == 0


def test_every_native_tile_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slideway_inference.model import device_decoder

    decoded = []
    decode = device_decoder._Codec.__call__

    def counted(self: Any, streams: list[U8], height: int, width: int) -> Any:  # noqa: ANN401
        decoded.append(len(streams))
        return decode(self, streams, height, width)

    monkeypatch.setattr(device_decoder._Codec, "__call__", counted)
    assert differences(slide(tmp_path), 256, 0.5)[0] == 0
    assert sum(decoded) == 6 * 5  # that the grid of 5 × 4 tiles touches


def test_damage_names_the_tiles_that_are_cut_from_it(tmp_path: Path) -> None:
    decoder = DeviceDecoder(torch.device("cpu"))
    with fast(slide(tmp_path)) as reader:
        geometry, positions = grid(reader, 256, 0.5)
        buffers: queue.Queue[U8] = queue.Queue()
        buffers.put(np.empty((BATCH, 256, 256, 3), np.uint8))
        batches = reader.read_batches(geometry, positions, BATCH, buffers, form="parts")
        batch = next(batches)
        broken = get_parts(batch.tiles[1]).parts[1].native
        for tile, size in zip(batch.tiles, batch.stored, strict=True):
            for part in get_parts(tile).parts if size else ():
                if part.native == broken:
                    part.data[len(part.data) // 2 :] = 0
        touched = [
            bool(size) and any(part.native == broken for part in get_parts(tile).parts)
            for tile, size in zip(batch.tiles, batch.stored, strict=True)
        ]
        with pytest.raises(TilesUnreadable) as raised:
            decoder(batch.tiles, batch.stored)
        assert raised.value.damaged.tolist() == touched
        assert 1 < sum(touched) < len(touched)
        good = ~raised.value.damaged
        assert decoder(batch.tiles[good], batch.stored[good]).shape == (good.sum(), 256, 256, 3)
        batches.close()


def test_parts_that_do_not_fit_are_not_put() -> None:
    data = np.arange(200, dtype=np.uint8)
    tile = Parts(7, 2, 240, 240, (0.5, 1.25, 100.0, 200.0), False, [NativePart(3, data), NativePart(4, data[:50])])
    room = np.zeros((16, 16, 3), np.uint8)
    size = put_parts(tile, room)
    assert 250 < size < room.size
    back = get_parts(room)
    assert (back.stream, back.columns, back.box, back.copied) == (7, 2, tile.box, False)
    assert [part.native for part in back.parts] == [3, 4]
    assert np.array_equal(back.parts[0].data, data)
    assert np.array_equal(back.parts[1].data, data[:50])
    assert put_parts(tile, room[: (size - 1) // 48]) == 0


def test_a_job_gives_the_same_results_with_either_decoder(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_jpeg(tmp_path / "slide.tiff", slides.tissue(slides.glass(1500, 1100), 100, 100, 1300, 900))
    data = bytearray(path.read_bytes())
    with fast(path) as reader:
        offset = int(reader.native[0].offsets[16])
    lengths = data.index(b"\xff\xc4", offset) + 5
    data[lengths : lengths + 16] = b"\xff" * 16  # of its Huffman codes: only a decoder finds that they cannot be
    broken = tmp_path / "broken.tiff"
    broken.write_bytes(data)
    tables: list[Any] = []
    for decoder in ("processor", "device"):
        monkeypatch.setenv("SLIDEWAY_JPEG_DECODER", decoder)
        job.slides.clear()
        for name, file in (("whole", path), ("broken", broken)):
            job.add(f"{name}-{decoder}", file)
        ended = job.run()
        assert ended.code == 0, ended.message + ended.stderr
        assert ended.named("model-loaded")[0]["jpegDecoder"] == decoder
        markers = {name: job.marker(f"{name}-{decoder}") for name in ("whole", "broken")}
        assert [marker["state"] for marker in markers.values()] == ["INFERRED"] * 2
        reader_name = "fast" if decoder == "processor" else "fast, nvimagecodec"
        assert [marker["slide"]["reader"] for marker in markers.values()] == [reader_name] * 2
        assert ("decode" in markers["whole"]["timings"]) == (decoder == "device")
        tables.append([job.tiles(f"{name}-{decoder}") for name in markers])
        assert markers["broken"]["tiles"]["unreadable"] > 0
        assert markers["broken"]["tiles"]["ok"] > 0
    for one, other in zip(*tables, strict=True):
        assert one["status"] == other["status"]
        np.testing.assert_array_equal(one["value_haematoxylin_area"], other["value_haematoxylin_area"])
