"""Where a slide's bytes come from: a file, or an S3 object pinned to what was ingested. Callers ask for many small
ranges at once; neighbours are joined into large requests, of which many are under way at the same time."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slideway_inference.errors import SlideFetchFailed, Stopped

Range = tuple[int, int]
"""Offset and size, in bytes."""
Data = bytes | memoryview

_REQUEST_BYTES = 8 << 20
"""AWS advises ranges of 8–16 MB."""
_WASTE = 0.08
"""Most bytes between wanted ranges that are read for fewer requests, as a share of the wanted ones."""
_NEAR = 4096
"""A gap that costs less than a request whatever the share."""
_ATTEMPTS = 8
_BACKOFF, _LONGEST_BACKOFF = 0.2, 10.0
_QUICK = 0.2
_WITHIN = 300.0
"""Seconds that one call of `read` may take, and what its last request takes to time out: less than the 600 after
which a reader that is silent counts as hung, whose slide is then fetched whole."""
_LEAST_CHUNK, _CHUNK = 16 << 10, 256 << 10
"""Read at once from a connection: little at first and while it is slow, because until a chunk is there nobody looks
at the clock; at most what is still copied from the processor's cache."""


class SlideChanged(SlideFetchFailed):
    """The object in Bronze is not the one that was opened: it was replaced while it was read."""


class ByteSource(Protocol):
    """A slide's bytes. Thread-safe. `requests` and `bytes_read` count what was asked of the storage."""

    size: int
    requests: int
    bytes_read: int

    def read(self, ranges: Sequence[Range]) -> Sequence[Data]:
        """The bytes of each range, all wholly inside the source; a view keeps all that was read with it. Raises
        SlideFetchFailed, SlideChanged, Stopped."""
        ...

    def close(self) -> None: ...


def join(ranges: Sequence[Range], limit: int = _REQUEST_BYTES) -> list[Range]:
    """The requests that cover `ranges`: neighbours joined, nearest first, while the bytes read for nothing stay
    few; none longer than `limit` unless one range is."""
    ordered = sorted(set(ranges))
    gaps = [
        (start - (offset + size), index + 1) for index, ((offset, size), (start, _)) in enumerate(pairwise(ordered))
    ]
    budget = int(_WASTE * sum(size for _, size in ordered))
    apart = set()
    for gap, index in sorted(gaps):
        if gap > _NEAR:
            budget -= gap
            if budget < 0:
                apart.add(index)
    requests: list[Range] = []
    start = end = -1
    for index, (offset, size) in enumerate(ordered):
        if start < 0 or index in apart or max(end, offset + size) - start > limit:
            if start >= 0:
                requests.append((start, end - start))
            start, end = offset, offset + size
        else:
            end = max(end, offset + size)
    if start >= 0:
        requests.append((start, end - start))
    return requests


def _cut(ranges: Sequence[Range], requests: Sequence[Range], bodies: Sequence[memoryview]) -> list[memoryview]:
    """Cuts each range out of the body that holds it."""
    parts: list[memoryview] = [memoryview(b"")] * len(ranges)
    at = 0
    for index in sorted(range(len(ranges)), key=ranges.__getitem__):
        offset, size = ranges[index]
        while offset + size > requests[at][0] + requests[at][1]:
            at += 1
        start = offset - requests[at][0]
        parts[index] = bodies[at][start : start + size]
    return parts


def _rooms(requests: Sequence[Range]) -> list[memoryview]:
    """Memory for each body, in one piece: numpy takes a large one in large pages, which cost far less to get."""
    ends = list(accumulate(size for _, size in requests))
    whole = np.empty(ends[-1], np.uint8).data
    return [whole[end - size : end] for end, (_, size) in zip(ends, requests, strict=True)]


