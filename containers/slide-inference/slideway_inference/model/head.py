"""A slide-level head: TorchScript that makes one answer from the features of a slide's tiles, as multiple-instance
learning does. It always runs on the processor in float32: a slide is one small batch, and the answer is then the
same wherever the tiles were inferred."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from slideway_inference.errors import ModelError, ModelPackageInvalid
from slideway_inference.model.predictor import first_line
from slideway_inference.model.spec import HeadSpec


@dataclass(frozen=True)
class HeadAnswer:
    """`attention` (n,) float32 is each tile's weight, in the order in which they were given."""

    outputs: dict[str, float]
    attention: npt.NDArray[np.float32] | None


class Head:
    def __init__(self, spec: HeadSpec, file: Path) -> None:
        """Raises ModelPackageInvalid."""
        self.spec = spec
        try:
            self._model: Any = torch.jit.load(str(file), map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelPackageInvalid(f"{spec.file} is not TorchScript that loads: {first_line(error)}") from error

    def run(self, features: npt.NDArray[np.float32]) -> HeadAnswer:
        """From the features (n, d) of a slide's readable tiles, n ≥ 1. Raises ModelError."""
        try:
            with torch.inference_mode():
                answer = self._model(torch.from_numpy(np.ascontiguousarray(features, np.float32)))
        except Exception as error:  # TorchScript's own error is no RuntimeError
            raise ModelError(f"The head raised: {first_line(error)}") from error
        attention: object = None
        if self.spec.attention:
            if not isinstance(answer, tuple | list) or len(answer) != 2:
                raise ModelError("The head must answer with its outputs and the tiles' attention.")
            answer, attention = answer
        elif isinstance(answer, tuple | list):
            answer = answer[0] if answer else None
        outputs = self._checked(answer, (len(self.spec.outputs),), "outputs")
        return HeadAnswer(
            dict(zip(self.spec.outputs, outputs.tolist(), strict=True)),
            self._checked(attention, (len(features),), "attention") if self.spec.attention else None,
        )

    def _checked(self, answer: object, shape: tuple[int], what: str) -> npt.NDArray[np.float32]:
        if isinstance(answer, torch.Tensor) and tuple(answer.shape) in ((1, *shape), (*shape, 1)):
            answer = answer.reshape(shape)
        if not isinstance(answer, torch.Tensor) or tuple(answer.shape) != shape:
            found = tuple(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
            raise ModelError(f"The head's {what} must be a tensor of shape {shape}, not {found}.")
        values: npt.NDArray[np.float32] = answer.float().numpy()
        if not np.isfinite(values).all():
            raise ModelError(f"The head's {what} hold numbers that are not finite.")
        return values
