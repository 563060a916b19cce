"""Joins the tiles of all requests into full batches, and decodes the next ones while the model works:

    decode   the tiles of the oldest request first, a few at a time, into the batch that is open
    predict  full batches; one that is not full only when no tile is left to decode

On a GPU each predictor has a thread, and others decode. On processors a predictor's thread does both, what is ready
first: threads of which each does one of them, twice as many as there are processors, would take turns in the middle
of their work, each with the cache full of the other's.

Everything between decoding and predicting is bounded by the slots for batches. After an error of the model its
tiles are found by halves, so that it costs them only. That a model does not answer at all is told to who asks
whether it is stuck."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from slideway_inference.errors import (
    ModelError,
    ModelStuck,
    RequestRefused,
    SlidewayError,
    TileUnreadable,
    Unavailable,
)
from slideway_inference.model.predictor import Predictor, Tiles, Values
from slideway_inference.serving.decoding import decode

_SLOT_BYTES = 32 << 20
_CHUNK = 8
"""Tiles that a decoding thread takes at once, or its share of a batch where that is more."""
_DEVICE_LOST = "CUDA error"
"""After such an error a process gets nothing from its GPU any more."""


class _Lost(Exception):
    """A predictor will not answer any more."""


class Request:
    """Tiles to answer for. `values` (n, outputs) are whole, and `errors` say which of them are none, when `wait`
    has returned."""

    def __init__(self, tiles: Sequence[memoryview], outputs: int) -> None:
        self.tiles = tiles
        self.values: Values = np.zeros((len(tiles), outputs), np.float32)
        self.errors: dict[int, SlidewayError] = {}
        self.failure: RequestRefused | None = None
        self.next = 0
        self._left = len(tiles)
        self._done = threading.Event()
        if not tiles:
            self._done.set()

    def wait(self, seconds: float) -> bool:
        """Whether it is answered within the time. Raises what it failed with as a whole."""
        done = self._done.wait(seconds)
        if self.failure is not None:
            raise self.failure
        return done

    def answer(self, count: int) -> None:
        """That many tiles more have a value or an error; under the batcher's lock."""
        self._left -= count
        if self._left == 0:
            self._done.set()

    def fail(self, error: RequestRefused) -> None:
        self.failure = self.failure or error
        self._done.set()


@dataclass(eq=False)
class _Part:
    """Tiles of one request within a batch: from row `first` on, the request's from `index` on."""

    request: Request
    index: int
    first: int
    count: int


@dataclass(eq=False)
class _Slot:
    """A batch: `count` rows are taken, `awaited` of them are not decoded yet; `readable` (batch,)."""

    tiles: Tiles
    readable: npt.NDArray[np.bool_]
    parts: list[_Part] = field(default_factory=list)
    count: int = 0
    awaited: int = 0


@dataclass(eq=False)
class _Flight:
    """A batch on a device, since when, and what answers for its readable rows; `lost`: why nothing will."""

    slot: _Slot
    rows: npt.NDArray[np.intp]
    since: float
    answer: Callable[[], Values] | None = None
    lost: str = ""


