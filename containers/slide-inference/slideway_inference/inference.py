"""What `process` does with a slide's tiles: the model answers for each batch, and the answers become the slide's
results in Silver."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from slideway_inference.contracts import MODEL_SECONDS, Shard, ShardSlide, TileSize
from slideway_inference.fast import Form
from slideway_inference.model.device_decoder import NAME
from slideway_inference.model.head import Head
from slideway_inference.model.predictor import Predictor, Values
from slideway_inference.model.spec import ModelSpec
from slideway_inference.pipeline import Answers, Lengths, SlideWork, Task, Tiles
from slideway_inference.results import Written, completion, is_done, result_key, write_marker, write_slide
from slideway_inference.store import Requests, Store


class Inference(Task):
    state = "INFERRED"
    timing = "infer"
    part = "model"

    def __init__(
        self, store: Store, model: ModelSpec, head: Head | None, predictors: Sequence[Predictor], job_name: str
    ) -> None:
        self.tile = TileSize(model.px, model.mpp, model.overlap)
        self.batch = model.batch
        self.workers = [_Worker(predictor) for predictor in predictors]
        self.form: Form = "parts" if all(predictor.decoder for predictor in predictors) else "pixels"
        self.decoder = NAME
        self._store = store
        self._model = model
        self._head = head
        self._job_name = job_name
        many = f"{len(predictors)} × " if len(predictors) > 1 and predictors[0].on_gpu else ""
        self._device = many + predictors[0].device_name
        self.worker_seconds = float(os.environ.get("SLIDEWAY_MODEL_SECONDS") or MODEL_SECONDS)

    def earlier(self, shard: Shard, slide: ShardSlide, requests: Requests) -> str | None:
        key = result_key(shard, slide, "complete.json")
        previous = self._store.get_if_there(shard.output_bucket, key, requests)
        return is_done(previous, shard, slide) if previous is not None else None

    def begin(self, work: SlideWork) -> _Predictions:
        return _Predictions(len(work.surveyed.positions), len(self._model.outputs))

    def write(self, work: SlideWork) -> None:
        predictions = cast(_Predictions, work.target)
        predictions.written = write_slide(
            self._store,
            work.shard,
            work.slide,
            self._model,
            self._head,
            work.surveyed,
            work.readable,
            predictions.values,
            work.requests,
        )

    def complete(self, work: SlideWork) -> None:
        predictions = cast(_Predictions | None, work.target)
        written = predictions.written if predictions is not None and work.error is None else Written()
        marker = completion(
            work.shard,
            work.slide,
            self._job_name,
            self._device,
            mode="processing",
            error=work.error,
            survey=work.survey,
            readable=work.readable,
            files=written.files,
            head=written.head,
            timings=work.timings,
            bound=work.bound,
            requests=work.requests,
        )
        write_marker(self._store, work.shard, work.slide, marker, work.requests)


class _Worker:
    """A predictor as the pipeline knows workers."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.on_gpu = predictor.on_gpu
        self.in_flight = predictor.in_flight

    @property
    def decoding(self) -> float:
        decoder = self._predictor.decoder
        return decoder.seconds if decoder is not None else 0.0

    def submit(self, tiles: Tiles, stored: Lengths) -> Callable[[], Answers]:
        return self._predictor.submit_parts(tiles, stored) if stored.any() else self._predictor.submit(tiles)


class _Predictions:
    """`values` (n, outputs), NaN where no answer came; `written` is what lies in Silver of them."""

    def __init__(self, count: int, outputs: int) -> None:
        self.values: Values = np.full((count, outputs), np.nan, np.float32)
        self.written = Written()

    def put(self, indices: npt.NDArray[np.intp], answers: Answers) -> None:
        self.values[indices] = cast(Values, answers)

    def close(self) -> None:
        """Memory is all it holds."""
