"""The fast reader gives OpenSlide's pixels, of every level, however a slide is stored."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import slides
import tifffile
from conftest import REAL_SLIDES, needs_real_slides
from fast_slides import fast, grid, imagecodecs, jpeg2000_halved, picture, save_jpeg, tiles_of
from PIL import Image

from slideway_inference.fast import FastReader, NotFast, PlanesNotSupported, open_fast, sources_of
from slideway_inference.fast.reader import _Chunk, _Run
from slideway_inference.fast.resample import AreaResampler
from slideway_inference.reader import open_slide
from slideway_inference.resample import area_resample
from slideway_inference.survey import SurveyRequest, survey

U8 = np.typing.NDArray[np.uint8]


def reference(path: Path, level: int = 0) -> tuple[U8, U8]:
    """OpenSlide's pixels of a whole level, over white, and its alpha."""
    with openslide.OpenSlide(str(path)) as slide:
        rgba = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))
    alpha = rgba[..., 3]
    return np.where(alpha[..., None] == 255, rgba[..., :3], 255).astype(np.uint8), alpha


def whole(reader: FastReader, level: int = 0) -> U8:
    size = reader.levels[level]
    return reader.read_region(level, 0, 0, size.width, size.height).rgb


def difference(one: U8, other: U8) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other).max())


def same(path: Path, tolerance: int = 0) -> None:
    """Levels, and all pixels of each; then the tiles of grids that fall on native tiles and that do not."""
    with fast(path) as reader, openslide.OpenSlide(str(path)) as slide:
        assert [(level.width, level.height) for level in reader.levels] == list(slide.level_dimensions)
        for level in range(len(reader.levels)):
            assert difference(whole(reader, level), reference(path, level)[0]) <= tolerance
        expected = reference(path)[0]
        wide = reader.native[0].tile_width
        for px in {wide, 100, 256} if tolerance == 0 else {wide - 1}:
            geometry, positions = grid(reader, px, 0.5)
            tiles = np.empty((len(positions), px, px, 3), np.uint8)
            assert reader.read_tiles(geometry, positions, tiles).all()
            for tile, (x, y) in zip(tiles, positions, strict=True):
                assert difference(tile, expected[y : y + px, x : x + px]) <= tolerance


@needs_real_slides
@pytest.mark.parametrize(
    ("name", "tolerance"), [("CMU-1-Small-Region.svs", 0), ("TCGA-CR-7395-01A-01-TS1.svs", 1), ("boxes.tiff", 0)]
)
def test_real_slides_have_openslides_levels_and_pixels(name: str, tolerance: int) -> None:
    same(REAL_SLIDES / name, tolerance)
    with fast(REAL_SLIDES / name) as reader, open_slide(REAL_SLIDES / name) as other:
        assert reader.levels == other.levels
        assert reader.vendor == other.vendor
        assert reader.mpp == pytest.approx(other.mpp) if other.mpp else reader.mpp is None


@needs_real_slides
def test_a_real_ome_tiff_that_openslide_does_not_know_has_the_plain_tiff_readers_pixels() -> None:
    path = REAL_SLIDES / "OS-1-detail.ome.tif"
    with fast(path) as reader, open_slide(path) as other:
        assert other.name == "tiff"
        assert np.array_equal(whole(reader), other.read_region(0, 0, 0, 1101, 1101).rgb)
        assert reader.mpp == pytest.approx(other.mpp, rel=1e-9)


@needs_real_slides
def test_a_real_dicom_slide_of_many_files_has_openslides_levels_and_its_mended_colours() -> None:
    path = REAL_SLIDES / "cmu-1-dicom/level-0-frames-0-30.dcm"
    with open_fast(sources_of(path), name=path.name) as reader, open_slide(path) as other:
        assert isinstance(reader, FastReader)
        assert reader.name == "fast (YCbCr)"
        assert reader.levels == other.levels
        assert reader.mpp == pytest.approx(other.mpp)
        for level, size in enumerate(reader.levels):
            assert (
                difference(whole(reader, level), other.read_region(level, 0, 0, size.width, size.height).rgb) <= 1
            )


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize(("ycbcr", "subsampling"), [(False, "444"), (True, "444"), (True, "422"), (True, "420")])
def test_jpeg_in_every_colour_space_and_sampling(
    tmp_path: Path, tables: bool, ycbcr: bool, subsampling: str
) -> None:
    image = picture(700, 530)
    path = tmp_path / "s.tiff"
    same(save_jpeg(path, image, ycbcr=ycbcr, subsampling=subsampling, tables=tables, downsamples=(2, 4)))


