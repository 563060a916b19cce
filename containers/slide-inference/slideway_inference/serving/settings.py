"""What the environment says of serving. SageMaker sets its own variables from the Transform job's request."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from slideway_inference.contracts import MODEL_SECONDS
from slideway_inference.memory import memory_limit

_JOB_LIMIT = 100
"""Megabytes: SageMaker's limit for a payload, and for all requests to one instance together."""
_REQUESTS = 8


@dataclass(frozen=True)
class Settings:
    folder: Path
    payload: int
    """Bytes of a request at most."""
    requests: int
    """Requests at once that a Transform job is told to send."""
    model_seconds: float
    """A batch that takes longer means that the model is stuck."""
    request_seconds: float
    drain_seconds: float
    memory: int
    """Bytes that the process may grow to before it starts anew."""

    @staticmethod
    def from_environment() -> Settings:
        megabytes = _number("SAGEMAKER_MAX_PAYLOAD_IN_MB", 0) or _JOB_LIMIT
        return Settings(
            folder=Path(os.environ.get("SLIDEWAY_ML_ROOT", "/opt/ml")) / "model",
            payload=int(megabytes * (1 << 20)),
            requests=int(
                _number("SAGEMAKER_MAX_CONCURRENT_TRANSFORMS", 0) or max(1, min(_REQUESTS, _JOB_LIMIT // megabytes))
            ),
            model_seconds=_number("SLIDEWAY_MODEL_SECONDS", MODEL_SECONDS),
            request_seconds=_number("SLIDEWAY_REQUEST_SECONDS", 590),
            drain_seconds=_number("SLIDEWAY_DRAIN_SECONDS", 60),
            memory=memory_limit(0.9),
        )


def _number(name: str, default: float) -> float:
    return float(os.environ.get(name) or default)


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
