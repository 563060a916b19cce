"""TorchScript: on a GPU in half precision, fed through pinned memory with copies beside computing."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any, cast

import torch

from slideway_inference.errors import ModelPackageInvalid
from slideway_inference.model.package import Package
from slideway_inference.model.predictor import InPieces, Lengths, Normaliser, Predictor, Tiles, first_line

_IN_FLIGHT = 2
"""Batches on a GPU at once: while one is computed the next is copied."""


class TorchScriptPredictor(Predictor):
    def __init__(self, package: Package, device: torch.device, model: object = None) -> None:
        """`model` is one that is loaded already, on the same device; its weights are shared. Raises
        ModelPackageInvalid when the weights cannot be loaded."""
        super().__init__(package.spec, device)
        self._package = package
        try:
            self._model: Any = model or torch.jit.load(str(package.weights), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelPackageInvalid(f"model.pt is not TorchScript that loads: {first_line(error)}") from error
        self._normalise = Normaliser(package.spec, device, torch.float16 if self.on_gpu else torch.float32)
        self._in_pieces = InPieces(self._normalise)
        self._stages: list[Stage] = []
        self._turn = 0
        if self.on_gpu:
            self.in_flight = _IN_FLIGHT
            self._copying = torch.cuda.Stream(device)
            self._computing = torch.cuda.Stream(device)

    def twin(self) -> Predictor:
        return TorchScriptPredictor(self._package, self.device, self._model)

    def _begin(self, tiles: Tiles) -> Callable[[], object]:
        if self.on_gpu:
            return self._on_gpu(tiles)
        answer = self._in_pieces(tiles, self._model)
        return lambda: answer

    def _begin_parts(self, tiles: Tiles, stored: Lengths) -> Callable[[], object]:
        """On a GPU the tiles stay there."""
        if not self.on_gpu or self.decoder is None:
            return super()._begin_parts(tiles, stored)
        with torch.cuda.stream(self._copying):
            batch = self.decoder(tiles, stored)
        batch.record_stream(self._computing)
        return self._compute(batch, torch.cuda.Event())

    def _on_gpu(self, tiles: Tiles) -> Callable[[], object]:
        """Pageable memory to pinned by the processor, from there to the device beside the batch before."""
        stage = self._stage(tiles.shape)
        count = len(tiles)
        stage.pinned[:count].copy_(torch.from_numpy(tiles))
        with torch.cuda.stream(self._copying):
            stage.device[:count].copy_(stage.pinned[:count], non_blocking=True)
        return self._compute(stage.device[:count], stage.done)

    def _compute(self, batch: torch.Tensor, done: torch.cuda.Event) -> Callable[[], object]:
        """The model on a batch that the copying stream brings; `done` when its answer is in the host's memory."""
        self._computing.wait_stream(self._copying)
        with torch.cuda.stream(self._computing), torch.autocast("cuda", torch.float16):
            answer = self.on_device(batch)
            if isinstance(answer, torch.Tensor):
                target = torch.empty(answer.shape, dtype=torch.float32, pin_memory=True)
                answer = target.copy_(answer, non_blocking=True)
            done.record(self._computing)

        def wait() -> object:
            done.synchronize()
            return answer

        return wait

    def _stage(self, shape: tuple[int, ...]) -> Stage:
        """The next of the buffers, once the batch that was in it is computed."""
        if not self._stages or self._stages[0].pinned.shape[0] < shape[0]:
            torch.cuda.synchronize(self.device)
            self._stages = [Stage(shape, self.device) for _ in range(_IN_FLIGHT)]
        self._turn = (self._turn + 1) % _IN_FLIGHT
        stage = self._stages[self._turn]
        stage.done.synchronize()
        return stage

    def on_device(self, tiles: torch.Tensor) -> object:
        """The answer for bytes that are on the GPU. Where a batch does not fit in its memory, halves may."""
        try:
            return self._model(self._normalise(tiles.to(torch.float16)))
        except Exception as error:
            if "out of memory" not in str(error) or len(tiles) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(tiles) // 2
        parts = [self.on_device(tiles[part]) for part in (slice(half), slice(half, None))]
        if not all(isinstance(part, torch.Tensor) for part in parts):
            return parts[0]
        return torch.cat(cast(list[torch.Tensor], parts))


def torchscript_bytes(scripted: object) -> bytes:
    """model.pt of a scripted or traced module, without the debug records in which PyTorch keeps the path of its
    source, so that the same module gives the same bytes wherever it lies."""
    raw, clean = io.BytesIO(), io.BytesIO()
    torch.jit.save(scripted, raw)
    with zipfile.ZipFile(raw) as source, zipfile.ZipFile(clean, "w", zipfile.ZIP_STORED) as target:
        for name in sorted(source.namelist()):
            if not name.endswith(".debug_pkl"):
                target.writestr(zipfile.ZipInfo(name), source.read(name))
    return clean.getvalue()


class Stage:
    """What a batch passes through on its way to a GPU."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        self.device = torch.empty(shape, dtype=torch.uint8, device=device)
        self.done = torch.cuda.Event()
