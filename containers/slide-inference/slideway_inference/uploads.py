"""Uploads beside the work that makes what is uploaded, with bounded memory."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

from slideway_inference.errors import Stopped
from slideway_inference.remote import Watch
from slideway_inference.store import Requests, Store

_STREAMS = 8
_ROOM_BYTES = 192 << 20
_POLL = 0.2


class Uploads:
    """Threads that all slides share. `put` waits while too many bytes are on their way."""

    def __init__(self, store: Store, stop: threading.Event) -> None:
        self.store = store
        self._stop = stop
        self._pool = ThreadPoolExecutor(_STREAMS, "upload")
        self._room = _ROOM_BYTES
        self._freed = threading.Condition()

    def put(self, own: SlideUploads, key: str, body: bytes, content_type: str, *, digest: bool) -> None:
        """Begins an upload, whose end is told to `own`. Raises Stopped."""
        size = min(len(body), _ROOM_BYTES)
        with self._freed:
            while self._room < size:
                self._freed.wait(_POLL)
                self.check_stop()
            self._room -= size

        def upload() -> None:
            failed: Exception | None = None
            try:
                if own.failed is None:  # of a slide that has failed nothing more is needed
                    sha256 = hashlib.sha256(body).hexdigest() if digest else ""
                    with own.watch:
                        etag = self.store.put(own.bucket, key, body, content_type, own.requests)
                    if digest:
                        own.written[key] = {"sha256": sha256, "etag": etag}
            except Exception as error:
                failed = error
            finally:
                with self._freed:
                    self._room += size
                    self._freed.notify_all()
                own.ended(failed)

        self._pool.submit(upload)

    def check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped("The job was told to stop.")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class SlideUploads:
    """One slide's objects in one bucket, put by several threads. The first that fails is told by the next call.
    `written` has, by key, the SHA-256 and the ETag of those for which it was asked."""

    def __init__(self, uploads: Uploads, bucket: str, requests: Requests) -> None:
        self.bucket = bucket
        self.requests = requests
        self.watch = Watch()
        self.written: dict[str, dict[str, str]] = {}
        self.failed: Exception | None = None
        self._uploads = uploads
        self._running = 0
        self._changed = threading.Condition()

    def put(self, key: str, body: bytes, content_type: str, *, digest: bool = True) -> None:
        """Raises OutputFailed of this or an earlier object, Stopped."""
        self._check()
        with self._changed:
            self._running += 1
        try:
            self._uploads.put(self, key, body, content_type, digest=digest)
        except BaseException:
            self.ended(None)
            raise

    def ended(self, failed: Exception | None) -> None:
        """An upload has come to its end."""
        with self._changed:
            self._running -= 1
            self.failed = self.failed or failed
            if self._running == 0:
                self._changed.notify_all()

    def wait(self) -> None:
        """Until all are there. Raises as `put`."""
        with self._changed:
            while self._running:
                self._uploads.check_stop()
                self._changed.wait(_POLL)
        self._check()

    def _check(self) -> None:
        if self.failed is not None:
            raise self.failed
