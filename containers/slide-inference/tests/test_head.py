"""Embeddings become features.h5 as TRIDENT writes it; a package's head answers for the slide from them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import h5py
import numpy as np
import packages
import pyarrow.parquet as pq
import pytest
import slides
import torch
from conftest import Job

from slideway_inference.contracts import ModelRef, Parameters, Shard, ShardSlide
from slideway_inference.errors import ModelError, ModelPackageInvalid
from slideway_inference.grid import TileGeometry
from slideway_inference.model.head import Head
from slideway_inference.model.package import packed
from slideway_inference.model.spec import HeadSpec, parse_model
from slideway_inference.results import slide_files
from slideway_inference.survey import Survey


class Features(torch.nn.Module):
    """Four numbers of a tile that can be checked: its mean colour, and its contrast."""

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return torch.cat([tiles.mean((2, 3)), tiles.std((1, 2, 3)).unsqueeze(1)], 1)


class Attention(torch.nn.Module):
    """Two classes from the features, each tile weighed by its redness."""

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.softmax(features[:, 0] * 10, 0)
        pooled = (weights.unsqueeze(1) * features).sum(0)
        return torch.softmax(pooled[:2], 0).unsqueeze(0), weights


class MeanOnly(torch.nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.mean(0)[:2]


class Raises(torch.nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if bool((features >= 0).all()):
            raise RuntimeError("no such slide")
        return features


def embedding(**changes: object) -> dict[str, object]:
    return {
        "task": "embedding",
        "outputs": [],
        "dimensions": 4,
        "tile": {"px": 128, "mpp": 0.5, "overlap": 32},
        **changes,
    }


def with_head(module: torch.nn.Module, **head: object) -> bytes:
    described = {"task": "classification", "outputs": ["benign", "malign"], **head}
    document = packages.document(**embedding(head=described))
    document.pop("outputs")
    return packed(
        {
            "model.json": json.dumps(document).encode(),
            "model.pt": packages.script(Features()),
            "head.pt": packages.script(module),
        }
    )


def test_an_embedding_is_written_as_trident_does_and_its_head_answers(job: Job, tmp_path: Path) -> None:
    job.use_model(with_head(Attention(), attention=True))
    job.add("one", slides.save(tmp_path / "a.tiff", slides.tissue(slides.glass(1100, 900), 1, 100, 800, 700), 0.25))
    job.add("empty", slides.save(tmp_path / "b.tiff", slides.glass(900, 700), 0.5))
    ended = job.run()
    assert ended.code == 0, ended.message + ended.stderr

    tiles = job.tiles("one")
    count = len(tiles["minx"])
    values = np.array([tiles[f"value_f{index:04}"] for index in range(4)], np.float32).T
    assert count > 4
    with h5py.File(io.BytesIO(job.output("one", "features.h5"))) as file:
        assert set(file) == {"features", "coords"}
        features, coords = file["features"], file["coords"]
        assert (features.dtype, features.shape, features.maxshape) == (np.float32, (count, 4), (None, 4))
        assert (coords.dtype, coords.shape) == (np.int64, (count, 2))
        assert (features[:] == values).all()
        assert (coords[:] == np.array([tiles["minx"], tiles["miny"]]).T).all()
        assert dict(features.attrs) == {
            "name": "one", "savetodir": "runs/run-1/slides/one/tried/", "encoder": "tried"
        }  # fmt: skip
        about = dict(coords.attrs)
        assert about == {
            "patch_size": 128, "patch_size_level0": 256, "overlap": 32, "name": "one",
            "level0_magnification": 40, "target_magnification": 20, "level0_width": 1100, "level0_height": 900,
            "savetodir": "runs/run-1/slides/one/tried/",
        }  # fmt: skip

    weights = np.exp(values[:, 0] * 10) / np.exp(values[:, 0] * 10).sum()
    np.testing.assert_allclose(tiles["attention"], weights, rtol=1e-4)
    pooled = (weights[:, None] * values).sum(0)[:2]
    marker = job.marker("one")
    assert marker["mode"] == "processing"
    head = marker["head"]
    assert (head["task"], head["tiles"]) == ("classification", count)
    expected = np.exp(pooled) / np.exp(pooled).sum()
    np.testing.assert_allclose([head["outputs"]["benign"], head["outputs"]["malign"]], expected, rtol=1e-4)
    assert "features.h5" in marker["outputs"]

    assert "head" not in job.marker("empty")  # it has no tile to look at
    assert job.tiles("empty")["attention"] == []
    with h5py.File(io.BytesIO(job.output("empty", "features.h5"))) as file:
        assert file["features"].shape == (0, 4)


def test_a_head_that_raises_fails_the_slide_with_its_reason(job: Job, tmp_path: Path) -> None:
    job.use_model(with_head(Raises()))
    job.add("one", slides.save(tmp_path / "a.tiff", slides.tissue(slides.glass(1100, 900), 1, 100, 800, 700), 0.5))
    job.run()
    marker = job.marker("one")
    assert (marker["state"], marker["error"]) == ("FAILED", "ModelError")
    assert "The head raised" in marker["message"]
    assert "no such slide" in marker["message"]


def head(module: torch.nn.Module, folder: Path, attention: bool = False) -> Head:
    (folder / "head.pt").write_bytes(packages.script(module))
    return Head(HeadSpec("head.pt", "regression", ("a", "b"), attention), folder / "head.pt")


def test_a_head_is_held_to_its_contract(tmp_path: Path) -> None:
    features = np.random.default_rng(0).random((5, 4), np.float32) - 0.5
    answer = head(MeanOnly(), tmp_path).run(features)
    np.testing.assert_allclose(list(answer.outputs.values()), features.mean(0)[:2], atol=1e-6)
    assert answer.attention is None
    assert head(Attention(), tmp_path).run(features).attention is None  # it has one, but nobody asked
    with pytest.raises(ModelError, match="outputs and the tiles' attention"):
        head(MeanOnly(), tmp_path, attention=True).run(features)
    with pytest.raises(ModelError, match=r"outputs must be a tensor of shape \(2,\), not \(5, 4\)"):
        head(Raises(), tmp_path).run(features)
    with pytest.raises(ModelError, match="not finite"):
        head(MeanOnly(), tmp_path).run(features * np.nan)
    (tmp_path / "head.pt").write_bytes(b"weights")
    with pytest.raises(ModelPackageInvalid, match=r"head\.pt is not TorchScript"):
        Head(HeadSpec("head.pt", "regression", ("a", "b"), False), tmp_path / "head.pt")


def test_unreadable_tiles_are_in_the_table_but_not_in_what_the_head_sees(tmp_path: Path) -> None:
    document = packages.document(**embedding())
    spec = parse_model(json.dumps({key: value for key, value in document.items() if key != "outputs"}))
    survey = Survey(
        width=600, height=300, levels=1, vendor="aperio", reader="fast", mpp=(0.5, 0.5), mpp_source="file",
        geometry=TileGeometry(128, 0.5, 0, 0, True, 128.0, 128.0, 128.0, 128.0), grid=4,
        positions=np.array([[0, 0], [128, 0], [256, 128]], np.int32), fractions=np.ones(3, np.float32),
        tissue_mm2=1.0, tissue_mpp=8.0, ink_fraction=0.0,
        geojson=b"{}", thumbnail=b"", level_size=(600, 300), seconds=0.0,
    )  # fmt: skip
    slide = ShardSlide("one", "bronze", "a", (), 1, "sum", None, None)
    shard = Shard(
        "run-1", 0, ModelRef("tried", "1", "sha256:0"), Parameters(0.5, 0.02), "test", "silver", "runs/", (slide,)
    )
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    values[1] = np.nan
    readable = np.array([True, False, True])
    attends = head(Attention(), tmp_path, attention=True)
    made, told = slide_files(shard, slide, spec, attends, survey, readable, values)
    assert told is not None
    assert told["tiles"] == 2
    files = {name: make() for name, make in made.items()}
    table = pq.read_table(io.BytesIO(files["tiles.parquet"])).to_pydict()
    assert np.isnan(table["attention"]).tolist() == [False, True, False]
    np.testing.assert_allclose(np.nansum(table["attention"]), 1, atol=1e-6)
    assert np.isnan(table["value_f0002"]).tolist() == [False, True, False]
    with h5py.File(io.BytesIO(files["features.h5"])) as file:
        assert file["features"][:].tolist() == values[[0, 2]].tolist()
        assert file["coords"][:].tolist() == [[0, 0], [256, 128]]
    again, _ = slide_files(shard, slide, spec, attends, survey, readable, values)
    assert {name: make() for name, make in again.items()} == files  # the same bytes
