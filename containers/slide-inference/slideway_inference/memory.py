"""How much memory there is, and who may have how much of it at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL = 0.2


def memory_limit(share: float) -> int:
    """Bytes: SLIDEWAY_MEMORY_MB, or else that share of what the container has."""
    megabytes = float(os.environ.get("SLIDEWAY_MEMORY_MB") or 0)
    return int(megabytes * (1 << 20)) or int(share * _of_the_container())


def _of_the_container() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(file).read_text()))
        except (OSError, ValueError):  # another version of cgroups, or no limit
            continue
    return total


class Room:
    """Bytes that several may take together. What needs more than there is goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def held(self, count: int, check: Callable[[], None]) -> Iterator[None]:
        """Holds so many bytes, and waits for them; meanwhile `check` is called, and what it raises is raised."""
        count = min(count, self._limit)
        with self._changed:
            while self._used + count > self._limit:
                check()
                self._changed.wait(_POLL)
            self._used += count
        try:
            yield
        finally:
            with self._changed:
                self._used -= count
                self._changed.notify_all()
