"""Logs: one JSON object a line on stdout, where CloudWatch and the command line read progress. Slides are named
by their id alone: no file names, no manifest columns."""

from __future__ import annotations

import json
import sys
import threading
from datetime import UTC, datetime
from typing import Any, TextIO


def now() -> str:
    """ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Log:
    """Writes events; safe to use from several threads. `fields` stand on every line."""

    def __init__(self, stream: TextIO | None = None, **fields: str) -> None:
        self._stream = stream or sys.stdout
        self._fields = fields
        self._lock = threading.Lock()

    def bind(self, **fields: str) -> None:
        self._fields.update(fields)

    def event(self, event: str, level: str = "info", **fields: Any) -> None:  # noqa: ANN401
        line = {"time": now(), "level": level, "event": event, **self._fields, **fields}
        with self._lock:
            print(json.dumps(line), file=self._stream, flush=True)
