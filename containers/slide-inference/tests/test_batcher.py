"""Requests in the batcher when memory is short: a tile is never missing for that."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from slideway_inference.errors import TileUnreadable, Unavailable
from slideway_inference.model.predictor import Predictor, Tiles, Values
from slideway_inference.serving import batcher as module
from slideway_inference.serving import decoding
from slideway_inference.serving.batcher import Batcher, Request

PX = 16


class Means:
    """A predictor that answers with each tile's mean."""

    spec = SimpleNamespace(px=PX, batch=4, outputs=("mean",))
    in_flight = 1

    def submit(self, tiles: Tiles) -> Callable[[], Values]:
        values = tiles.mean((1, 2, 3), dtype=np.float32)[:, None]
        return lambda: values

    def run(self, tiles: Tiles) -> Values:
        return self.submit(tiles)()


def request(count: int) -> Request:
    return Request([memoryview(bytes([index])) for index in range(count)], 1)


def test_a_request_for_which_memory_is_short_fails_as_a_whole_and_the_next_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = [True]

    def decode(data: memoryview, out: Tiles) -> None:
        if short[0] and data[0] == 5:
            raise MemoryError
        out[:] = data[0]

    monkeypatch.setattr(module, "decode", decode)
    batcher = Batcher([cast(Predictor, Means())], 1, 60)
    failing = request(11)
    batcher.submit(failing)
    with pytest.raises(Unavailable) as refused:
        failing.wait(10)
    assert refused.value.status == 503
    short[0] = False
    following = request(11)
    batcher.submit(following)
    assert following.wait(10)
    assert following.errors == {}
    assert following.values[:, 0].tolist() == list(range(11))
    assert batcher.stuck() is None


def test_a_decoder_without_memory_says_nothing_of_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    out = np.empty((PX, PX, 3), np.uint8)
    monkeypatch.setattr(decoding, "_jpeg", exhausted)
    with pytest.raises(MemoryError):
        decoding.decode(memoryview(b"\xff\xd8..."), out)
    with pytest.raises(TileUnreadable):
        decoding.decode(memoryview(b"nothing"), out)
