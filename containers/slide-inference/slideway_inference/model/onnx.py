"""ONNX by ONNX Runtime, in single precision as the file has it; float16 models get float16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from slideway_inference.errors import ModelFormatNotSupported, ModelPackageInvalid
from slideway_inference.model.package import Package
from slideway_inference.model.predictor import InPieces, Normaliser, Predictor, Tiles, first_line

_TYPES = {"tensor(float)": (torch.float32, np.float32), "tensor(float16)": (torch.float16, np.float16)}


class OnnxPredictor(Predictor):
    """A session may be used by several threads at once, and runs in the one that calls it."""

    def __init__(self, package: Package, device: torch.device, session: Any = None) -> None:  # noqa: ANN401
        """`session` is one that is loaded already, on the same device. Raises ModelPackageInvalid,
        ModelFormatNotSupported."""
        super().__init__(package.spec, device)
        self._package = package
        self._session: Any = session or _session(package, device)
        (self._input, *others), outputs = self._session.get_inputs(), self._session.get_outputs()
        if others or self._input.type not in _TYPES:
            raise ModelPackageInvalid("model.onnx must have one input, of floats.")
        self._output: str = outputs[0].name
        self._dtype, self._numpy_type = _TYPES[self._input.type]
        # A file may be exported for one size of batch only.
        self._fixed = self._input.shape[0] if isinstance(self._input.shape[0], int) else 0
        self._normalise = Normaliser(package.spec, device, torch.float32)
        self._in_pieces = InPieces(self._normalise)

    def twin(self) -> Predictor:
        return OnnxPredictor(self._package, self.device, self._session)

    def _begin(self, tiles: Tiles) -> Callable[[], object]:
        answer = self._on_gpu(tiles) if self.on_gpu else self._in_pieces(tiles, self._on_cpu, self._fixed)
        return lambda: answer

    def _on_cpu(self, batch: torch.Tensor) -> torch.Tensor:
        given = self._filled(batch).to(self._dtype).contiguous().numpy()
        (answer,) = self._session.run([self._output], {self._input.name: given})
        return torch.from_numpy(answer)[: len(batch)]

    def _filled(self, batch: torch.Tensor) -> torch.Tensor:
        """Tiles of zeros fill up what the model wants for a batch."""
        if self._fixed in (0, len(batch)):
            return batch
        rest = torch.zeros((self._fixed - len(batch), *batch.shape[1:]), dtype=batch.dtype, device=batch.device)
        return torch.cat([batch, rest])

    def _on_gpu(self, tiles: Tiles) -> torch.Tensor:
        """Bytes go to the device, which makes floats of them, and the session takes those where they lie."""
        answers = []
        with torch.cuda.device(self.device):
            for part in torch.from_numpy(tiles).split(self._fixed or len(tiles)):
                floats = self._normalise(part.to(self.device, torch.float32))
                given = self._filled(floats).to(self._dtype).contiguous()
                torch.cuda.current_stream().synchronize()  # the session computes in a stream of its own
                binding = self._session.io_binding()
                binding.bind_input(
                    self._input.name,
                    "cuda",
                    self.device.index or 0,
                    self._numpy_type,
                    tuple(given.shape),
                    given.data_ptr(),
                )
                binding.bind_output(self._output)
                self._session.run_with_iobinding(binding)
                answers.append(torch.from_numpy(binding.copy_outputs_to_cpu()[0])[: len(part)])
        return torch.cat(answers)


def _session(package: Package, device: torch.device) -> Any:  # noqa: ANN401
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelFormatNotSupported(
            "model.onnx needs ONNX Runtime: install onnxruntime (onnxruntime-gpu where there is a GPU)."
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    on_gpu = str(device.type) == "cuda"
    providers: list[Any] = [("CUDAExecutionProvider", {"device_id": device.index or 0})] if on_gpu else []
    try:
        session = onnxruntime.InferenceSession(
            str(package.weights), options, providers=[*providers, "CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's errors have no common class
        raise ModelPackageInvalid(f"model.onnx does not load: {first_line(error)}") from error
    if on_gpu and "CUDAExecutionProvider" not in session.get_providers():  # it went to the processors by itself
        raise ModelFormatNotSupported(
            "This ONNX Runtime cannot use the GPU: install onnxruntime-gpu, in a version that is built for this "
            "CUDA, in place of onnxruntime."
        )
    return session
