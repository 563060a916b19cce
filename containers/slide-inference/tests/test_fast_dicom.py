"""DICOM slides: one file or many, full or sparse, with and without tables of offsets, as OpenSlide reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
from dicom_files import JPEG_2000, PLAIN, save_level
from fast_slides import imagecodecs, jpeg, picture, tiles_of
from PIL import Image

from slideway_inference.fast import DicomDamaged, FastReader, NotFast, PlanesNotSupported, open_fast, sources_of

IMAGE = picture(700, 500)
TILE = (128, 96)
COLUMNS, ROWS = 6, 6


def frames(image: np.ndarray = IMAGE, **changes: Any) -> list[bytes]:  # noqa: ANN401
    return [jpeg(tile, ycbcr=True, **changes) for tile in tiles_of(image, (TILE[1], TILE[0]))]


def opened(path: Path) -> FastReader:
    return open_fast(sources_of(path), name=path.name, threads=2)


def whole(reader: FastReader, level: int = 0) -> np.ndarray:
    size = reader.levels[level]
    return reader.read_region(level, 0, 0, size.width, size.height).rgb


def same(path: Path, tolerance: int = 0) -> None:
    """Levels, µm per pixel and all pixels are OpenSlide's."""
    with opened(path) as reader, openslide.OpenSlide(str(path)) as slide:
        assert [(level.width, level.height) for level in reader.levels] == list(slide.level_dimensions)
        assert reader.mpp == pytest.approx(
            (float(slide.properties["openslide.mpp-x"]), float(slide.properties["openslide.mpp-y"]))
        )
        for index, size in enumerate(slide.level_dimensions):
            rgba = np.asarray(slide.read_region((0, 0), index, size))
            region = reader.read_region(index, 0, 0, *size)
            scanned = rgba[..., 3] == 255
            assert (
                np.abs(np.where(scanned[..., None], rgba[..., :3], 255) - region.rgb.astype(int)).max() <= tolerance
            )
            assert scanned.all() if region.scanned is None else np.array_equal(region.scanned, scanned)


@pytest.mark.parametrize("table", ["none", "basic", "extended"])
@pytest.mark.parametrize("endless", [False, True])
def test_frames_are_found_with_every_kind_of_table(tmp_path: Path, table: Any, endless: bool) -> None:  # noqa: ANN401
    same(save_level(tmp_path / "a.dcm", frames(), size=(700, 500), tile=TILE, table=table, endless=endless))


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_jpeg_of_every_sampling(tmp_path: Path, subsampling: str) -> None:
    same(save_level(tmp_path / "a.dcm", frames(subsampling=subsampling), size=(700, 500), tile=TILE))


def test_rgb_jpeg(tmp_path: Path) -> None:
    made = [jpeg(tile, ycbcr=False) for tile in tiles_of(IMAGE, (TILE[1], TILE[0]))]
    same(save_level(tmp_path / "a.dcm", made, size=(700, 500), tile=TILE, colours="RGB"))


def test_jpeg_called_ybr_full_which_openslide_does_not_take(tmp_path: Path) -> None:
    path = save_level(tmp_path / "a.dcm", frames(), size=(700, 500), tile=TILE, colours="YBR_FULL")
    (tmp_path / "one").mkdir()
    one = save_level(tmp_path / "one/a.dcm", frames(), size=(700, 500), tile=TILE)
    with opened(path) as reader, opened(one) as other:
        assert np.array_equal(whole(reader), whole(other))


@pytest.mark.parametrize("colours", ["RGB", "YBR_ICT", "YBR_RCT"])
@pytest.mark.parametrize("turned", [False, True])
def test_jpeg_2000(tmp_path: Path, colours: str, turned: bool) -> None:
    """Whatever the header says, what the stream turns itself is RGB; OpenSlide believes that it does."""
    ycbcr = np.asarray(Image.fromarray(IMAGE).convert("YCbCr"))
    stored = IMAGE if turned or colours == "RGB" else ycbcr
    made = [
        imagecodecs.jpeg2k_encode(tile, 60, codecformat="j2k", mct=turned)
        for tile in tiles_of(stored, (TILE[1], TILE[0]))
    ]
    path = save_level(tmp_path / "a.dcm", made, size=(700, 500), tile=TILE, syntax=JPEG_2000, colours=colours)
    with opened(path) as reader:
        assert np.abs(whole(reader).astype(int) - IMAGE).mean() < 2
    if stored is IMAGE:
        same(path, tolerance=1)


def test_uncompressed(tmp_path: Path) -> None:
    made = [tile.tobytes() for tile in tiles_of(IMAGE, (TILE[1], TILE[0]))]
    same(save_level(tmp_path / "a.dcm", made, size=(700, 500), tile=TILE, syntax=PLAIN, colours="RGB"))


