"""Requests in the batcher when memory is short: a tile is never missing for that."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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

    def __init__(self, in_flight: int = 1, *, on_gpu: bool = False) -> None:
        self.in_flight = in_flight
        self.on_gpu = on_gpu

    def submit(self, tiles: Tiles) -> Callable[[], Values]:
        values = tiles.mean((1, 2, 3), dtype=np.float32)[:, None]
        return lambda: values

    def run(self, tiles: Tiles) -> Values:
        return self.submit(tiles)()


def request(count: int) -> Request:
    return Request([memoryview(bytes([index])) for index in range(count)], 1)


@pytest.mark.parametrize(
    ("predictors", "decoders"),
    [
        ([Means()], 1),
        ([Means()], 3),
        ([Means(), Means(), Means()], 3),
        ([Means(on_gpu=True)], 2),
        ([Means(2, on_gpu=True), Means(2, on_gpu=True)], 1),
    ],
)
def test_requests_of_any_size_at_once_have_each_their_own_answers(
    predictors: list[Means], decoders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(data: memoryview, out: Tiles) -> None:
        if data[0] % 13 == 5:
            raise TileUnreadable("It is damaged.")
        out[:] = data[0]

    monkeypatch.setattr(module, "decode", decode)
    batcher = Batcher(cast(list[Predictor], predictors), decoders, 60)
    requests = [request(count) for _ in range(20) for count in (1, 3, 4, 9, 30)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(batcher.submit, requests))
    for each in requests:
        assert each.wait(20)
        count = len(each.tiles)
        assert sorted(each.errors) == [index for index in range(count) if index % 13 == 5]
        expected = [0 if index in each.errors else index for index in range(count)]
        assert each.values[:, 0].tolist() == expected
    assert batcher.stuck() is None


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
