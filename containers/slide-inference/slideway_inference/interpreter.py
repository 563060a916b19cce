"""Python's own settings, as suits processes whose threads decode."""

from __future__ import annotations

import gc
import sys


def hand_over_quickly() -> None:
    """A thread that comes back from a decoder wants the interpreter's lock for some microseconds; a thread at work
    may keep it for 5 ms, while a processor has nothing to do."""
    sys.setswitchinterval(0.0005)


def spare_the_collector() -> None:
    """Python's collector would look again and again at all tiles on their way, a tenth of the time of reading, and
    find nothing: what is read is freed without it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)