def test_a_jpeg_is_the_colour_that_the_file_says_whatever_its_markers_say(tmp_path: Path) -> None:
    path = tmp_path / "s.tiff"
    tifffile.imwrite(path, picture(300, 300), tile=(128, 128), photometric="rgb", compression="jpeg", metadata=None)
    same(path)


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_bigtiff_of_both_byte_orders(tmp_path: Path, byteorder: str) -> None:
    image = picture(500, 400)
    same(save_jpeg(tmp_path / "s.tif", image, byteorder=byteorder, bigtiff=True, tables=True, downsamples=(2,)))


def test_a_big_endian_tiff_which_openslide_does_not_open_has_the_pixels_of_its_little_endian_twin(
    tmp_path: Path,
) -> None:
    image = picture(500, 400)
    one = save_jpeg(tmp_path / "one.tif", image, byteorder=">", tables=True, downsamples=(2,))
    two = save_jpeg(tmp_path / "two.tif", image, byteorder="<", tables=True, downsamples=(2,))
    with fast(one) as reader:
        for level in range(2):
            assert np.array_equal(whole(reader, level), reference(two, level)[0])


@pytest.mark.parametrize("tile", [(256, 256), (64, 512), (1024, 1024)])
def test_tiles_that_do_not_divide_the_slide(tmp_path: Path, tile: tuple[int, int]) -> None:
    same(save_jpeg(tmp_path / "s.tif", picture(777, 333), tile=tile))


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd"])
@pytest.mark.parametrize("predictor", [False, True])
def test_other_compressions(tmp_path: Path, compression: str | None, predictor: bool) -> None:
    path, image = tmp_path / "s.tif", picture(300, 200)
    tifffile.imwrite(
        path,
        image,
        tile=(64, 64),
        photometric="rgb",
        compression=compression,
        predictor=predictor and compression is not None,
        metadata=None,
    )
    with fast(path) as reader:
        assert np.array_equal(whole(reader), image)


@pytest.mark.parametrize("compression", [33003, 33004, 33005, 34712])
@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("ome", [False, True])
def test_outside_aperio_jpeg_2000_has_the_colours_of_its_photometric_tag_and_stream(
    tmp_path: Path, compression: int, photometric: str, turned: bool, ome: bool
) -> None:
    """raw2ometiff writes RGB under the number that means YCbCr in Aperio's files."""
    image = picture(256, 128)
    stored = image if photometric == "rgb" or turned else np.asarray(Image.fromarray(image).convert("YCbCr"))
    tiles = [
        imagecodecs.jpeg2k_encode(tile, 0, codecformat="j2k", reversible=True, mct=turned)
        for tile in tiles_of(stored, (128, 128))
    ]
    path = tmp_path / ("s.ome.tif" if ome else "s.tif")
    tifffile.imwrite(
        path,
        iter(tiles),
        shape=image.shape,
        dtype=np.uint8,
        tile=(128, 128),
        compression=compression,
        photometric=photometric,
        metadata=None,
        description=OME.format(z=1, c=3, channels=ONE_CHANNEL) if ome else None,
    )
    with fast(path) as reader:
        assert difference(whole(reader), image) <= (0 if stored is image else 4)


@pytest.mark.parametrize("compression", [33003, 33005])
def test_aperios_jpeg_2000_has_the_colours_of_its_number(tmp_path: Path, compression: int) -> None:
    path, image = tmp_path / "s.svs", picture(256, 128)
    tiles = [
        imagecodecs.jpeg2k_encode(tile, 0, codecformat="j2k", reversible=True, mct=False)
        for tile in tiles_of(image, (128, 128))
    ]
    tifffile.imwrite(
        path,
        iter(tiles),
        shape=image.shape,
        dtype=np.uint8,
        tile=(128, 128),
        compression=compression,
        photometric="rgb",
        metadata=None,
        description="Aperio x|MPP = 0.5",
    )
    same(path, tolerance=1)


