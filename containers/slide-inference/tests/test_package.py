"""`package build` and `package check`, as `slideway model` calls them; the embedding example goes this way."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import packages
import pytest
import torch
from conftest import CONTAINER
from test_formats import ONLY_MODEL, coded, document, network, onnx_bytes
from test_head import Attention, Features, embedding

from slideway_inference import package as command

EXAMPLES = CONTAINER / "examples"
Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """The command in this process: exit code, report and log. What it changes of the process is put back."""
    before, path = torch.get_num_threads(), list(sys.path)

    def begin(*arguments: object) -> tuple[int, dict[str, Any], str]:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        code = command.run(parser.parse_args([*map(str, arguments)]))
        out, log = capfd.readouterr()
        return code, json.loads(out), log

    yield begin
    torch.set_num_threads(before)
    sys.path[:] = path
    sys.modules.pop("convolutions", None)


def run_apart(*arguments: object) -> tuple[int, dict[str, Any], str]:
    """The command as `slideway model` starts it."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "slideway_inference", "package", *map(str, arguments)],
        cwd=CONTAINER,
        capture_output=True,
        text=True,
        timeout=180,
    )
    return ran.returncode, json.loads(ran.stdout), ran.stderr


def written(folder: Path, name: str, content: bytes | dict[str, Any]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(content).encode() if isinstance(content, dict) else content)
    return path


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """The same network in each format."""
    for name, data in coded(ONLY_MODEL).items():
        written(tmp_path / "coded", name, data)
    written(tmp_path / "coded", ".hidden", b"x")
    written(tmp_path / "coded", "code/__pycache__/inference.pyc", b"x")
    return {
        "torchscript": written(tmp_path, "network.pt", packages.script(network())),
        "onnx": written(tmp_path, "network.onnx", onnx_bytes(network())),
        "code": tmp_path / "coded",
    }


@pytest.mark.parametrize("format", ["torchscript", "onnx", "code"])
def test_a_package_of_every_format_is_built_and_passes(
    format: str, sources: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    model = written(tmp_path, "model.json", document(mode="transform"))
    out = tmp_path / "out" / "model.tar.gz"
    code, made, _ = run("build", "--model", model, "--from", sources[format], "--out", out)
    assert (code, made["ok"], made["format"], made["name"]) == (0, True, format, "tried")
    names = [file["name"] for file in made["files"]]
    assert names[0] == "model.json"
    if format == "code":
        assert names[1:] == ["code/convolutions.py", "code/inference.py", "weights.pth"]
    assert (
        run("build", "--model", model, "--from", sources[format], "--out", tmp_path / "again.tar.gz")[1]["digest"]
        == made["digest"]
    )

    code, report, log = run("check", out, "--tiles", 9)
    assert (code, report["ok"]) == (0, True), (report, log)
    assert report["digest"] == made["digest"]
    assert report["outputs"] == ["one", "two", "three"]
    assert report["tiles"] == 9
    assert report["maxDifference"] <= 1e-5
    assert report["tilesPerSecond"].keys() == {"processing", "transform"}
    assert sum(report["sample"].values()) == pytest.approx(1, abs=1e-5)
    assert report["warnings"] == []


def test_an_embedding_with_a_head_is_checked_whole(run: Run, tmp_path: Path) -> None:
    described = embedding(
        head={"file": "slide.pt", "task": "classification", "outputs": ["a", "b"], "attention": True}
    )
    model = {key: value for key, value in packages.document(**described).items() if key != "outputs"}
    out = tmp_path / "model.tar.gz"
    arguments = [
        "build", "--model", written(tmp_path, "model.json", model), "--out", out,
        "--from", written(tmp_path, "features.pt", packages.script(Features())),
    ]  # fmt: skip
    code, failed, _ = run(*arguments)
    assert (code, failed["error"]) == (1, "ModelPackageInvalid")
    assert "lacks slide.pt, which head.file names" in failed["message"]
    assert not out.exists()
    assert run(*arguments, "--head", written(tmp_path, "attention.pt", packages.script(Attention())))[0] == 0
    code, report, _ = run("check", out, "--tiles", 5)
    assert code == 0
    assert report["dimensions"] == 4
    assert report["head"]["attention"] is True
    assert sum(report["head"]["outputs"].values()) == pytest.approx(1, abs=1e-5)


class LooksAround(torch.nn.Module):
    """Its answer for a tile depends on the others of its batch."""

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return (tiles.mean((1, 2, 3)) - tiles.mean()).unsqueeze(1)


@pytest.mark.parametrize(
    ("package", "error", "said"),
    [
        (b"no package", "ModelPackageInvalid", "cannot be unpacked"),
        (packages.package({"model.json": b"{}"}), "ModelPackageInvalid", "model.json: tile must be given"),
        (packages.model_package(packages.WrongShape()), "ModelError", "not (32, 7)"),
        (packages.model_package(packages.NotFinite()), "ModelError", "not finite"),
        (packages.model_package(LooksAround(), batch=8), "ModelDiffers", "alone and in a batch"),
        (
            packages.code_package("def model_fn(folder): raise ValueError('no weights')"),
            "ModelPackageInvalid",
            "no weights",
        ),
    ],
)
def test_a_package_that_fails_says_by_name_why(
    package: bytes, error: str, said: str, run: Run, tmp_path: Path
) -> None:
    code, report, _ = run("check", written(tmp_path, "model.tar.gz", package), "--tiles", 32)
    assert (code, report["ok"], report["error"]) == (1, False, error)
    assert said in report["message"]


def test_code_can_be_refused_and_what_it_prints_stays_out_of_the_report(run: Run, tmp_path: Path) -> None:
    code = "print('loading')\ndef model_fn(folder): return lambda data: data.mean((1, 2, 3)).unsqueeze(1)"
    package = written(tmp_path, "model.tar.gz", packages.code_package(code, {"code/requirements.txt": b"timm"}))
    status, report, _ = run("check", package, "--no-code")
    assert (status, report["error"]) == (1, "ModelFormatNotSupported")
    status, report, log = run_apart("check", package, "--tiles", 4)
    assert status == 0
    assert "loading" in log
    assert any("requirements.txt is not installed" in warning for warning in report["warnings"])


@pytest.mark.parametrize(("seconds", "warned"), [(1, True), (30, False)])
def test_a_batch_that_takes_longer_than_it_may_is_warned_of(
    seconds: int, warned: bool, run: Run, tmp_path: Path
) -> None:
    code = """
import time
def model_fn(folder):
    return None
def predict_fn(data, model):
    time.sleep(0.3 * len(data))
    return data.mean((1, 2, 3)).unsqueeze(1)
"""
    package = packages.code_package(code, batch=4, modelSeconds=seconds)
    status, report, _ = run("check", written(tmp_path, "model.tar.gz", package), "--tiles", 6)
    assert status == 0
    found = [warning for warning in report["warnings"] if "modelSeconds" in warning]
    assert len(found) == warned
    assert all("A batch of 4 tiles took 1." in warning and "may take 1 s" in warning for warning in found)


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ("True", "ModelError", "did not answer within 3 s"),
        ("'SLIDEWAY_SERVE_SOCKET' in os.environ", "ServeFailed", "ModelStuck: The model did not answer within 3 s"),
    ],
)
def test_a_model_that_never_answers_fails_within_its_time(
    where: str, error: str, said: str, tmp_path: Path
) -> None:
    code = f"""
import os, time
def model_fn(folder):
    return None
def predict_fn(data, model):
    while {where}:
        time.sleep(1)
    return data.mean((1, 2, 3)).unsqueeze(1)
"""
    package = written(tmp_path, "model.tar.gz", packages.code_package(code))
    status, report, _ = run_apart("check", package, "--tiles", 2, "--seconds", 3)
    assert (status, report["error"]) == (1, error)
    assert said in report["message"]