def test_a_sparse_level_is_white_where_it_has_no_frame(tmp_path: Path) -> None:
    chosen = [0, 1, 8, 14, 35]
    places = [(index % COLUMNS * TILE[0], index // COLUMNS * TILE[1]) for index in chosen]
    made = frames()
    path = save_level(
        tmp_path / "a.dcm", [made[index] for index in chosen], size=(700, 500), tile=TILE, positions=places
    )
    same(path)


def test_levels_and_parts_of_levels_in_many_files(tmp_path: Path) -> None:
    made = frames()
    size = {"size": (700, 500), "tile": TILE}
    path = save_level(tmp_path / "a.dcm", made[:20], part=(0, 1), **size)
    save_level(tmp_path / "b.dcm", made[20:], part=(20, 2), **size)
    half = np.ascontiguousarray(IMAGE[::2, ::2])
    kind = "DERIVED\\PRIMARY\\VOLUME\\RESAMPLED"
    save_level(tmp_path / "c.dcm", frames(half), size=(350, 250), tile=TILE, kind=kind, instance="2", spacing=0.001)
    save_level(tmp_path / "other-series.dcm", made, size=(900, 500), tile=TILE, instance="3", series="8")
    (tmp_path / "notes.txt").write_text("no DICOM")
    (tmp_path / "cut.dcm").write_bytes(path.read_bytes()[:400])
    with opened(path) as reader:
        assert [level.width for level in reader.levels] == [700, 350]
        expected = np.vstack(
            [
                np.hstack([imagecodecs.jpeg8_decode(made[row * COLUMNS + column]) for column in range(COLUMNS)])
                for row in range(ROWS)
            ]
        )
        assert np.array_equal(whole(reader), expected[:500, :700])


def test_labels_are_never_read(tmp_path: Path) -> None:
    path = save_level(tmp_path / "a.dcm", frames(), size=(700, 500), tile=TILE)
    label = "ORIGINAL\\PRIMARY\\LABEL\\NONE"
    save_level(tmp_path / "l.dcm", frames()[:1], size=TILE, tile=TILE, kind=label, instance="9")
    with opened(path) as reader:
        assert len(reader.levels) == 1
        assert len(reader.native[0].sources) == 1
    same(path)


def test_frames_in_several_fragments_are_put_together(tmp_path: Path) -> None:
    path = save_level(tmp_path / "a.dcm", frames(), size=(700, 500), tile=TILE, fragments=3)
    (tmp_path / "one").mkdir()
    one = save_level(tmp_path / "one/a.dcm", frames(), size=(700, 500), tile=TILE)
    with opened(path) as reader, opened(one) as other:
        assert np.array_equal(whole(reader), whole(other))


def test_a_file_is_read_from_few_ranges(tmp_path: Path) -> None:
    path = save_level(tmp_path / "a.dcm", frames(), size=(700, 500), tile=TILE)
    sources = sources_of(path)
    with open_fast(sources, name=path.name):
        assert sources[path.name].requests <= 4


def test_a_long_header_is_read_by_ever_larger_ranges(tmp_path: Path) -> None:
    size, tile = (8 * 20_000, 8), (8, 8)
    stream = jpeg(np.full((8, 8, 3), 200, np.uint8), ycbcr=True)
    places = [(8 * index, 0) for index in range(20_000)]
    path = save_level(
        tmp_path / "a.dcm", [stream] * 20_000, size=size, tile=tile, positions=places, table="extended"
    )
    sources = sources_of(path)
    with open_fast(sources, name=path.name) as reader:
        assert sources[path.name].requests <= 12
        assert reader.read_region(0, 8 * 19_990, 0, 80, 8).rgb.min() == 200


@pytest.mark.parametrize(("changes", "told"), [({"planes": 3}, "3 focal planes"), ({"paths": 2}, "2 channels")])
def test_focal_planes_and_channels_are_refused_by_name(tmp_path: Path, changes: dict[str, int], told: str) -> None:
    path = save_level(tmp_path / "a.dcm", frames(), size=(700, 500), tile=TILE, **changes)
    with pytest.raises(PlanesNotSupported, match=told):
        opened(path)


def test_what_is_left_to_openslide(tmp_path: Path) -> None:
    path = save_level(tmp_path / "a.dcm", frames(), size=(700, 500), tile=TILE, syntax="1.2.840.10008.1.2.4.80")
    with pytest.raises(NotFast, match=r"1\.2\.840\.10008\.1\.2\.4\.80"):
        opened(path)


@pytest.mark.parametrize("at", [140, 300, 700, 3000])
def test_a_header_cut_short_is_told(tmp_path: Path, at: int) -> None:
    path = save_level(tmp_path / "a.dcm", frames(), size=(700, 500), tile=TILE)
    path.write_bytes(path.read_bytes()[:at])
    with pytest.raises((DicomDamaged, NotFast)):
        opened(path)


def test_sequences_nested_without_end_are_told(tmp_path: Path) -> None:
    path = save_level(tmp_path / "a.dcm", frames(), size=(700, 500), tile=TILE)
    data = path.read_bytes()
    at = data.index(b"\x28\x00\x02\x00US")
    deep = (b"\x09\x00\x01\x00SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 5000
    path.write_bytes(data[:at] + deep + data[at:])
    with pytest.raises(DicomDamaged, match="deep"):
        opened(path)
