"""S3 as this container uses it: slides come in by ranges of pinned versions, results go out. Every request is
counted for the slide it was made for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import boto3
import urllib3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from slideway_inference.contracts import ShardSlide
from slideway_inference.errors import DiskFull, OutputFailed, SlideFetchFailed, SlideUnopenable, Stopped
from slideway_inference.fast.source import S3Source

_PART_BYTES = 16 << 20
"""AWS advises ranges of 8–16 MB."""
_STREAMS = 8
_ATTEMPTS = 5
_MISSING = {"404", "NoSuchKey", "NotFound"}
_OUTRUN = {"412", "409", "404", "PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"}
"""What a conditional put answers where another was first."""
_NO_SPACE = 28

T = TypeVar("T")


@dataclass
class Requests:
    """S3 requests made, by class; adding is thread-safe."""

    get: int = 0
    put: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, get: int = 0, put: int = 0) -> None:
        with self._lock:
            self.get += get
            self.put += put


def s3_client(streams: int, attempts: int) -> Any:  # noqa: ANN401
    """boto3's client, for as many requests at once as `streams` and a few, each made up to `attempts` times. What
    S3Source reads through makes each once."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return boto3.client(
        "s3",
        endpoint_url=endpoint,  # boto3 before 1.28 does not look at the environment
        region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        config=Config(
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=2 * streams,
            s3={"addressing_style": "path" if endpoint else "auto"},
        ),
    )


@dataclass(frozen=True)
class Listed:
    """What a listing tells of an object."""

    bytes: int
    written: datetime
    etag: str


@dataclass(frozen=True)
class Found:
    """An object, and the seconds since it was written, by S3's own clock."""

    body: bytes
    etag: str
    age: float


class Store:
    def __init__(self) -> None:
        self._client = s3_client(_STREAMS, attempts=6)
        self._bronze = s3_client(_STREAMS, attempts=1)
        self._conditions = threading.local()
        # boto3 before 1.35 has no parameters for conditional puts.
        self._client.meta.events.register("before-call.s3.PutObject", self._add_condition)

    def get_if_there(self, bucket: str, key: str, requests: Requests) -> bytes | None:
        """The object, or None when there is none. Raises SlideFetchFailed."""
        found = self.find(bucket, key, requests)
        return None if found is None else found.body

    def find(self, bucket: str, key: str, requests: Requests) -> Found | None:
        """As `get_if_there`, with what else S3 tells."""

        def get() -> Found | None:
            requests.count(get=1)
            try:
                answer = self._client.get_object(Bucket=bucket, Key=key)
                body: bytes = answer["Body"].read()
            except ClientError as error:
                if error.response["Error"]["Code"] in _MISSING:
                    return None
                raise
            now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
            return Found(body, answer["ETag"], (now - answer["LastModified"]).total_seconds())

        return _with_retries(get, threading.Event(), "Silver")

    def stream(
        self, bucket: str, key: str, requests: Requests, stop: threading.Event, take: Callable[[Any], T]
    ) -> T:
        """What `take` makes of the object's body (botocore's StreamingBody); called anew where the body breaks off.
        Raises SlideFetchFailed, Stopped, and what it raises."""

        def get() -> T:
            requests.count(get=1)
            return take(self._client.get_object(Bucket=bucket, Key=key)["Body"])

        return _with_retries(get, stop, "Silver")

    def listed(self, bucket: str, prefix: str, requests: Requests, *, below: bool = True) -> dict[str, Listed]:
        """The objects whose keys begin with `prefix`, by key. Not `below`: those alone that have no further slash.
        Raises SlideFetchFailed."""
        found: dict[str, Listed] = {}
        following: dict[str, str] = {} if below else {"Delimiter": "/"}
        try:
            while True:
                requests.count(put=1)  # a list costs what a put does
                answer = self._client.list_objects_v2(Bucket=bucket, Prefix=prefix, **following)
                for entry in answer.get("Contents", ()):
                    found[entry["Key"]] = Listed(int(entry["Size"]), entry["LastModified"], entry["ETag"])
                if not answer.get("IsTruncated"):
                    return found
                following["ContinuationToken"] = answer["NextContinuationToken"]
        except ClientError as error:
            raise SlideFetchFailed(f"Listing its objects in Silver failed: {_reason(error)}.") from error
        except (BotoCoreError, urllib3.exceptions.HTTPError) as error:
            raise SlideFetchFailed(f"Listing its objects in Silver failed: {type(error).__name__}.") from error

    def put(self, bucket: str, key: str, body: bytes, content_type: str, requests: Requests) -> str:
        """The object's ETag. Raises OutputFailed."""
        requests.count(put=1)
        with _writing(key):
            answer = self._client.put_object(Bucket=bucket, Key=key, Body=body, ContentType=content_type)
        return str(answer["ETag"])

    def put_if(
        self, bucket: str, key: str, body: bytes, content_type: str, requests: Requests, etag: str | None
    ) -> str | None:
        """Puts an object in the place of the one with `etag`, or where it is None of nothing. Its ETag; None where
        another was first. Raises OutputFailed."""
        requests.count(put=1)
        self._conditions.header = ("If-None-Match", "*") if etag is None else ("If-Match", etag)
        try:
            with _writing(key):
                answer = self._client.put_object(Bucket=bucket, Key=key, Body=body, ContentType=content_type)
        except OutputFailed as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and cause.response["Error"]["Code"] in _OUTRUN:
                return None
            raise
        finally:
            self._conditions.header = None
        return str(answer["ETag"])

    def _add_condition(self, params: dict[str, Any], **_: object) -> None:
        header = getattr(self._conditions, "header", None)
        if header is not None:
            params["headers"][header[0]] = header[1]

    def fetch(self, slide: ShardSlide, folder: Path, requests: Requests, stop: threading.Event) -> Path:
        """Fetches all files of a slide into `folder`, laid out as they lie in Bronze, and returns the one to open.
        Raises SlideFetchFailed, of which SlideChanged where a file was replaced, SlideUnopenable for an empty file,
        DiskFull, Stopped."""
        paths = layout(slide)
        if next(file.size for file in slide.files if file.key == slide.key) == 0:
            raise SlideUnopenable("The file is empty (0 bytes): copy it again.")
        sources: list[S3Source] = []
        try:
            parts = []
            for file in slide.files:
                # Without a version it is pinned by the ETag of the first part: no file is made of two.
                source = S3Source(
                    self._bronze, slide.bucket, file.key, file.size, version_id=file.version_id, streams=1,
                    stop=stop, on_request=lambda: requests.count(get=1),
                )  # fmt: skip
                sources.append(source)
                path = folder / paths[file.key]
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as target:
                    target.truncate(file.size)
                parts += [(source, path, start) for start in range(0, file.size, _PART_BYTES)]
            with ThreadPoolExecutor(_STREAMS, "fetch") as pool:
                running = [pool.submit(_part, *part) for part in parts]
                try:
                    for future in running:
                        future.result()
                finally:
                    for future in running:
                        future.cancel()
        except OSError as error:
            if error.errno == _NO_SPACE:
                raise DiskFull(
                    f"The slide's {slide.size / 1e9:.1f} GB do not fit on the instance: give the job more volume."
                ) from error
            raise SlideFetchFailed(f"Storing it on the instance failed: {error.strerror}.") from error
        finally:
            for source in sources:
                source.close()
        return folder / paths[slide.key]


