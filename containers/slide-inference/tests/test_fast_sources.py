"""Bytes come in few large requests, and an S3 that misbehaves is noticed or waited for, never believed."""

from __future__ import annotations

import hashlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from botocore.config import Config
from fast_slides import fast, grid, picture, save_jpeg

from slideway_inference.errors import SlideFetchFailed, Stopped
from slideway_inference.fast import FileSource, S3Source, SlideChanged, open_fast
from slideway_inference.fast.source import join


class Request(BaseHTTPRequestHandler):
    """One GET of a range; `server.behave` decides what becomes of it."""

    protocol_version = "HTTP/1.1"
    server: Bad

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        first, last = (int(part) for part in self.headers["Range"].removeprefix("bytes=").split("-"))
        with self.server.lock:
            self.server.served.append((first, last - first + 1))
            number = len(self.server.served)
        self.server.behave(self, number, first, last)

    def answer(self, first: int, last: int, *, send: int | None = None, body: bytes | None = None) -> None:
        whole = self.server.body if body is None else body
        data = whole[first : last + 1]
        self.send_response(206)
        self.send_header("ETag", f'"{hashlib.md5(whole).hexdigest()}"')
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data if send is None else data[:send])
        if send is not None:
            self.close_connection = True

    def error(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Bad(ThreadingHTTPServer):
    """An S3 with one object, that does as it likes."""

    daemon_threads = True

    def __init__(self, body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.body = body
        self.served: list[tuple[int, int]] = []
        self.lock = threading.Lock()
        self.behave: Callable[[Request, int, int, int], None] = lambda r, _, first, last: r.answer(first, last)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def source(self, **changes: Any) -> S3Source:  # noqa: ANN401
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.server_port}",
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            config=Config(
                retries={"total_max_attempts": 1, "mode": "standard"},
                read_timeout=1,
                connect_timeout=2,
                max_pool_connections=16,
                s3={"addressing_style": "path"},
            ),
        )
        return S3Source(client, "bronze", "slides/s.svs", len(self.body), **changes)


BODY = random.Random(1).randbytes(3 << 20)


@pytest.fixture
def s3() -> Iterator[Bad]:
    server = Bad(BODY)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slideway_inference.fast.source._BACKOFF", 0.01)


# --- joining -----------------------------------------------------------------------------------------------------


def test_neighbours_are_joined_up_to_the_size_of_a_request() -> None:
    ranges = [(index * 1000, 1000) for index in range(50)]
    assert join(ranges, 10_000) == [(start, 10_000) for start in range(0, 50_000, 10_000)]
    assert join(list(reversed(ranges)), 1 << 20) == [(0, 50_000)]


def test_gaps_are_read_over_only_while_they_cost_little() -> None:
    wanted = [(0, 1 << 20), ((1 << 20) + 20_000, 1 << 20), (6 << 20, 1 << 20)]
    assert join(wanted) == [(0, (2 << 20) + 20_000), (6 << 20, 1 << 20)]


def test_any_ranges_come_back_in_their_order_and_little_else_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(BODY)
    rng = random.Random(2)
    for _ in range(100):
        starts = [rng.randrange(len(BODY) - 5000) for _ in range(rng.randrange(1, 60))]
        ranges = [(start, rng.randrange(1, 5000)) for start in starts]
        ranges += rng.choices(ranges, k=3)
        source = FileSource(path)
        assert source.read(ranges) == [BODY[start : start + size] for start, size in ranges]
        requests = join(ranges)
        assert source.requests == len(requests)
        assert source.bytes_read == sum(size for _, size in requests)
        wanted = len({byte for start, size in ranges for byte in range(start, start + size)})
        assert source.bytes_read <= wanted * 1.05 + 4096 * len(ranges)
        source.close()


# --- S3 ----------------------------------------------------------------------------------------------------------