class FileSource:
    """A file on a local disk. Raises SlideFetchFailed."""

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise SlideFetchFailed(f"The file cannot be opened: {error.strerror}.") from error
        self.size = os.fstat(self._descriptor).st_size
        self.requests = 0
        self.bytes_read = 0
        self._lock = threading.Lock()

    def read(self, ranges: Sequence[Range]) -> Sequence[Data]:
        if not ranges:
            return []
        requests = join(ranges)
        bodies = _rooms(requests)
        for (offset, _), body in zip(requests, bodies, strict=True):
            self._read(offset, body)
        with self._lock:
            self.requests += len(requests)
            self.bytes_read += sum(len(body) for body in bodies)
        return _cut(ranges, requests, bodies)

    def _read(self, offset: int, body: memoryview) -> None:
        at = 0
        while at < len(body):
            try:
                count = os.preadv(self._descriptor, [body[at:]], offset + at)
            except OSError as error:
                raise SlideFetchFailed(f"Reading the file failed: {error.strerror}.") from error
            if not count:
                raise SlideChanged("The file became shorter while it was read.")
            at += count

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class S3Source:
    """An object in S3, pinned by its version or by the ETag of the first answer. `client` is a boto3 S3 client that
    makes each request once: what it would make again would neither be counted nor stopped.

    A request that fails for a passing reason (5xx, a broken or stalled connection, a body that ends early or comes
    slower than `slowest` bytes a second) is made again, `_ATTEMPTS` times in all and as long as the ranges read
    together have not taken `within` seconds. `on_request` is called for each."""

    def __init__(
        self,
        client: Any,  # noqa: ANN401
        bucket: str,
        key: str,
        size: int,
        *,
        version_id: str | None = None,
        etag: str | None = None,
        streams: int = 8,
        stop: threading.Event | None = None,
        on_request: Callable[[], None] | None = None,
        slowest: int = 64 << 10,
        patience: float = 30.0,
        within: float = _WITHIN,
    ) -> None:
        self._client = client
        self._target = {"Bucket": bucket, "Key": key}
        if version_id:
            self._target["VersionId"] = version_id
        self._etag = etag
        self._stop = stop or threading.Event()
        self._on_request = on_request
        self._slowest = slowest
        self._patience = patience
        self._within = within
        self._pool = ThreadPoolExecutor(streams, "range")
        self._lock = threading.Lock()
        self.size = size
        self.requests = 0
        self.bytes_read = 0

    def read(self, ranges: Sequence[Range]) -> Sequence[Data]:
        if not ranges:
            return []
        requests = join(ranges)
        bodies = _rooms(requests)
        deadline = time.monotonic() + self._within
        if len(requests) == 1:
            self._get(requests[0][0], bodies[0], deadline)
            return _cut(ranges, requests, bodies)
        running = [
            self._pool.submit(self._get, offset, body, deadline)
            for (offset, _), body in zip(requests, bodies, strict=True)
        ]
        try:
            for future in running:
                future.result()
        finally:
            for future in running:
                future.cancel()
        return _cut(ranges, requests, bodies)

    def _get(self, offset: int, body: memoryview, deadline: float) -> None:
        """Fills `body` from `offset` on."""
        import urllib3
        from botocore.exceptions import BotoCoreError, ClientError

        for attempt in range(1, _ATTEMPTS + 1):
            if self._stop.is_set():
                raise Stopped("The job was told to stop.")
            try:
                self._attempt(offset, body, deadline)
                return
            except ClientError as error:
                status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
                code = error.response.get("Error", {}).get("Code", "unknown")
                if status in (412, 416) or code in ("NoSuchKey", "NoSuchVersion", "404"):
                    raise SlideChanged(
                        f"The object in Bronze was replaced or removed while it was read: {code}."
                    ) from error
                reason: Exception = error
                told = f"{code}, HTTP {status}"
                passing = status >= 500 or status in (408, 429) or code in ("SlowDown", "RequestTimeout")
            except (BotoCoreError, urllib3.exceptions.HTTPError, OSError, _Incomplete) as error:
                reason, told, passing = error, type(error).__name__.lstrip("_"), True
            if not passing or attempt == _ATTEMPTS:
                raise SlideFetchFailed(f"Reading from Bronze failed: {told} (attempt {attempt}).") from reason
            pause = min(_BACKOFF * 2 ** (attempt - 1), _LONGEST_BACKOFF) * random.uniform(0.5, 1)
            if time.monotonic() + pause > deadline:
                raise SlideFetchFailed(
                    f"Reading from Bronze took more than {self._within:.0f} s, at last {told} (attempt {attempt})."
                ) from reason
            self._stop.wait(pause)
        raise AssertionError

    def _attempt(self, offset: int, body: memoryview, deadline: float) -> None:
        with self._lock:
            self.requests += 1
        if self._on_request is not None:
            self._on_request()
        started, size = time.monotonic(), len(body)
        pinned = {"IfMatch": self._etag} if self._etag and "VersionId" not in self._target else {}
        answer = self._client.get_object(Range=f"bytes={offset}-{offset + size - 1}", **self._target, **pinned)
        stream = answer["Body"]
        try:
            self._check(answer, offset, size)
            at, chunk, now = 0, _LEAST_CHUNK, time.monotonic()
            while at < size:
                if self._stop.is_set():
                    raise Stopped("The job was told to stop.")
                part = stream.read(min(size - at, chunk))
                if not part:
                    raise _Incomplete
                body[at : at + len(part)] = part
                at += len(part)
                before, now = now, time.monotonic()
                if now > min(started + self._patience + at / self._slowest, deadline):
                    raise _Incomplete
                chunk = min(2 * chunk, _CHUNK) if now - before < _QUICK else max(chunk // 2, _LEAST_CHUNK)
        finally:
            stream.close()
        with self._lock:
            self.bytes_read += size

    def _check(self, answer: Any, offset: int, size: int) -> None:  # noqa: ANN401
        etag = answer.get("ETag")
        with self._lock:
            if self._etag is None:
                self._etag = etag
        if etag is not None and etag != self._etag:
            raise SlideChanged("The object in Bronze was replaced while it was read.")
        span, _, whole = str(answer.get("ContentRange", "")).removeprefix("bytes ").partition("/")
        if whole and whole != "*" and whole != str(self.size):
            raise SlideChanged(f"Bronze holds {whole} bytes where {self.size} were ingested.")
        if span and span != f"{offset}-{offset + size - 1}":
            raise _Incomplete

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Incomplete(Exception):
    """The body ended early or came too slowly."""


class Blocks:
    """Reads small things from a source through aligned blocks, so that directories cost few requests.
    Raises EOFError outside the source."""

    def __init__(self, source: ByteSource, block: int = 64 << 10, room: int = 512) -> None:
        self._source = source
        self._block = block
        self._room = room
        self._held: dict[int, Data] = {}

    @property
    def size(self) -> int:
        return self._source.size

    def read(self, offset: int, size: int) -> bytes:
        if offset < 0 or size < 0 or offset + size > self._source.size:
            raise EOFError(f"{size} bytes at {offset} are outside the file")
        if size == 0:
            return b""
        first, last = offset // self._block, (offset + size - 1) // self._block
        missing = [number for number in range(first, last + 1) if number not in self._held]
        if missing:
            if len(missing) + len(self._held) > self._room:
                self._held.clear()
                missing = list(range(first, last + 1))
            spans = [
                (number * self._block, min(self._block, self._source.size - number * self._block))
                for number in missing
            ]
            self._held.update(zip(missing, self._source.read(spans), strict=True))
        data = b"".join(self._held[number] for number in range(first, last + 1))
        start = offset - first * self._block
        return data[start : start + size]