def _part(source: S3Source, path: Path, start: int) -> None:
    (data,) = source.read([(start, min(_PART_BYTES, source.size - start))])
    with path.open("r+b") as target:
        target.seek(start)
        target.write(data)


@contextmanager
def _writing(key: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        raise OutputFailed(f"Writing {PurePosixPath(key).name} failed: {_reason(error)}.") from error
    except (BotoCoreError, urllib3.exceptions.HTTPError) as error:
        raise OutputFailed(f"Writing {PurePosixPath(key).name} failed: {type(error).__name__}.") from error


def _with_retries(get: Callable[[], T], stop: threading.Event, where: str) -> T:
    """boto3 retries requests, not bodies that break off."""
    for attempt in range(1, _ATTEMPTS + 1):
        if stop.is_set():
            raise Stopped("The job was told to stop.")
        try:
            return get()
        except ClientError as error:
            raise SlideFetchFailed(f"Reading from {where} failed: {_reason(error)}.") from error
        except (BotoCoreError, urllib3.exceptions.HTTPError) as error:
            if attempt == _ATTEMPTS:
                raise SlideFetchFailed(
                    f"Reading from {where} failed {_ATTEMPTS} times, at last with {type(error).__name__}."
                ) from error
            stop.wait(0.2 * 2**attempt)
    raise AssertionError


def _reason(error: ClientError) -> str:
    details = error.response.get("Error", {})
    return (
        f"{details.get('Code', 'unknown')}, HTTP {error.response.get('ResponseMetadata', {}).get('HTTPStatusCode')}"
    )


def layout(slide: ShardSlide) -> dict[str, PurePosixPath]:
    """Key to relative path: below the folder that the files have in common, so that MRXS, VSI and DICOM find their
    neighbours. Raises SlideFetchFailed for keys that would leave the folder."""
    folders = [PurePosixPath(file.key).parent for file in slide.files]
    common = folders[0]
    while not all(folder.is_relative_to(common) for folder in folders):
        common = common.parent
    paths = {file.key: PurePosixPath(file.key).relative_to(common) for file in slide.files}
    if any(".." in path.parts for path in paths.values()) or len(set(paths.values())) != len(paths):
        raise SlideFetchFailed("Its keys in Bronze do not name files below one folder.")
    return paths
