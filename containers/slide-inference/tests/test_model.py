"""Model packages are checked before anything runs; models are held to their contract."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import packages
import pytest
import torch
from conftest import CONTAINER, REAL_SLIDES, needs_real_slides
from skimage.color import rgb_from_hed, separate_stains

from slideway_inference.contracts import ModelRef
from slideway_inference.errors import (
    ModelDigestMismatch,
    ModelError,
    ModelPackageInvalid,
)
from slideway_inference.model.package import Package, open_package
from slideway_inference.model.predictor import Predictor
from slideway_inference.model.predictors import load_predictor
from slideway_inference.model.spec import parse_model
from slideway_inference.reader import open_slide
from slideway_inference.reference_model import THRESHOLD, package_bytes


def opened(package: bytes, folder: Path, **changes: str) -> Package:
    (folder / "model.tar.gz").write_bytes(package)
    digest = f"sha256:{hashlib.sha256(package).hexdigest()}"
    ref = {"name": "tried", "version": "1", "digest": digest, **changes}
    return open_package(folder / "model.tar.gz", ModelRef(**ref), folder / digest[-8:])


def predictor(package: bytes, folder: Path, **changes: str) -> Predictor:
    return load_predictor(opened(package, folder, **changes), torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "Not Good"}, "name must be"),
        ({"license": ""}, "license must be"),
        ({"task": "detection"}, "task must be one of classification"),
        ({"outputs": []}, "outputs must be"),
        ({"outputs": ["a", "a"]}, "outputs must differ"),
        ({"tile": {"px": 8, "mpp": 0.5}}, "tile.px must be from 16"),
        ({"tile": {"px": 64.5, "mpp": 0.5}}, "tile.px must be an integer"),
        ({"tile": {"px": 64}}, "tile.mpp must be given"),
        ({"tile": {"px": 64, "mpp": 0}}, "tile.mpp must be a number above 0"),
        ({"tile": {"px": 64, "mpp": 0.5, "overlap": 64}}, "tile.overlap must be below"),
        ({"input": {"mean": [0, 0], "std": [1, 1, 1]}}, "input.mean must be a list of 3"),
        ({"input": {"mean": [0, 0, 0], "std": [1, 0, 1]}}, "input.std must be positive"),
        ({"mode": "batch"}, "mode must be one of"),
        ({"transform": {"packsPerInstance": 0}}, "transform.packsPerInstance must be from 1 to 100000"),
        ({"modelSeconds": 0}, "modelSeconds must be from 1 to 3590"),
        ({"aggregate": ["average"]}, "aggregate must be a list of strings like mean"),
        ({"heatmap": {"output": "other"}}, "heatmap.output other is not among the outputs"),
    ],
)
def test_a_model_json_that_breaks_the_contract_is_refused_with_the_field(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModelPackageInvalid, match=said):
        parse_model(json.dumps(packages.document(**changes)))


def test_defaults_are_those_of_the_contract() -> None:
    spec = parse_model(json.dumps(packages.document()))
    assert (spec.overlap, spec.layout, spec.range, spec.batch) == (0, "NCHW", (0, 1), 64)
    assert spec.model_seconds is None
    assert parse_model(json.dumps(packages.document(modelSeconds=600))).model_seconds == 600


def test_another_package_than_the_pinned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelDigestMismatch):
        opened(packages.model_package(packages.ChannelMeans()), tmp_path, digest="sha256:" + "0" * 64)
    with pytest.raises(ModelPackageInvalid, match="the run asked for tried 2"):
        opened(packages.model_package(packages.ChannelMeans()), tmp_path, version="2")


def test_paths_and_links_that_leave_the_package_are_refused(tmp_path: Path) -> None:
    text = json.dumps(packages.document()).encode()
    for name in ("../model.pt", "/model.pt", "code/../../x"):
        with pytest.raises(ModelPackageInvalid, match="outside"):
            opened(packages.package({"model.json": text, name: b"x"}), tmp_path)
    with pytest.raises(ModelPackageInvalid, match="link"):
        opened(packages.package({"model.json": text}, link="/etc/passwd"), tmp_path)


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelPackageInvalid, match="unpacked"):
        opened(b"not a tar", tmp_path)
    with pytest.raises(ModelPackageInvalid, match=r"no model\.json"):
        opened(packages.package({"model.pt": b"x"}), tmp_path)
    text = json.dumps(packages.document()).encode()
    with pytest.raises(ModelPackageInvalid, match=r"none of code/inference\.py, model\.pt, model\.onnx"):
        opened(packages.package({"model.json": text}), tmp_path)
    with pytest.raises(ModelPackageInvalid, match="TorchScript"):
        predictor(packages.package({"model.json": text, "model.pt": b"weights"}), tmp_path)


def test_layout_range_mean_and_std_are_the_models(tmp_path: Path) -> None:
    tiles = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    given = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 1, 2], "range": [-1, 1]}
    expected = ((tiles / 255 * 2 - 1 - given["mean"]) / given["std"]).mean((1, 2))
    for module, layout in ((packages.ChannelMeans(), "NCHW"), (packages.LastAxisMeans(), "NHWC")):
        package = packages.model_package(module, outputs=["r", "g", "b"], input={**given, "layout": layout})
        np.testing.assert_allclose(predictor(package, tmp_path).run(tiles), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (packages.WrongShape(), r"shape \(2, 1\), not \(2, 7\)"),
        (packages.NotFinite(), "not finite"),
        (packages.RefusesDark(), "too dark for me"),
    ],
)
def test_a_model_that_breaks_its_contract_is_told_so(module: torch.nn.Module, said: str, tmp_path: Path) -> None:
    model = predictor(packages.model_package(module), tmp_path)
    with pytest.raises(ModelError, match=said):
        model.run(np.ones((2, 64, 64, 3), np.uint8))


def expected_area(tile: np.ndarray) -> float:
    """The same measure by scikit-image, whose amounts are ours divided by 6 (logarithms to the base 1e-6)."""
    rows = rgb_from_hed / np.linalg.norm(rgb_from_hed, axis=1, keepdims=True)
    return float((separate_stains(tile, np.linalg.inv(rows))[..., 0] * 6 > THRESHOLD).mean())


def test_haematoxylin_area_of_flat_colours_is_all_or_nothing(tmp_path: Path, reference_package: bytes) -> None:
    model = predictor(reference_package, tmp_path, name="haematoxylin-area", version="1.0.0")
    tiles = np.empty((4, 256, 256, 3), np.uint8)
    # Pure haematoxylin of density 0.41 and 0.39, pure eosin of density 1, glass.
    stains = rgb_from_hed / np.linalg.norm(rgb_from_hed, axis=1, keepdims=True)
    for index, density in enumerate((0.41 * stains[0], 0.39 * stains[0], stains[1], np.zeros(3))):
        tiles[index] = np.round(255 * 10**-density)
    assert model.run(tiles)[:, 0].tolist() == [1, 0, 0, 0]


@needs_real_slides
def test_haematoxylin_area_of_every_tile_of_a_real_slide_is_scikit_images(
    tmp_path: Path, reference_package: bytes
) -> None:
    model = predictor(reference_package, tmp_path, name="haematoxylin-area", version="1.0.0")
    with open_slide(REAL_SLIDES / "CMU-1-Small-Region.svs") as slide:
        tiles = np.stack(
            [slide.read_region(0, x, y, 256, 256).rgb for y in range(0, 2700, 256) for x in range(0, 1900, 256)]
        )
    np.testing.assert_allclose(model.run(tiles)[:, 0], [expected_area(tile) for tile in tiles], atol=1e-6)


def test_the_reference_package_is_the_same_bytes_on_every_run(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "slideway_inference.reference_model", str(tmp_path)],
        cwd=CONTAINER,
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "model.tar.gz").read_bytes() == package_bytes()
