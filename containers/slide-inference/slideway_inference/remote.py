"""A slide that stays in S3: opened by the fast reader on its objects, with an account of what reading it costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

from slideway_inference.contracts import BronzeFile, ShardSlide
from slideway_inference.errors import SlideUnopenable
from slideway_inference.fast import NotFast, open_fast
from slideway_inference.fast.source import ByteSource, Data, Range, S3Source
from slideway_inference.store import layout, s3_client

_STREAMS = 8


@dataclass(frozen=True)
class Usage:
    """What reading has cost: requests, bytes, seconds in which bytes were under way, and of processor time."""

    requests: int = 0
    bytes: int = 0
    network: float = 0.0
    processor: float = 0.0

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, item.name) - getattr(other, item.name) for item in fields(self)))


class RemoteSlide:
    """Raises NotFast, SlideUnopenable, SlideFetchFailed."""

    def __init__(self, slide: ShardSlide, threads: int) -> None:
        if slide.size == 0:
            raise SlideUnopenable("The file is empty (0 bytes): copy it again.")
        if len(slide.files) > 1 and not slide.key.lower().endswith(".dcm"):
            raise NotFast("a slide of many files")
        self._watch = Watch()
        self._client = s3_client(_STREAMS, attempts=1)
        self._counted = Usage(processor=time.process_time())
        paths = layout(slide)
        self._sources = {
            str(paths[file.key]): _Watched(self._source(slide, file), self._watch) for file in slide.files
        }
        try:
            self.reader = open_fast(self._sources, name=str(paths[slide.key]), threads=threads)
        except BaseException:
            self._close_sources()
            raise

    def _source(self, slide: ShardSlide, file: BronzeFile) -> S3Source:
        return S3Source(
            self._client, slide.bucket, file.key, file.size, version_id=file.version_id, streams=_STREAMS
        )

    def usage(self) -> Usage:
        """Since the last call."""
        sources = self._sources.values()
        total = Usage(
            sum(source.requests for source in sources),
            sum(source.bytes_read for source in sources),
            self._watch.seconds,
            time.process_time(),
        )
        since, self._counted = total - self._counted, total
        return since

    def close(self) -> None:
        self.reader.close()

    def _close_sources(self) -> None:
        for source in self._sources.values():
            source.close()


class Watch:
    """Seconds in which at least one of several threads was inside."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = 0
        self._since = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._since = time.monotonic()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self.seconds += time.monotonic() - self._since


class _Watched:
    """A source whose reading is timed."""

    def __init__(self, source: ByteSource, watch: Watch) -> None:
        self._source = source
        self._watch = watch
        self.size = source.size
        self.requests = self.bytes_read = 0

    def read(self, ranges: Sequence[Range]) -> Sequence[Data]:
        with self._watch:
            try:
                return self._source.read(ranges)
            finally:
                self.requests, self.bytes_read = self._source.requests, self._source.bytes_read

    def close(self) -> None:
        self._source.close()
