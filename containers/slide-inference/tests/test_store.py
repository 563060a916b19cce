"""Slides come from Bronze whole or not at all: not made of two versions, not waited for without end, and no request
hidden."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3 import S3

from slideway_inference.contracts import BronzeFile, ShardSlide
from slideway_inference.errors import SlideFetchFailed, Stopped
from slideway_inference.fast import SlideChanged
from slideway_inference.remote import RemoteSlide
from slideway_inference.store import Requests, Store

KEY = "slides/one/slide.mrxs"
BODY = bytes(range(250)) * 40


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    made = S3()
    made.objects["bronze", KEY] = BODY
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr("slideway_inference.store._PART_BYTES", 1000)
    monkeypatch.setattr("slideway_inference.store._STREAMS", 1)
    monkeypatch.setattr("slideway_inference.fast.source._BACKOFF", 0.01)
    yield made
    made.close()


def slide(version_id: str | None = None) -> ShardSlide:
    file = BronzeFile(KEY, len(BODY), version_id)
    return ShardSlide("one", "bronze", KEY, (file,), len(BODY), "sum", None, None)


class Replacing(Requests):
    """Puts another object of the same size in the slide's place before the fourth request."""

    def __init__(self, s3: S3) -> None:
        super().__init__()
        self._s3 = s3

    def count(self, get: int = 0, put: int = 0) -> None:
        super().count(get, put)
        if self.get == 4:
            self._s3.objects["bronze", KEY] = BODY[::-1]


def test_a_slide_is_fetched_in_parts_and_each_request_is_counted(s3: S3, tmp_path: Path) -> None:
    requests = Requests()
    s3.broken = 2
    path = Store().fetch(slide(), tmp_path, requests, threading.Event())
    assert path.read_bytes() == BODY
    assert requests.get == len(s3.log) == 10 + 2


def test_a_slide_replaced_while_it_is_fetched_is_not_made_of_two(s3: S3, tmp_path: Path) -> None:
    with pytest.raises(SlideChanged):
        Store().fetch(slide(), tmp_path, Replacing(s3), threading.Event())


def test_a_version_is_fetched_whatever_takes_its_place(s3: S3, tmp_path: Path) -> None:
    s3.versions["bronze", KEY, "v1"] = BODY
    path = Store().fetch(slide("v1"), tmp_path, Replacing(s3), threading.Event())
    assert path.read_bytes() == BODY


def test_fetching_stops_within_a_body(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slideway_inference.fast.source._LEAST_CHUNK", 16)
    s3.trickling = KEY
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        Store().fetch(slide(), tmp_path, Requests(), stop)
    assert time.monotonic() - started < 5


def test_an_s3_that_stays_away_is_asked_as_often_as_is_counted(s3: S3, tmp_path: Path) -> None:
    s3.failing[KEY] = 503
    requests = Requests()
    with pytest.raises(SlideFetchFailed, match="HTTP 503"):
        Store().fetch(slide(), tmp_path, requests, threading.Event())
    assert requests.get == len(s3.log) in (8, 16)  # the next part may have begun
    s3.log.clear()
    with pytest.raises(SlideFetchFailed, match="HTTP 503"):
        RemoteSlide(slide(), 1)
    assert len(s3.log) == 8