@pytest.mark.parametrize("down", [1, 2])
@pytest.mark.parametrize("side", [128, 144])
def test_aperios_jpeg_2000_with_halved_chroma(tmp_path: Path, down: int, side: int) -> None:
    path, image = tmp_path / "s.svs", picture(400, 300)
    ycbcr = np.asarray(Image.fromarray(image).convert("YCbCr"))
    tifffile.imwrite(
        path,
        (jpeg2000_halved(tile, down) for tile in tiles_of(ycbcr, (side, side))),
        shape=image.shape,
        dtype=np.uint8,
        tile=(side, side),
        compression=33003,
        photometric="rgb",
        metadata=None,
        description="Aperio x|MPP = 0.5",
    )
    same(path, tolerance=1)
    assert np.abs(reference(path)[0].astype(int) - image).mean() < 8


def test_strips(tmp_path: Path) -> None:
    path, image = tmp_path / "s.tif", picture(333, 250)
    tifffile.imwrite(path, image, rowsperstrip=32, photometric="rgb", compression="zlib", metadata=None)
    with fast(path) as reader:
        assert np.array_equal(whole(reader), image)
        geometry, positions = grid(reader, 100, 0.5)
        tiles = np.empty((len(positions), 100, 100, 3), np.uint8)
        assert reader.read_tiles(geometry, positions, tiles).all()
        for tile, (x, y) in zip(tiles, positions, strict=True):
            assert np.array_equal(tile, image[y : y + 100, x : x + 100])


def test_missing_tiles_are_white_and_unscanned(tmp_path: Path) -> None:
    path = save_jpeg(tmp_path / "s.svs", picture(720, 480), missing={1, 3}, description="Aperio x|MPP = 0.5")
    expected, alpha = reference(path)
    assert (alpha[:240, 240:480] == 0).all()
    with fast(path) as reader:
        region = reader.read_region(0, 0, 0, 720, 480)
        assert np.array_equal(region.rgb, expected)
        assert region.scanned is not None
        assert np.array_equal(region.scanned, alpha == 255)
        view = reader.overview(36, 24)
        assert not view.scanned[:12, 12:24].any()
        assert view.scanned[:12, :12].all()
        assert (view.rgb[:12, 12:24] == 255).all()


@pytest.mark.parametrize(("px", "mpp"), [(240, 0.5), (160, 0.5), (80, 1.0), (70, 1.3)])
@pytest.mark.parametrize("suffix", [".svs", ".tif"])
def test_a_tile_of_which_more_than_half_was_not_scanned_is_unreadable_in_every_reader(
    tmp_path: Path, px: int, mpp: float, suffix: str
) -> None:
    description = "Aperio x|MPP = 0.5" if suffix == ".svs" else None
    path = save_jpeg(tmp_path / f"s{suffix}", picture(720, 480), missing={1, 3}, description=description)
    expected, alpha = reference(path)
    with fast(path) as reader, open_slide(path) as other:
        geometry, positions = grid(reader, px, mpp)
        tiles, others = (np.empty((len(positions), px, px, 3), np.uint8) for _ in range(2))
        side = round(px * mpp / 0.5)
        parts = [np.s_[y : y + side, x : x + side] for x, y in positions]
        wanted = [(alpha[part] == 255).mean() >= 0.5 for part in parts]
        assert set(wanted) == {True, False}
        assert reader.read_tiles(geometry, positions, tiles).tolist() == wanted
        assert other.read_tiles(geometry, positions, others).tolist() == wanted
        if mpp == 0.5:
            for tile, part, readable in zip(tiles, parts, wanted, strict=True):
                assert not readable or np.array_equal(tile, expected[part])
        buffers: queue.Queue[U8] = queue.Queue()
        buffers.put(np.empty((len(positions), px, px, 3), np.uint8))
        (batch,) = reader.read_batches(geometry, positions, len(positions), buffers)
        assert {(unread.reason, unread.retry) for unread in batch.unread.values()} == {("not scanned", False)}


def test_tiles_that_aperio_made_from_missing_ones_are_left_to_openslide(tmp_path: Path) -> None:
    path = save_jpeg(
        tmp_path / "s.svs", picture(960, 960), missing={0}, downsamples=(2,), description="Aperio x|MPP = 0.5"
    )
    with fast(path) as reader:
        geometry, positions = grid(reader, 240, 1.0)
        assert geometry.level == 1
        buffers: queue.Queue[U8] = queue.Queue()
        buffers.put(np.empty((4, 240, 240, 3), np.uint8))
        (batch,) = reader.read_batches(geometry, positions, 4, buffers)
        assert {place: unread.retry for place, unread in batch.unread.items()} == {0: True}


