"""µm per pixel: manifest or catalogue, else the file, never guessed."""

from __future__ import annotations

import pytest

from slideway_inference.errors import MppImplausible, MppMissing
from slideway_inference.resolution import mpp_of_file, ome_mpp, resolve_mpp

OME = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
    '<Image ID="Image:0"><Pixels {}/></Image></OME>'
)


def test_manifest_and_catalogue_go_before_the_file() -> None:
    assert resolve_mpp(0.25, "manifest", (0.5, 0.5)) == ((0.25, 0.25), "manifest")
    assert resolve_mpp(0.3, "catalogue", None) == ((0.3, 0.3), "catalogue")
    assert resolve_mpp(None, None, (0.5, 0.4)) == ((0.5, 0.4), "file")


def test_without_any_the_message_says_what_to_do() -> None:
    with pytest.raises(MppMissing, match=r"`mpp`.*in the manifest"):
        resolve_mpp(None, None, None)


@pytest.mark.parametrize("value", [0.0, -0.5, 0.001, 352.8, float("nan"), float("inf")])
def test_what_cannot_be_a_slide_is_refused_whoever_says_it(value: float) -> None:
    with pytest.raises(MppImplausible):
        resolve_mpp(value, "manifest", (0.5, 0.5))
    with pytest.raises(MppImplausible):
        resolve_mpp(None, None, (0.5, value))


def test_ome_xml_goes_before_resolution_tags_that_are_left_at_a_default() -> None:
    tags = {"openslide.mpp-x": "264.58", "openslide.mpp-y": "264.58"}
    described = tags | {"tiff.ImageDescription": OME.format('PhysicalSizeX="0.227" PhysicalSizeY="0.228"')}
    assert mpp_of_file(described) == (0.227, 0.228)
    assert mpp_of_file(tags) == (264.58, 264.58)


def test_units_of_ome_xml_and_of_tiff_are_converted() -> None:
    nm = 'PhysicalSizeX="227" PhysicalSizeXUnit="nm" PhysicalSizeY="0.000227" PhysicalSizeYUnit="mm"'
    assert ome_mpp(OME.format(nm)) == pytest.approx((0.227, 0.227))
    assert ome_mpp(OME.format('PhysicalSizeX="1" PhysicalSizeXUnit="pixel" PhysicalSizeY="1"')) is None
    tags = {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "50800", "tiff.YResolution": "50800"}
    assert mpp_of_file(tags) == (0.5, 0.5)


def test_an_xml_bomb_is_not_read() -> None:
    bomb = '<!DOCTYPE x [<!ENTITY a "' + "1" * 64 + '">]>' + OME.format('PhysicalSizeX="&a;" PhysicalSizeY="1"')
    assert ome_mpp(bomb) is None
    assert ome_mpp("<OME broken") is None
    assert ome_mpp("Aperio Image Library") is None