# torchvision's own counts of entries and weights: the names load strictly because they are all there.
@pytest.mark.parametrize(
    ("depth", "entries", "parameters", "dimensions"),
    [(18, 122, 11_689_512, 512), (34, 218, 21_797_672, 512), (50, 320, 25_557_032, 2048)],
)
def test_the_embedding_example_has_torchvisions_names(
    depth: int, entries: int, parameters: int, dimensions: int
) -> None:
    sys.path.insert(0, str(EXAMPLES / "embedding"))
    try:
        import network as example
    finally:
        sys.path.pop(0)
    made = example.ResNet(depth)
    state = made.state_dict()
    assert (len(state), sum(weight.numel() for weight in made.parameters())) == (entries, parameters)
    last = {18: "layer4.1.bn2.running_var", 34: "layer4.2.bn2.running_var", 50: "layer4.2.bn3.running_var"}[depth]
    names = [
        "conv1.weight",
        "bn1.num_batches_tracked",
        "layer2.0.downsample.0.weight",
        "layer2.0.downsample.1.bias",
        last,
    ]
    assert {*names, "fc.weight", "fc.bias"} <= state.keys()
    assert ("layer1.0.downsample.0.weight" in state) == (depth == 50)
    example.network(state).load_state_dict(state, strict=True)
    with torch.inference_mode():
        assert made.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, dimensions)
    with pytest.raises(SystemExit, match="no ResNet"):
        example.network({"fc.weight": state["fc.weight"]})


def test_the_embedding_example_goes_from_checkpoint_to_package(run: Run, tmp_path: Path) -> None:
    def python(*arguments: object) -> str:
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", *map(str, arguments)], capture_output=True, text=True, timeout=180
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    network_file = EXAMPLES / "embedding/network.py"
    python(network_file, tmp_path / "weights.pth", 18)
    model = json.loads((EXAMPLES / "embedding/model.json").read_text()) | {"dimensions": 512}
    out = tmp_path / "model.tar.gz"
    told = python(
        EXAMPLES / "export_model.py",
        network_file,
        tmp_path / "weights.pth",
        written(tmp_path, "model.json", model),
        out,
    )
    assert "value_f0007 = " in told
    code, report, _ = run("check", out, "--tiles", 3)
    assert (code, report["dimensions"], len(report["sample"])) == (0, 512, 8)

    sys.path.insert(0, str(EXAMPLES / "embedding"))
    try:
        from head import GatedAttention
    finally:
        sys.path.pop(0)
    torch.manual_seed(1)
    head = GatedAttention(512, 16, 2)
    torch.save(head.state_dict(), tmp_path / "head.pth")
    python(EXAMPLES / "embedding/head.py", tmp_path / "head.pth", tmp_path / "head.pt")
    classes, attention = torch.jit.load(str(tmp_path / "head.pt"))(torch.from_numpy(np.ones((4, 512), np.float32)))
    assert classes.shape == (2,)
    assert attention.tolist() == pytest.approx([0.25] * 4)