@pytest.mark.parametrize("downsamples", [(4,), (4, 8), (2, 4, 16)])
@pytest.mark.parametrize(
    "unscanned", [lambda x, y: x >= 8, lambda x, y: x >= 7 or y == 3, lambda x, y: (x + y) % 2]
)
def test_what_aperio_did_not_scan_is_no_tissue_in_either_reader(
    tmp_path: Path, downsamples: tuple[int, ...], unscanned: Callable[[int, int], bool]
) -> None:
    """Where OpenSlide draws from finer levels, so does the survey; where they have nothing, there is nothing."""
    image = slides.tissue(slides.tissue(slides.glass(2048, 2048), 100, 200, 600, 900), 900, 1200, 1000, 700)
    missing = {index for index in range(256) if unscanned(index % 16, index // 16)}
    path = save_jpeg(
        tmp_path / "s.svs",
        image,
        tile=(128, 128),
        missing=missing,
        downsamples=downsamples,
        description="Aperio x|MPP = 0.5",
    )
    request = SurveyRequest(path, "x", None, None, 128, 0.5, 0, 0.02, 0.5)
    with fast(path) as reader, open_slide(path) as other:
        size = 2048 // 16
        one, two = reader.overview(size, size), other.overview(size, size)
        assert not one.unreadable.any()
        assert (one.scanned != two.scanned).mean() < 0.03
        assert np.abs(one.rgb.astype(int) - two.rgb).mean() < 4
        ours, theirs = ({tuple(at) for at in survey(each, request).positions.tolist()} for each in (reader, other))
        assert len(theirs) > 20
        assert len(ours ^ theirs) <= len(theirs) * 0.05


PHILIPS = """<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">
<Attribute Name="PIM_DP_SCANNED_IMAGES" Group="0x301D" Element="0x1003" PMSVR="IDataObjectArray"><Array>
<DataObject ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>
<Attribute Name="DICOM_PIXEL_SPACING">"0.00025" "0.00025"</Attribute>
<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>{}</Array></Attribute>
</DataObject></Array></Attribute></DataObject>"""
PHILIPS_LEVEL = """<DataObject ObjectType="PixelDataRepresentation">
<Attribute Name="DICOM_PIXEL_SPACING">"{0}" "{0}"</Attribute></DataObject>"""


def test_philips_levels_have_the_sizes_that_follow_from_their_spacings(tmp_path: Path) -> None:
    path, image = tmp_path / "s.tiff", picture(900, 700)
    xml = PHILIPS.format("".join(PHILIPS_LEVEL.format(0.00025 * factor) for factor in (1, 2, 4)))
    padded = np.pad(image, ((0, 68), (0, 124), (0, 0)), "edge")
    save_jpeg(
        path, padded, tile=(256, 256), ycbcr=True, downsamples=(2, 4), description=xml, software="Philips DP v1.0"
    )
    with fast(path) as reader:
        assert reader.vendor == "philips"
        assert reader.mpp == pytest.approx((0.25, 0.25))
    same(path)


OME = """<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0"
DimensionOrder="XYCZT" Type="uint8" SizeX="600" SizeY="500" SizeZ="{z}" SizeC="{c}" SizeT="1"
PhysicalSizeX="0.25" PhysicalSizeY="0.3">{channels}</Pixels></Image></OME>"""
ONE_CHANNEL = '<Channel ID="Channel:0:0" SamplesPerPixel="3"/>'


def test_an_ome_tiffs_subifds_are_its_pyramid(tmp_path: Path) -> None:
    path, image = tmp_path / "s.ome.tif", picture(600, 500)
    with tifffile.TiffWriter(path) as tiff:
        options = {"tile": (64, 64), "photometric": "rgb", "compression": "zlib", "metadata": None}
        description = OME.format(z=1, c=3, channels=ONE_CHANNEL)
        tiff.write(image, subifds=2, description=description, **options)
        for reduction in (2, 4):
            tiff.write(image[::reduction, ::reduction], subfiletype=1, **options)
    with fast(path) as reader:
        assert reader.vendor == "ome-tiff"
        assert [level.width for level in reader.levels] == [600, 300, 150]
        assert reader.mpp == pytest.approx((0.25, 0.3))
        assert np.array_equal(whole(reader, 2), image[::4, ::4])
    assert np.array_equal(reference(path)[0], image)


def save_series(path: Path, *images: tuple[str, U8, float]) -> Path:
    """An OME-TIFF of images with their names and µm per pixel, each with a level of half the size."""
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for name, image, mpp in images:
            metadata = {"Name": name, "PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
            options = {"tile": (64, 64), "photometric": "rgb", "compression": "zlib"}
            tiff.write(image, subifds=1, metadata=metadata, **options)
            tiff.write(np.ascontiguousarray(image[::2, ::2]), subfiletype=1, metadata=None, **options)
    return path


def test_of_an_ome_tiffs_series_the_largest_is_the_slide(tmp_path: Path) -> None:
    small, large, label = picture(128, 128), picture(512, 448), picture(640, 512)
    path = save_series(
        tmp_path / "s.ome.tif", ("Image0", small, 2.0), ("Image1", large, 0.5), ("label image", label, 9.0)
    )
    with fast(path) as reader:
        assert reader.name == "fast (2 other series passed over)"
        assert [(level.width, level.height) for level in reader.levels] == [(512, 448), (256, 224)]
        assert reader.mpp == pytest.approx((0.5, 0.5))
        assert np.array_equal(whole(reader), large)


def test_a_largest_series_that_is_not_brightfield_is_not_replaced_by_a_smaller_one(tmp_path: Path) -> None:
    path = tmp_path / "s.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(picture(128, 128), tile=(64, 64), photometric="rgb")
        tiff.write(
            np.zeros((4, 256, 256), np.uint8), tile=(64, 64), photometric="minisblack", metadata={"axes": "CYX"}
        )
    with pytest.raises(PlanesNotSupported, match="4 channels"):
        fast(path)


def test_a_plain_tiffs_subifds_are_its_pyramid_too(tmp_path: Path) -> None:
    path, image = tmp_path / "s.tif", picture(600, 500)
    with tifffile.TiffWriter(path) as tiff:
        options = {"tile": (64, 64), "photometric": "rgb", "compression": "zlib", "metadata": None}
        tiff.write(image, subifds=3, **options)
        for reduction in (2, 4):
            tiff.write(image[::reduction, ::reduction], subfiletype=1, **options)
        tiff.write(image[:64, :64], **options)
    with fast(path) as reader:
        assert [level.width for level in reader.levels] == [600, 300, 150]
        assert np.array_equal(whole(reader, 2), image[::4, ::4])


@pytest.mark.parametrize(
    ("z", "c", "channels", "told"),
    [(5, 3, ONE_CHANNEL, "5 focal planes"), (1, 4, '<Channel ID="Channel:0:0"/>' * 4, "4 channels")],
)
def test_focal_planes_and_channels_are_refused_by_name(
    tmp_path: Path, z: int, c: int, channels: str, told: str
) -> None:
    path = tmp_path / "s.ome.tif"
    description = OME.format(z=z, c=c, channels=channels)
    tifffile.imwrite(
        path, picture(600, 500), tile=(64, 64), photometric="rgb", metadata=None, description=description
    )
    with pytest.raises(PlanesNotSupported, match=told):
        fast(path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": np.zeros((64, 64, 3), np.uint16)}, "8 bits"),
        ({"data": np.zeros((64, 64), np.uint8), "photometric": "minisblack"}, "samples"),
        ({"data": np.zeros((3, 64, 64), np.uint8), "planarconfig": "separate"}, "planes"),
        ({"compression": "packbits"}, "compression"),
        ({"description": "<scn xmlns='http://www.leica-microsystems.com/scn/2010/10/01'/>"}, "Leica"),
    ],
)
def test_what_others_must_read_is_not_fast(tmp_path: Path, changes: dict[str, object], told: str) -> None:
    path = tmp_path / "s.tif"
    options = {"data": np.zeros((64, 64, 3), np.uint8), "photometric": "rgb", "tile": (16, 16), "metadata": None}
    tifffile.imwrite(path, **{**options, **changes})
    with pytest.raises(NotFast, match=told):
        fast(path)


def test_only_what_is_called_a_tiff_is_read_as_one(tmp_path: Path) -> None:
    """The first page of a VSI is its label."""
    with pytest.raises(NotFast):
        fast(save_jpeg(tmp_path / "s.vsi", picture(300, 300)))


# --- other µm per pixel ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 1.003, 1.62, 2.5, 7.7])
def test_the_resampler_is_the_area_mean(scale: float) -> None:
    source = np.random.default_rng(3).integers(0, 256, (300, 290, 3), dtype=np.uint8)
    px = int(270 / scale)
    box = (1.3, 2.7, 1.3 + px * scale, 2.7 + px * scale)
    out = np.empty((px, px, 3), np.uint8)
    AreaResampler(px)(source, box, out)
    assert difference(out, area_resample(source, box, px)) <= 1


@pytest.mark.parametrize("mpp", [0.31, 0.62, 0.8])
def test_tiles_at_another_mpp_are_those_of_openslides_pixels(tmp_path: Path, mpp: float) -> None:
    path = save_jpeg(tmp_path / "s.tif", picture(900, 800), ycbcr=True, subsampling="420")
    with fast(path) as reader, open_slide(path) as other:
        geometry, positions = grid(reader, 128, mpp)
        tiles, expected = (np.empty((len(positions), 128, 128, 3), np.uint8) for _ in range(2))
        assert reader.read_tiles(geometry, positions, tiles).all()
        assert other.read_tiles(geometry, positions, expected).all()
        assert difference(tiles, expected) <= 1


@pytest.mark.parametrize(("mpp", "allowed"), [(1.0, 1.5), (1.3, 2.5), (2.0, 1.5), (4.0, 1.5)])
def test_tiles_decoded_at_reduced_size_lie_where_they_should(tmp_path: Path, mpp: float, allowed: float) -> None:
    path = save_jpeg(tmp_path / "s.tif", picture(1201, 1103), ycbcr=True, subsampling="444")
    with fast(path) as reader, open_slide(path) as other:
        geometry, positions = grid(reader, 64, mpp)
        tiles, expected = (np.empty((len(positions), 64, 64, 3), np.uint8) for _ in range(2))
        assert reader.read_tiles(geometry, positions, tiles).all()
        assert other.read_tiles(geometry, positions, expected).all()
        assert np.abs(tiles.astype(int) - expected).mean() < allowed
        shifted = np.abs(tiles[:, :, 1:].astype(int) - expected[:, :, :-1]).mean()
        assert np.abs(tiles.astype(int) - expected).mean() < shifted / 3


def test_a_ruler_measures_right_at_half_the_resolution(tmp_path: Path) -> None:
    period = 48.0
    x, y = np.meshgrid(np.arange(2400) + 0.5, np.arange(480) + 0.5)
    image = np.full((480, 2400, 3), 128, np.uint8)
    image[..., 0] = 128 + 100 * np.sin(2 * np.pi * x / period)
    image[..., 1] = 128 + 100 * np.sin(2 * np.pi * y / period)
    with fast(save_jpeg(tmp_path / "ruler.tif", image)) as reader:
        geometry, positions = grid(reader, 128, 1.0)
        tiles = np.empty((len(positions), 128, 128, 3), np.uint8)
        assert reader.read_tiles(geometry, positions, tiles).all()
    for tile, (left, _) in zip(tiles.astype(float), positions, strict=True):
        across = 128 + 100 * np.sin(2 * np.pi * (left + (np.arange(128) + 0.5) * 2) / period)
        assert np.abs(tile[..., 0].mean(axis=0) - across).max() < 2.5


# --- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("buffers", [1, 3, 30])
def test_batches_come_in_order_in_the_buffers_given_however_few(tmp_path: Path, threads: int, buffers: int) -> None:
    path = save_jpeg(tmp_path / "s.tif", picture(1500, 1200))
    expected = reference(path)[0]
    free: queue.Queue[U8] = queue.Queue()
    for _ in range(buffers):
        free.put(np.empty((7, 100, 100, 3), np.uint8))
    with fast(path, threads) as reader:
        geometry, positions = grid(reader, 100, 0.5)
        seen: list[int] = []
        for batch in reader.read_batches(geometry, positions, 7, free):
            for tile, index in zip(batch.tiles, batch.indices, strict=True):
                x, y = positions[index]
                assert np.array_equal(tile, expected[y : y + 100, x : x + 100])
            seen += batch.indices.tolist()
            free.put(batch.buffer)
    assert seen == list(range(len(positions)))


def test_each_native_tile_is_read_and_decoded_once_though_the_grid_does_not_fall_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_jpeg(tmp_path / "s.tif", picture(1500, 1200))
    with fast(path) as reader:
        native, decoded = reader.native[0], []
        decode = native.codec.decode
        monkeypatch.setattr(native.codec, "decode", lambda data, *rest: (decoded.append(data), decode(data, *rest)))
        geometry, positions = grid(reader, 100, 0.5)
        reader.read_tiles(geometry, positions, np.empty((len(positions), 100, 100, 3), np.uint8))
        assert len(decoded) == len(native.sizes)
        assert native.sources[0].bytes_read < native.sizes.sum() * 1.1 + (1 << 18)


def test_what_threads_work_on_at_a_time_is_bounded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slideway_inference.fast.reader._CHUNK_BYTES", 12 * 240 * 240 * 3)
    path = save_jpeg(tmp_path / "s.tif", picture(1500, 1200))
    expected = reference(path)[0]
    natives, chunk = [], _Run._chunk

    def noted(run: _Run, *rest: Any) -> _Chunk:  # noqa: ANN401
        natives.append(len((made := chunk(run, *rest)).own))
        return made

    monkeypatch.setattr(_Run, "_chunk", noted)
    with fast(path, threads=3) as reader:
        geometry, positions = grid(reader, 100, 0.5)
        tiles = np.empty((len(positions), 100, 100, 3), np.uint8)
        assert reader.read_tiles(geometry, positions, tiles).all()
    for tile, (x, y) in zip(tiles, positions, strict=True):
        assert np.array_equal(tile, expected[y : y + 100, x : x + 100])
    assert sum(natives) == 7 * 5
    assert max(natives) <= 12 // 3 - 1 + 4  # a tile lies on four at most


def test_a_run_can_be_left_early(tmp_path: Path) -> None:
    path = save_jpeg(tmp_path / "s.tif", picture(1500, 1200))
    free: queue.Queue[U8] = queue.Queue()
    free.put(np.empty((4, 100, 100, 3), np.uint8))
    with fast(path) as reader:
        geometry, positions = grid(reader, 100, 0.5)
        batches = reader.read_batches(geometry, positions, 4, free)
        next(batches)
        batches.close()  # type: ignore[attr-defined]
        assert reader.read_region(0, 0, 0, 10, 10).rgb.shape == (10, 10, 3)


def test_a_slide_too_wide_to_be_held_is_worked_in_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slideway_inference.fast.reader._HELD_BYTES", 1 << 20)
    path = save_jpeg(tmp_path / "s.tif", picture(1500, 700))
    expected = reference(path)[0]
    free: queue.Queue[U8] = queue.Queue()
    for _ in range(2):
        free.put(np.empty((8, 100, 100, 3), np.uint8))
    with fast(path) as reader:
        geometry, positions = grid(reader, 100, 0.5)
        assert len(reader.strips(geometry, positions)) > 1
        seen: list[int] = []
        for batch in reader.read_batches(geometry, positions, 8, free):
            for tile, index in zip(batch.tiles, batch.indices, strict=True):
                x, y = positions[index]
                assert np.array_equal(tile, expected[y : y + 100, x : x + 100])
            seen += batch.indices.tolist()
            free.put(batch.buffer)
        assert sorted(seen) == list(range(len(positions)))
        assert seen != sorted(seen)


def test_the_overview_is_the_slide_made_small(tmp_path: Path) -> None:
    image = picture(188, 138).repeat(8, 0).repeat(8, 1)[:1103, :1501]
    path = save_jpeg(tmp_path / "s.tif", image, downsamples=(4,))
    with fast(path) as reader, open_slide(path) as other:
        for size in ((150, 110), (700, 500), (3, 2), (1501, 1103)):
            one, two = reader.overview(*size), other.overview(*size)
            assert np.abs(one.rgb.astype(int) - two.rgb).mean() < 4
            assert one.scanned.all()
            assert not one.unreadable.any()