def test_ranges_are_asked_for_at_the_same_time(s3: Bad) -> None:
    together, most = 0, 0

    def behave(request: Request, _: int, first: int, last: int) -> None:
        nonlocal together, most
        with s3.lock:
            together += 1
            most = max(most, together)
        time.sleep(0.2)
        with s3.lock:
            together -= 1
        request.answer(first, last)

    s3.behave = behave
    source = s3.source(streams=6)
    ranges = [(index * 500_000, 1000) for index in range(6)]
    assert source.read(ranges) == [BODY[start : start + size] for start, size in ranges]
    assert most >= 4
    assert (source.requests, source.bytes_read) == (6, 6000)


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (429, "SlowDown")])
def test_errors_that_pass_are_waited_out(s3: Bad, status: int, code: str) -> None:
    s3.behave = lambda r, number, first, last: r.error(status, code) if number <= 3 else r.answer(first, last)
    counted: list[int] = []
    source = s3.source(on_request=lambda: counted.append(1))
    assert source.read([(10, 1000)]) == [BODY[10:1010]]
    assert source.requests == len(counted) == 4


def test_errors_that_do_not_pass_end_it_by_name(s3: Bad) -> None:
    s3.behave = lambda r, *_: r.error(503, "SlowDown")
    with pytest.raises(SlideFetchFailed, match="SlowDown"):
        s3.source().read([(0, 10)])
    s3.served.clear()
    s3.behave = lambda r, *_: r.error(403, "AccessDenied")
    with pytest.raises(SlideFetchFailed, match="AccessDenied"):
        s3.source().read([(0, 10)])
    assert len(s3.served) == 1


def test_a_body_that_breaks_off_is_asked_for_again(s3: Bad) -> None:
    s3.behave = lambda r, number, first, last: r.answer(first, last, send=300 if number <= 2 else None)
    assert s3.source().read([(0, 100_000)]) == [BODY[:100_000]]
    assert len(s3.served) == 3


def test_a_body_that_stalls_or_trickles_is_given_up_and_asked_for_again(s3: Bad) -> None:
    def behave(request: Request, number: int, first: int, last: int) -> None:
        if number == 1:
            time.sleep(1.5)  # longer than the read time-out
        elif number == 2:
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {first}-{last}/{len(BODY)}")
            request.send_header("Content-Length", str(last - first + 1))
            request.end_headers()
            for _ in range(8):
                request.wfile.write(b"x")
                request.wfile.flush()
                time.sleep(0.1)
            request.close_connection = True
            return
        request.answer(first, last)

    s3.behave = behave
    source = s3.source(patience=0.3, slowest=10_000)
    started = time.monotonic()
    assert source.read([(0, 1000)]) == [BODY[:1000]]
    assert time.monotonic() - started < 10
    assert len(s3.served) == 3


def test_reading_ends_in_time_whatever_s3_does(s3: Bad) -> None:
    def trickle(request: Request, _: int, first: int, last: int) -> None:
        request.answer(first, last, send=0)
        with suppress(OSError):
            for _ in range(160):
                request.wfile.write(bytes(500))
                time.sleep(0.06)

    for behave in (trickle, lambda r, *_: r.error(503, "SlowDown")):
        s3.behave = behave
        source = s3.source(within=0.6)
        started = time.monotonic()
        with pytest.raises(SlideFetchFailed, match=r"Reading from Bronze (took more than|failed)"):
            source.read([(start, 80_000) for start in (0, 1 << 20, 2 << 20)])
        assert time.monotonic() - started < 2


def test_another_object_midway_is_noticed(s3: Bad) -> None:
    source = s3.source()
    source.read([(0, 10)])
    other = BODY[::-1]
    s3.behave = lambda r, _, first, last: r.answer(first, last, body=other)
    with pytest.raises(SlideChanged):
        source.read([(0, 10)])


def test_another_size_is_noticed_at_once(s3: Bad) -> None:
    s3.behave = lambda r, _, first, last: r.answer(first, last, body=BODY + b"more")
    with pytest.raises(SlideChanged, match="bytes where"):
        s3.source().read([(0, 10)])


