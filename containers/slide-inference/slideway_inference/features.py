"""features.h5: a slide's embedding as TRIDENT keeps patch features (names, types and attributes as its `save_h5`
writes them), so that tools for slide-level learning load it as it is. Readable tiles only, row by row."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt

from slideway_inference.errors import ModelFormatNotSupported
from slideway_inference.survey import Survey

_CHUNK_BYTES = 1 << 18
_SLICE_CHUNKS = 64
"""Written at once: the readable tiles' rows are never all in memory a second time."""


def features_h5(
    name: str,
    encoder: str,
    survey: Survey,
    readable: npt.NDArray[np.bool_],
    values: npt.NDArray[np.float32],
    folder: str,
) -> bytes:
    """`values` (n, d) and `readable` (n,) go with the survey's positions. `folder` is the key prefix of the file.
    Raises ModelFormatNotSupported where h5py is missing.

    TRIDENT's magnifications are 10 / µm per pixel here: their ratio is the exact footprint of a tile, and no
    nominal 20× or 40× is made up."""
    import_h5py()
    import h5py

    geometry = survey.geometry
    about = {"name": name, "savetodir": folder}
    footprint = geometry.footprint_x
    coords = {
        "patch_size": geometry.px,
        "patch_size_level0": round(footprint),
        "level0_magnification": 10 / survey.mpp[0],
        "target_magnification": 10 / survey.mpp[0] * geometry.px / footprint,
        "overlap": geometry.overlap,
        **about,
        "level0_width": survey.width,
        "level0_height": survey.height,
    }
    tiles = np.flatnonzero(readable)
    out = io.BytesIO()
    with h5py.File(out, "w") as file:
        for key, rows, dtype, attributes in (
            ("features", values, np.float32, {**about, "encoder": encoder}),
            ("coords", survey.positions, np.int64, coords),
        ):
            width = rows.shape[1]
            chunk = max(1, min(len(tiles), _CHUNK_BYTES // (width * np.dtype(dtype).itemsize)))
            dataset = file.create_dataset(
                key, (len(tiles), width), dtype, maxshape=(None, width), chunks=(chunk, width)
            )
            for first in range(0, len(tiles), chunk * _SLICE_CHUNKS):
                part = tiles[first : first + chunk * _SLICE_CHUNKS]
                dataset[first : first + len(part)] = rows[part].astype(dtype, copy=False)
            dataset.attrs.update(attributes)
    return out.getvalue()


def import_h5py() -> None:
    """Whether embeddings can be written is known before any slide is read. Raises ModelFormatNotSupported."""
    try:
        import h5py  # noqa: F401
    except ImportError as error:
        raise ModelFormatNotSupported(
            "An embedding is written as features.h5, which needs h5py: install it."
        ) from error
