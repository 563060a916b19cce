"""stain-and-focus: each number by hand, and against scikit-image on a real slide."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL_SLIDES, needs_real_slides
from scipy.ndimage import gaussian_filter, laplace
from skimage.color import rgb2hsv, rgb_from_hed, separate_stains

from slideway_inference.contracts import ModelRef
from slideway_inference.model.package import open_package
from slideway_inference.model.predictor import Predictor
from slideway_inference.model.predictors import load_predictor
from slideway_inference.quality_model import package_bytes
from slideway_inference.reader import open_slide

GREY = np.array([0.299, 0.587, 0.114])
STAINS = rgb_from_hed / np.linalg.norm(rgb_from_hed, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("quality")
    data = package_bytes()
    (folder / "model.tar.gz").write_bytes(data)
    ref = ModelRef("stain-and-focus", "1.0.0", f"sha256:{hashlib.sha256(data).hexdigest()}")
    return load_predictor(open_package(folder / "model.tar.gz", ref, folder / "m"), torch.device("cpu"))


def measured(model: Predictor, *tiles: np.ndarray) -> list[dict[str, float]]:
    values = model.run(np.stack([np.broadcast_to(tile, (256, 256, 3)) for tile in tiles]).astype(np.uint8))
    return [dict(zip(model.spec.outputs, row.tolist(), strict=True)) for row in values]


def test_flat_colours_measure_what_they_are(model: Predictor) -> None:
    glass, black, pen, blood = measured(model, [255, 255, 255], [0, 0, 0], [30, 150, 90], [200, 40, 60])
    assert glass == {"haematoxylin": 0, "eosin": 0, "brightness": 1, "saturation": 0, "ink": 0, "focus": 0}
    assert (black["ink"], black["brightness"]) == (1, 0)
    assert (pen["ink"], pen["saturation"]) == (1, pytest.approx(120 / 150))
    assert blood["ink"] == 0
    for index, (stain, other) in enumerate((("haematoxylin", "eosin"), ("eosin", "haematoxylin"))):
        for density in (0.3, 0.7):
            (one,) = measured(model, np.round(255 * 10 ** (-density * STAINS[index])))
            assert one[stain] == pytest.approx(density, abs=0.02)
            assert one[other] == pytest.approx(0, abs=0.02)
            assert one["ink"] == 0


def test_only_tissue_counts_for_its_stain(model: Predictor) -> None:
    tile = np.full((256, 256, 3), 250)
    tile[:, :64] = np.round(255 * 10 ** (-0.5 * STAINS[0]))
    (one,) = measured(model, tile)
    assert one["haematoxylin"] == pytest.approx(0.5, abs=0.02)


def test_focus_is_the_logarithm_of_the_laplacians_variance(model: Predictor) -> None:
    rows, columns = np.indices((256, 256))
    board = (100 + 10 * ((rows + columns) % 2))[..., None].repeat(3, 2)
    assert measured(model, board)[0]["focus"] == pytest.approx(np.log10(1 + 40**2), abs=1e-4)


@needs_real_slides
def test_on_a_real_slide_it_is_scikit_images_and_falls_with_every_blur(model: Predictor) -> None:
    with open_slide(REAL_SLIDES / "CMU-1-Small-Region.svs") as slide:
        tiles = [
            slide.read_region(0, x, y, 256, 256).rgb for y in range(512, 2048, 256) for x in range(0, 1900, 256)
        ]
    assert len(tiles) > 40
    for tile, one in zip(tiles, measured(model, *tiles), strict=True):
        density = -np.log10(np.maximum(tile, 1) / 255)
        tissue = density.mean(2) > 0.1
        stains = np.maximum(density @ np.linalg.inv(STAINS), 0)
        skimage = separate_stains(np.maximum(tile, 1).astype(np.uint8), np.linalg.inv(STAINS)) * 6
        np.testing.assert_allclose(np.maximum(skimage, 0), stains, atol=1e-6)
        for index, stain in enumerate(("haematoxylin", "eosin")):
            expected = stains[..., index][tissue].mean() if tissue.any() else 0
            assert one[stain] == pytest.approx(expected, abs=1e-3)
        grey = tile @ GREY
        assert one["focus"] == pytest.approx(np.log10(1 + laplace(grey)[1:-1, 1:-1].var()), abs=1e-3)
        assert one["saturation"] == pytest.approx(rgb2hsv(tile)[..., 1].mean(), abs=2e-3)
        assert one["ink"] < 0.2

    tissue = [tile for tile in tiles if ((-np.log10(np.maximum(tile, 1) / 255)).mean(2) > 0.1).mean() > 0.5]
    assert len(tissue) > 10  # of glass there is no focus, only noise
    before = np.inf
    for sigma in (0.0, 0.7, 1.0, 1.5, 2.0, 4.0):
        blurred = [np.round(gaussian_filter(tile.astype(float), (sigma, sigma, 0))) for tile in tissue]
        focus = np.array([one["focus"] for one in measured(model, *blurred)])
        assert (focus < before).all()
        before = focus

    def told_apart(measure: Callable[[np.ndarray], float]) -> float:
        """The chance that a sharp tile scores above another, or the same, that was blurred."""
        sharp = np.array([measure(tile @ GREY) for tile in tissue])
        soft = np.array([measure(gaussian_filter(tile.astype(float), (1, 1, 0)) @ GREY) for tile in tissue])
        return float((sharp[:, None] > soft).mean())

    laplacian = told_apart(lambda grey: laplace(grey)[1:-1, 1:-1].var())
    tenengrad = told_apart(
        lambda grey: ((grey[2:] - grey[:-2]) ** 2).mean() + ((grey[:, 2:] - grey[:, :-2]) ** 2).mean()
    )
    vollath = told_apart(lambda grey: (grey[:, :-1] * grey[:, 1:]).mean() - (grey[:, :-2] * grey[:, 2:]).mean())
    assert laplacian > 0.99
    assert laplacian > tenengrad > vollath


def test_the_package_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    assert package_bytes() == package_bytes()
