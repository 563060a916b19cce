"""Bytes that may be in memory at once. Whoever wants some waits until they are there."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from slideway_inference.errors import PayloadTooLarge, Unavailable


class Budget:
    def __init__(self, limit: int, what: str) -> None:
        self._limit = limit
        self._what = what
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def held(self, count: int, until: float) -> Iterator[None]:
        """Holds so many bytes; waits for them until then (time.monotonic). Raises PayloadTooLarge where they can
        never be there, Unavailable where they were not in time."""
        if count > self._limit:
            raise PayloadTooLarge(f"{self._what} would take {count} bytes of memory; {self._limit} is the limit.")
        with self._changed:
            if not self._changed.wait_for(lambda: self._used + count <= self._limit, until - time.monotonic()):
                raise Unavailable(f"No memory was free in time for {self._what.lower()}.")
            self._used += count
        try:
            yield
        finally:
            with self._changed:
                self._used -= count
                self._changed.notify_all()
