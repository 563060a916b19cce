"""How large a pixel is, in µm: from the manifest or catalogue, else from the file, never guessed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from xml.etree import ElementTree

from slideway_inference.contracts import MppSource
from slideway_inference.errors import MppImplausible, MppMissing

PLAUSIBLE = (0.02, 20.0)
"""µm per pixel of anything that can be a slide; outside is a 72 dpi default or a unit mistaken."""

_OME_LIMIT = 4 << 20
_MICROMETRES = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "pm": 1e-6}

Mpp = tuple[float, float]


def resolve_mpp(given: float | None, source: MppSource | None, in_file: Mpp | None) -> tuple[Mpp, MppSource]:
    """µm per pixel in x and y, and who says so. Raises MppMissing, MppImplausible."""
    found: tuple[Mpp, MppSource] | None = None
    if given is not None:
        found = (given, given), source or "manifest"
    elif in_file is not None:
        found = in_file, "file"
    if found is None:
        raise MppMissing("The file does not say how large a pixel is: give `mpp` (µm per pixel) in the manifest.")
    if not all(plausible(value) for value in found[0]):
        values = " × ".join(f"{value:.6g}" for value in found[0])
        raise MppImplausible(
            f"{values} µm per pixel ({found[1]}) cannot be a slide's (it must be {PLAUSIBLE[0]}–{PLAUSIBLE[1]}): "
            "give the right `mpp` in the manifest."
        )
    return found


def plausible(value: float) -> bool:
    return math.isfinite(value) and PLAUSIBLE[0] <= value <= PLAUSIBLE[1]


def mpp_of_file(properties: Mapping[str, str]) -> Mpp | None:
    """From OpenSlide's properties, or those a TIFF reader makes in their likeness. OME-XML goes before resolution
    tags, which many writers leave at a default; an implausible value is kept only when there is no better."""
    candidates = [
        ome_mpp(properties.get("tiff.ImageDescription", "")),
        _pair(properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y")),
        _tiff_resolution(properties),
    ]
    known = [candidate for candidate in candidates if candidate is not None]
    return next((pair for pair in known if plausible(pair[0]) and plausible(pair[1])), known[0] if known else None)


def _tiff_resolution(properties: Mapping[str, str]) -> Mpp | None:
    unit = {"centimeter": 1e4, "inch": 25400.0}.get(properties.get("tiff.ResolutionUnit", ""))
    per_unit = _pair(properties.get("tiff.XResolution"), properties.get("tiff.YResolution"))
    if unit is None or per_unit is None or min(per_unit) <= 0:
        return None
    return unit / per_unit[0], unit / per_unit[1]


def ome_mpp(description: str) -> Mpp | None:
    """PhysicalSizeX and Y of the first image of OME-XML; None when it is not OME-XML or does not say.
    Documents that declare entities are not read: they are how an XML bomb is made, and OME-XML has none."""
    if "<OME" not in description or len(description) > _OME_LIMIT:
        return None
    if re.search(r"<!(DOCTYPE|ENTITY)", description, re.IGNORECASE):
        return None
    try:
        root = ElementTree.fromstring(description.strip().rstrip("\0").encode())
    except ElementTree.ParseError:
        return None
    pixels = root.find("./{*}Image/{*}Pixels")
    if pixels is None:
        return None
    scale_x = _MICROMETRES.get(pixels.get("PhysicalSizeXUnit", "µm"))
    scale_y = _MICROMETRES.get(pixels.get("PhysicalSizeYUnit", "µm"))
    size = _pair(pixels.get("PhysicalSizeX"), pixels.get("PhysicalSizeY"))
    if size is None or scale_x is None or scale_y is None:
        return None
    return size[0] * scale_x, size[1] * scale_y


def _pair(x: str | None, y: str | None) -> Mpp | None:
    try:
        return float(x or y or ""), float(y or x or "")
    except ValueError:
        return None
