"""Claims, so that of the jobs that want the same thing at the same time one makes it. A claim is an object that its
holder renews while it works. One that was let go of, or not renewed for some time, is anyone's to take over: a
holder that dies delays the others, and no more. Claims save work and guard nothing: what is made twice after all
has the same bytes."""

from __future__ import annotations

import json
import threading
import uuid
from contextlib import suppress
from dataclasses import dataclass, field

from slideway_inference.errors import SlidewayError
from slideway_inference.store import Requests, Store

_RENEWALS = 5
"""Within the time after which a claim is stale: that some fail loses none."""


class Claimed(Exception):
    """Another holds it: the job `holder`."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


@dataclass(eq=False)
class _Claim:
    """`etag` is that of the object as this process wrote it last; None while it does not hold it."""

    key: str
    requests: Requests
    etag: str | None = None
    renewals: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Claims:
    """One job's claims in one bucket, by who in the job holds them."""

    def __init__(self, store: Store, bucket: str, job_name: str, seconds: float) -> None:
        """A claim that was not renewed for `seconds` is stale."""
        self._store = store
        self._bucket = bucket
        self._job_name = job_name
        self._seconds = seconds
        self._process = uuid.uuid4().hex
        self._held: dict[str, _Claim] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._renew, name="claims", daemon=True).start()

    def take(self, key: str, owner: str, requests: Requests) -> bool:
        """Claims `key` for `owner`. Whether it was claimed before, so that what it stands for may have been made
        meanwhile. Raises Claimed, SlideFetchFailed, OutputFailed."""
        claim = _Claim(key, requests)
        with self._lock:
            if any(held.key == key for held in self._held.values()):
                raise Claimed(self._job_name)
            self._held[owner] = claim
        try:
            found = self._store.find(self._bucket, key, requests)
            if found is not None and found.age < self._seconds:
                process, job = _told(found.body)
                # A job's name is its own: what another process of it left behind is this one's.
                if process not in ("", self._process) and job != self._job_name:
                    raise Claimed(job)
            with claim.lock:
                self._write(claim, found.etag if found else None)
                if claim.etag is None:
                    raise Claimed("")  # it was quicker; who it is shows next time
        except BaseException:
            with self._lock:
                del self._held[owner]
            raise
        return found is not None

    def free(self, owner: str) -> None:
        """Lets go of what `owner` holds, if anything."""
        with self._lock:
            claim = self._held.pop(owner, None)
        if claim is None:
            return
        with claim.lock:
            if claim.etag is not None:
                with suppress(SlidewayError):  # it becomes stale
                    self._write(claim, claim.etag, held=False)
                claim.etag = None

    def close(self) -> None:
        """Lets go of all."""
        self._closed.set()
        for owner in list(self._held):
            self.free(owner)

    def _renew(self) -> None:
        while not self._closed.wait(self._seconds / _RENEWALS):
            with self._lock:
                held = list(self._held.values())
            for claim in held:
                with claim.lock, suppress(SlidewayError):  # what fails is tried again at the next turn
                    if claim.etag is not None:
                        self._write(claim, claim.etag)

    def _write(self, claim: _Claim, etag: str | None, *, held: bool = True) -> None:
        """In the place of what has `etag`, or of nothing. Each time other bytes, so that they have another ETag."""
        claim.renewals += 1
        document = {
            "process": self._process if held else "",
            "jobName": self._job_name,
            "renewals": claim.renewals,
        }
        claim.etag = self._store.put_if(
            self._bucket, claim.key, json.dumps(document).encode(), "application/json", claim.requests, etag
        )


def _told(body: bytes) -> tuple[str, str]:
    """The process that holds a claim, empty where none does, and its job."""
    try:
        document = json.loads(body)
        return str(document["process"]), str(document["jobName"])
    except (ValueError, KeyError, TypeError):
        return "?", ""
