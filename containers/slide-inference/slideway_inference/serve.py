"""`serve`: answers for packs of tiles over HTTP, for Batch Transform and for endpoints, until SIGTERM.

The process that SageMaker starts only holds the listening socket and watches over the worker, which serves: where
the model is stuck, crashes the interpreter or has taken all memory, a new worker takes the place of the old one,
and requests wait meanwhile. It ends with 0 after SIGTERM, with 1 when the model package is unusable."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

from slideway_inference.log import Log

_SOCKET = "SLIDEWAY_SERVE_SOCKET"
_LIFELINE = "SLIDEWAY_SERVE_LIFELINE"
_AGAIN = 75
"""The worker's exit code when another is to take its place."""
_SHORT_LIFE = 30.0
_SHORT_LIVES = 5
_BACKLOG = 128


def serve() -> int:
    if _SOCKET in os.environ:
        from slideway_inference.serving.worker import work  # it imports PyTorch

        return work(int(os.environ[_SOCKET]), int(os.environ[_LIFELINE]), _AGAIN)
    return _watch()


def _watch() -> int:
    log = Log()
    port = int(os.environ.get("SAGEMAKER_BIND_TO_PORT") or 8080)
    host = os.environ.get("SLIDEWAY_BIND_HOST", "0.0.0.0")
    listening = socket.create_server((host, port), backlog=_BACKLOG)
    alive, lifeline = os.pipe()  # the worker sees it end where this process is killed
    stop = threading.Event()
    worker: subprocess.Popen[bytes] | None = None

    def forward(*_: object) -> None:
        stop.set()
        if worker is not None:
            worker.terminate()

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    short_lives = 0
    while not stop.is_set():
        started = time.monotonic()
        worker = subprocess.Popen(
            [sys.executable, "-m", "slideway_inference", "serve"],
            env={**os.environ, _SOCKET: str(listening.fileno()), _LIFELINE: str(alive)},
            pass_fds=(listening.fileno(), alive),
            close_fds=True,
        )
        if stop.is_set():
            worker.terminate()
        code = worker.wait()
        if code in (0, 1) or stop.is_set():
            return code if code in (0, 1) else 0
        short_lives = short_lives + 1 if time.monotonic() - started < _SHORT_LIFE else 0
        log.event("serve-again", level="error", exitCode=code, message="The worker has ended; another follows.")
        if short_lives >= _SHORT_LIVES:
            log.event(
                "serve-ended", level="error", exitCode=1, message=f"{_SHORT_LIVES} workers in a row ended early."
            )
            return 1
    os.close(lifeline)
    return 0