class Batcher:
    def __init__(self, predictors: Sequence[Predictor], decoders: int, model_seconds: float) -> None:
        """So many threads decode, those of processors' predictors among them. A predictor that takes longer than
        `model_seconds` for a batch is stuck; its thread is lost."""
        spec = predictors[0].spec
        self._seconds = model_seconds
        self.batch = max(1, min(spec.batch, _SLOT_BYTES // (spec.px**2 * 3)))
        count = 2 + sum(predictor.in_flight + predictor.on_gpu for predictor in predictors)
        shape = (self.batch, spec.px, spec.px, 3)
        self._free = [_Slot(np.empty(shape, np.uint8), np.zeros(self.batch, np.bool_)) for _ in range(count)]
        self._open: _Slot | None = None
        self._full: deque[_Slot] = deque()
        self._pending: deque[Request] = deque()
        self._flights: list[list[_Flight]] = [[] for _ in predictors]
        self._changed = threading.Condition()
        self._fault: str | None = None
        both = sum(not predictor.on_gpu for predictor in predictors)
        self._decoders = max(decoders, both)
        for number, predictor in enumerate(predictors):
            body = self._predict if predictor.on_gpu else self._decode_and_predict
            self._thread(f"predict-{number}", body, predictor, self._flights[number])
        for number in range(self._decoders - both):
            self._thread(f"decode-{number}", self._decode)

    def _thread(self, name: str, body: Callable[..., None], *args: object) -> None:
        def guarded() -> None:
            try:
                body(*args)
            except BaseException as error:  # a fault in here: told as a predictor that is stuck
                self._fault = f"InternalError in {name}: {type(error).__name__}: {error}"

        threading.Thread(target=guarded, name=name, daemon=True).start()

    def submit(self, request: Request) -> None:
        with self._changed:
            if request.next < len(request.tiles):
                self._pending.append(request)
            self._changed.notify_all()

    def stuck(self) -> str | None:
        """Why a predictor will not answer any more, if one is so; `give_up` fails the requests concerned."""
        late = time.monotonic() - self._seconds
        reason = self._fault
        with self._changed:
            for flight in (flight for own in self._flights for flight in own):
                if flight.since < late:
                    flight.lost = f"The model did not answer within {self._seconds:g} s."
                reason = flight.lost or reason
        return reason

    def give_up(self) -> None:
        """Fails the requests that a stuck predictor has tiles of."""
        with self._changed:
            for flight in (flight for own in self._flights for flight in own if flight.lost):
                for part in flight.slot.parts:
                    part.request.fail(ModelStuck(flight.lost))

    # --- decode ------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        while True:
            with self._changed:
                while (claim := self._claim()) is None:
                    self._changed.wait()
            self._decode_part(*claim)

    def _decode_part(self, slot: _Slot, part: _Part) -> None:
        errors: dict[int, SlidewayError] = {}
        for offset in range(part.count):
            row, index = part.first + offset, part.index + offset
            slot.readable[row] = False
            if part.request.failure is None:
                try:
                    decode(part.request.tiles[index], slot.tiles[row])
                    slot.readable[row] = True
                except TileUnreadable as error:
                    errors[index] = error
                except MemoryError:  # the tile may be good, and is not to be missing
                    part.request.fail(Unavailable("No memory was free to decode its tiles."))
        with self._changed:
            part.request.errors |= errors
            slot.awaited -= part.count
            if slot.awaited == 0 and (slot.count == self.batch or not self._pending):
                self._changed.notify_all()

    def _claim(self) -> tuple[_Slot, _Part] | None:
        """The next tiles of the oldest request, and rows of the open batch for them."""
        while self._pending and self._pending[0].failure is not None:
            self._pending.popleft()
            self._changed.notify_all()
        if not self._pending or (self._open is None and not self._free):
            return None
        slot = self._open = self._open or self._free.pop()
        request = self._pending[0]
        left = len(request.tiles) - request.next
        share = min(left, self.batch) // self._decoders
        count = min(max(_CHUNK, share), self.batch - slot.count, left)
        part = _Part(request, request.next, slot.count, count)
        request.next += count
        if request.next == len(request.tiles):
            self._pending.popleft()
        slot.parts.append(part)
        slot.count += count
        slot.awaited += count
        if slot.count == self.batch:
            self._full.append(slot)
            self._open = None
        return slot, part

    # --- predict -----------------------------------------------------------------------------------------------

    def _decode_and_predict(self, predictor: Predictor, flights: list[_Flight]) -> None:
        while True:
            with self._changed:
                while (slot := self._ready()) is None and (claim := self._claim()) is None:
                    self._changed.wait()
            if slot is None:
                assert claim is not None
                self._decode_part(*claim)
                continue
            self._begin(predictor, slot, flights)
            if not self._landed(predictor, flights):
                return

    def _predict(self, predictor: Predictor, flights: list[_Flight]) -> None:
        while True:
            with self._changed:
                while (slot := self._ready()) is None and not flights:
                    self._changed.wait()
            if slot is not None:
                self._begin(predictor, slot, flights)
            if (slot is None or len(flights) >= predictor.in_flight) and not self._landed(predictor, flights):
                return

    def _ready(self) -> _Slot | None:
        """A batch that is full and decoded, or the last one."""
        for slot in self._full:
            if slot.awaited == 0:
                self._full.remove(slot)
                return slot
        rest = self._open
        if rest is not None and not self._pending and not self._full and rest.awaited == 0:
            self._open = None
            return rest
        return None

    def _landed(self, predictor: Predictor, flights: list[_Flight]) -> bool:
        """Whether the oldest batch under way was answered, and the predictor will answer others, too."""
        try:
            self._land(predictor, flights)
        except _Lost as error:
            flights[0].lost = str(error)
            return False
        return True

    def _begin(self, predictor: Predictor, slot: _Slot, flights: list[_Flight]) -> None:
        rows = np.flatnonzero(slot.readable[: slot.count])
        for part in slot.parts:
            if part.request.failure is not None:  # nobody waits for these any more
                rows = rows[(rows < part.first) | (rows >= part.first + part.count)]
        flight = _Flight(slot, rows, time.monotonic())
        with self._changed:
            flights.append(flight)
        if not len(rows):
            return
        whole = len(rows) == slot.count
        with suppress(ModelError):  # whose tile it is, is found out when it lands
            flight.answer = predictor.submit(slot.tiles[: slot.count] if whole else slot.tiles[rows])

    def _land(self, predictor: Predictor, flights: list[_Flight]) -> None:
        flight = flights[0]
        slot, rows = flight.slot, flight.rows
        values = np.zeros((slot.count, len(predictor.spec.outputs)), np.float32)
        errors: dict[int, SlidewayError] = {}
        try:
            if flight.answer is not None:
                values[rows] = flight.answer()
            elif len(rows):
                self._apart(predictor, flight, rows, values, errors)
        except ModelError:
            self._apart(predictor, flight, rows, values, errors)
        with self._changed:
            flights.remove(flight)
            for part in slot.parts:
                stop = part.first + part.count
                part.request.values[part.index : part.index + part.count] = values[part.first : stop]
                for row in range(part.first, stop) if errors else ():
                    if row in errors:
                        part.request.errors[part.index + row - part.first] = errors[row]
                part.request.answer(part.count)
            slot.parts.clear()
            slot.count = 0
            self._free.append(slot)
            self._changed.notify_all()

    def _apart(
        self,
        predictor: Predictor,
        flight: _Flight,
        rows: npt.NDArray[np.intp],
        values: Values,
        errors: dict[int, SlidewayError],
    ) -> None:
        """After an error by halves, until the tiles are known at which the model raises."""
        flight.since = time.monotonic()
        half = len(rows) // 2
        for part in (rows[:half], rows[half:]) if half else (rows,):
            try:
                values[part] = predictor.run(flight.slot.tiles[part])
            except ModelError as error:
                if _DEVICE_LOST in str(error):
                    raise _Lost(str(error)) from error
                if len(part) > 1:
                    self._apart(predictor, flight, part, values, errors)
                else:
                    errors[int(part[0])] = error
