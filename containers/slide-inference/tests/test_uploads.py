"""A slide's uploads, put by many threads at once: none is lost, and none that failed goes unheard."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
from conftest import until

from slideway_inference import uploads as module
from slideway_inference.errors import OutputFailed, Stopped
from slideway_inference.store import Requests, Store
from slideway_inference.uploads import SlideUploads, Uploads


class Kept:
    """A store that keeps what is put; a key in `held` waits for its event, one in `refused` fails."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.held: dict[str, threading.Event] = {}
        self.refused: set[str] = set()

    def put(self, bucket: str, key: str, body: bytes, content_type: str, requests: Requests) -> str:
        if key in self.held:
            assert self.held[key].wait(10)
        if key in self.refused:
            raise OutputFailed(f"Writing {key} failed.")
        self.objects[key] = body
        return f'"{len(body)}"'


def uploads(kept: Kept, stop: threading.Event | None = None) -> tuple[Uploads, SlideUploads]:
    shared = Uploads(cast(Store, kept), stop or threading.Event())
    return shared, SlideUploads(shared, "silver", Requests())


def test_what_one_thread_puts_while_another_waits_for_room_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROOM_BYTES", 10)
    kept = Kept()
    kept.held = {"large": threading.Event(), "late": threading.Event()}
    shared, own = uploads(kept)
    own.put("large", bytes(10), "image/jpeg")
    with ThreadPoolExecutor(2) as threads:
        late = threads.submit(own.put, "late", bytes(5), "image/jpeg")
        time.sleep(0.1)  # it has found no room
        own.put("empty", b"", "image/jpeg")
        kept.held["large"].set()
        late.result(10)
        until(lambda: set(kept.objects) == {"large", "empty"})
        waited = threads.submit(own.wait)
        time.sleep(0.3)
        assert not waited.done()
        kept.held["late"].set()
        waited.result(10)
    assert set(kept.objects) == {"large", "empty", "late"}
    shared.close()


def test_thousands_of_objects_from_many_threads_are_all_there() -> None:
    kept = Kept()
    shared, own = uploads(kept)

    def put(first: int) -> None:
        for number in range(first, first + 500):
            own.put(f"objects/{number}", bytes(8), "image/jpeg", digest=False)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(put, range(0, 4000, 500)))
    own.wait()
    assert len(kept.objects) == 4000
    shared.close()


def test_the_first_that_fails_is_told_and_nothing_follows_it() -> None:
    kept = Kept()
    kept.refused = {"bad", "worse"}
    shared, own = uploads(kept)
    own.put("bad", b"1", "image/jpeg")
    with pytest.raises(OutputFailed, match="bad"):
        own.wait()
    with pytest.raises(OutputFailed, match="bad"):
        own.put("worse", b"1", "image/jpeg")
    assert kept.objects == {}
    shared.close()


def test_who_is_told_to_stop_waits_no_longer() -> None:
    kept, stop = Kept(), threading.Event()
    kept.held = {"held": threading.Event()}
    shared, own = uploads(kept, stop)
    own.put("held", b"1", "image/jpeg")
    stop.set()
    with pytest.raises(Stopped):
        own.wait()
    kept.held["held"].set()
    shared.close()
