"""Bytes of requests and answers that may be in memory at once. Whoever wants some waits until they are there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from slideway_inference.errors import PayloadTooLarge, Unavailable
from slideway_inference.memory import Room


class Budget:
    def __init__(self, limit: int, what: str) -> None:
        self._limit = limit
        self._what = what
        self._room = Room(limit)

    @contextmanager
    def held(self, count: int, until: float) -> Iterator[None]:
        """Holds so many bytes; waits for them until then (time.monotonic). Raises PayloadTooLarge where they can
        never be there, Unavailable where they were not in time."""
        if count > self._limit:
            raise PayloadTooLarge(f"{self._what} would take {count} bytes of memory; {self._limit} is the limit.")

        def in_time() -> None:
            if time.monotonic() >= until:
                raise Unavailable(f"No memory was free in time for {self._what.lower()}.")

        with self._room.held(count, in_time):
            yield
