"""What every tile model is to the rest of the container, whatever its format: batches of tiles in, numbers out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from slideway_inference.errors import ModelError, TilesUnreadable
from slideway_inference.model.device_decoder import DeviceDecoder
from slideway_inference.model.spec import ModelSpec

Tiles = npt.NDArray[np.uint8]
Lengths = npt.NDArray[np.int32]
Values = npt.NDArray[np.float32]

_CACHED_BYTES = 6 << 20
"""Floats that a processor's model gets at once: larger batches leave the cache, and processors then wait for memory
instead of working side by side."""


class Predictor(ABC):
    """The model on one device, for one thread."""

    in_flight = 1
    """How many batches may be submitted before the first of their answers is asked for."""
    decoder: DeviceDecoder | None = None
    """For `submit_parts`."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.spec = spec
        self.device = device

    @property
    def on_gpu(self) -> bool:
        return str(self.device.type) == "cuda"

    @property
    def device_name(self) -> str:
        return str(torch.cuda.get_device_name(self.device)) if self.on_gpu else "cpu"

    @abstractmethod
    def twin(self) -> Predictor:
        """Another predictor with the same weights, for another thread."""

    @abstractmethod
    def _begin(self, tiles: Tiles) -> Callable[[], object]:
        """Begins with a batch; what it answers waits for the model's own answer. Both may raise anything."""

    def run(self, tiles: Tiles) -> Values:
        """Tiles (n, px, px, 3) to outputs (n, outputs), float32. Raises ModelError."""
        return self.submit(tiles)()

    def submit(self, tiles: Tiles) -> Callable[[], Values]:
        """Begins with a batch; `tiles` may be overwritten afterwards. What it answers waits for the outputs, as
        `run` gives them. Both raise ModelError."""
        answer = _named(lambda: self._begin(tiles))
        return lambda: self._checked(_named(answer), len(tiles))

    def submit_parts(self, tiles: Tiles, stored: Lengths) -> Callable[[], Values]:
        """The same with tiles of which those with `stored` (n,) bytes come as their parts, for `decoder`. Raises
        TilesUnreadable, too, before anything is begun."""
        answer = _named(lambda: self._begin_parts(tiles, stored))
        return lambda: self._checked(_named(answer), len(tiles))

    def _begin_parts(self, tiles: Tiles, stored: Lengths) -> Callable[[], object]:
        assert self.decoder is not None
        return self._begin(self.decoder(tiles, stored).cpu().numpy())

    def _checked(self, answer: object, count: int) -> Values:
        expected = (count, len(self.spec.outputs))
        if not isinstance(answer, torch.Tensor | np.ndarray) or tuple(answer.shape) != expected:
            shape = tuple(answer.shape) if isinstance(answer, torch.Tensor | np.ndarray) else type(answer).__name__
            raise ModelError(f"The model must answer with a tensor of shape {expected}, not {shape}.")
        try:
            values = answer.detach().float().cpu().numpy() if isinstance(answer, torch.Tensor) else answer
            values = np.ascontiguousarray(values, np.float32)
        except (TypeError, ValueError) as error:
            raise ModelError(f"The model must answer with numbers: {first_line(error)}") from error
        if not np.isfinite(values).all():
            raise ModelError("The model answered with numbers that are not finite.")
        return values


def _named(step: Callable[[], Any]) -> Any:  # noqa: ANN401
    """A package's code may raise anything, or leave by sys.exit; TorchScript's own error is no RuntimeError."""
    try:
        with torch.inference_mode():
            return step()
    except (ModelError, TilesUnreadable):
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"The model raised: {first_line(error)}") from error


class Normaliser:
    """Bytes to the numbers that the model wants: `range`, then `mean` and `std` a channel."""

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        self._layout = spec.layout
        low, high = spec.range
        shape = (1, 3, 1, 1) if spec.layout == "NCHW" else (1, 1, 1, 3)

        def channels(values: list[float]) -> torch.Tensor | float:
            """A number per channel as it broadcasts; one number where they are equal, which is faster."""
            if len(set(values)) == 1:
                return values[0]
            return torch.tensor(values, dtype=dtype, device=device).reshape(shape)

        self._scale = channels([(high - low) / 255 / std for std in spec.std])
        self._shift = channels([(low - mean) / std for mean, std in zip(spec.mean, spec.std, strict=True)])
        self._scaled = any((high - low) / 255 != std for std in spec.std)
        self._shifted = any(mean != low for mean in spec.mean)

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """(n, px, px, 3) as floats, which are overwritten, in the model's layout."""
        if self._layout == "NCHW":
            # A view with channels last: no copy, and the memory format that convolutions like best.
            batch = batch.permute(0, 3, 1, 2)
        if self._scaled:
            batch.mul_(self._scale)
        if self._shifted:
            batch.add_(self._shift)
        return batch


class InPieces:
    """Runs a batch on the processor in pieces that its cache holds."""

    def __init__(self, normalise: Normaliser) -> None:
        self._normalise = normalise
        self._floats: torch.Tensor | None = None

    def __call__(self, tiles: Tiles, model: Callable[[torch.Tensor], object], step: int = 0) -> object:
        """The model's answer for all tiles; `step` in place of as many as the cache holds."""
        step = step or max(1, _CACHED_BYTES // (tiles[0].size * 4))
        if self._floats is None or self._floats.shape != (step, *tiles.shape[1:]):
            self._floats = torch.empty((step, *tiles.shape[1:]))  # kept: new pages would cost more than the sums
        answers: list[object] = []
        for part in torch.from_numpy(tiles).split(step):
            answer = model(self._normalise(self._floats[: len(part)].copy_(part)))
            # It may be a view of the input, which the next part overwrites.
            answers.append(answer.clone() if isinstance(answer, torch.Tensor) else answer)
        if len(answers) > 1 and all(isinstance(answer, torch.Tensor) for answer in answers):
            return torch.cat(cast(list[torch.Tensor], answers))
        return answers[0]


def first_line(error: BaseException) -> str:
    """TorchScript puts the reason last, after its stack of code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