@pytest.mark.parametrize(
    ("status", "code"), [(412, "PreconditionFailed"), (404, "NoSuchVersion"), (416, "InvalidRange")]
)
def test_an_object_that_is_no_longer_there_is_noticed(s3: Bad, status: int, code: str) -> None:
    s3.behave = lambda r, *_: r.error(status, code)
    with pytest.raises(SlideChanged):
        s3.source(etag='"x"').read([(0, 10)])
    assert len(s3.served) == 1


def test_another_range_than_asked_for_is_not_believed(s3: Bad) -> None:
    s3.behave = lambda r, number, first, last: (
        r.answer(first + 5, last + 5) if number == 1 else r.answer(first, last)
    )
    assert s3.source().read([(100, 50)]) == [BODY[100:150]]


def test_it_stops_when_told_to(s3: Bad) -> None:
    stop = threading.Event()
    s3.behave = lambda r, *_: r.error(503, "SlowDown")
    threading.Timer(0.05, stop.set).start()
    with pytest.raises((Stopped, SlideFetchFailed)):
        s3.source(stop=stop).read([(0, 10)])
    with pytest.raises(Stopped):
        s3.source(stop=stop).read([(0, 10)])


# --- whole slides ------------------------------------------------------------------------------------------------


@pytest.fixture
def slide(tmp_path: Path) -> tuple[Path, Bad]:
    path = save_jpeg(tmp_path / "s.tif", picture(2000, 1600), downsamples=(4,))
    return path, Bad(path.read_bytes())


def tiles_from(server: Bad, name: str = "s.tif") -> tuple[np.ndarray, np.ndarray]:
    source = server.source()
    with open_fast(source, name=name, threads=2) as reader:
        geometry, positions = grid(reader, 256, 0.5)
        buffers: queue.Queue[Any] = queue.Queue()
        for _ in range(2):
            buffers.put(np.empty((8, 256, 256, 3), np.uint8))
        tiles = np.empty((len(positions), 256, 256, 3), np.uint8)
        for batch in reader.read_batches(geometry, positions, 8, buffers):
            assert not batch.unread
            tiles[batch.indices] = batch.tiles
            buffers.put(batch.buffer)
    return tiles, positions


def test_a_slide_is_read_right_from_an_s3_that_errs_now_and_then(slide: tuple[Path, Bad]) -> None:
    path, server = slide
    rng = random.Random(5)

    def behave(request: Request, _: int, first: int, last: int) -> None:
        fate = rng.random()
        if fate < 0.2:
            request.error(503, "SlowDown")
        elif fate < 0.4:
            request.answer(first, last, send=(last - first) // 2)
        else:
            time.sleep(rng.random() * 0.03)
            request.answer(first, last)

    server.behave = behave
    tiles, positions = tiles_from(server)
    with fast(path) as reader:
        expected = np.empty_like(tiles)
        assert reader.read_tiles(grid(reader, 256, 0.5)[0], positions, expected).all()
    assert np.array_equal(tiles, expected)
    server.shutdown()


def test_a_slide_replaced_while_it_is_read_ends_the_reading(slide: tuple[Path, Bad]) -> None:
    _, server = slide
    other = bytes(len(server.body))
    server.behave = lambda r, number, first, last: r.answer(first, last, body=other if number > 2 else None)
    with pytest.raises(SlideChanged):
        tiles_from(server)
    server.shutdown()


def test_what_is_read_of_a_slide_is_little_more_than_the_tiles_wanted(slide: tuple[Path, Bad]) -> None:
    _, server = slide
    tiles_from(server)
    with open_fast(server.source(), name="s.tif") as reader:
        wanted = int(reader.native[0].sizes.sum())
    assert sum(size for _, size in server.served) < wanted * 1.1 + (2 << 20)
    assert len(server.served) < 12
    server.shutdown()
