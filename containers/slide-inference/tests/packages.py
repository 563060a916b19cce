"""Model packages for tests: small TorchScript models that behave and misbehave."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from typing import Any

import torch


class TwoClasses(torch.nn.Module):
    """Softmax over brightness and darkness."""

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        mean = tiles.mean((1, 2, 3))
        return torch.softmax(torch.stack([mean, 1 - mean], 1), 1)


class ChannelMeans(torch.nn.Module):
    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return tiles.mean((2, 3))


class LastAxisMeans(torch.nn.Module):
    """For NHWC."""

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return tiles.mean((1, 2))


class WrongShape(torch.nn.Module):
    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return tiles.mean((2, 3))[:, :1].repeat(1, 7)


class NotFinite(torch.nn.Module):
    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return tiles.mean((2, 3))[:, :1] / 0.0


class RefusesDark(torch.nn.Module):
    """Raises on a slide with dark tiles only."""

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        mean = tiles.mean((1, 2, 3))
        if bool((mean < 0.25).any()):
            raise RuntimeError("too dark for me")
        return mean.unsqueeze(1)


class Slow(torch.nn.Module):
    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        work = torch.ones(600, 600)
        for _ in range(60):
            work = torch.tanh(work @ work)
        return tiles.mean((1, 2, 3)).unsqueeze(1) + work[0, 0] * 0


class Hangs(torch.nn.Module):
    """Never answers for a batch with a dark tile."""

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        work = torch.ones(200, 200)
        while bool((tiles.mean((1, 2, 3)) < 0.25).any()):
            work = torch.tanh(work @ work)
        return tiles.mean((1, 2, 3)).unsqueeze(1) + work[0, 0] * 0


class BatchAndLight(torch.nn.Module):
    """How many tiles came together, and how light each is; slow enough that reading is ahead."""

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        work = torch.ones(400, 400)
        for _ in range(20):
            work = torch.tanh(work @ work)
        light = tiles.mean((1, 2, 3)) + work[0, 0] * 0
        return torch.stack([torch.full_like(light, tiles.shape[0]), light], 1)


def document(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "name": "tried",
        "version": "1",
        "license": "Apache-2.0",
        "task": "regression",
        "outputs": ["value"],
        "tile": {"px": 64, "mpp": 0.5},
        "input": {"mean": [0, 0, 0], "std": [1, 1, 1]},
        "mode": "processing",
        **changes,
    }


def script(module: torch.nn.Module) -> bytes:
    out = io.BytesIO()
    torch.jit.save(torch.jit.script(module.eval()), out)
    return out.getvalue()


def package(files: dict[str, bytes], link: str | None = None) -> bytes:
    raw = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        if link:
            member = tarfile.TarInfo("model.pt")
            member.type, member.linkname = tarfile.SYMTYPE, link
            tar.addfile(member)
    return raw.getvalue()


def model_package(module: torch.nn.Module, **changes: Any) -> bytes:  # noqa: ANN401
    return package({"model.json": json.dumps(document(**changes)).encode(), "model.pt": script(module)})


def code_package(code: str, files: dict[str, bytes] | None = None, **changes: Any) -> bytes:  # noqa: ANN401
    """A package with its own code, and whatever else the code wants."""
    text = json.dumps(document(**changes)).encode()
    return package({"model.json": text, "code/inference.py": code.encode(), **(files or {})})
