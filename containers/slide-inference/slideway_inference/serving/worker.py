"""The process that serves: loads the model, answers requests, and watches over itself."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

from slideway_inference.errors import SlidewayError
from slideway_inference.log import Log
from slideway_inference.model.package import open_folder
from slideway_inference.model.predictors import load_predictors
from slideway_inference.pipeline import processors, readers_for
from slideway_inference.serving.batcher import Batcher
from slideway_inference.serving.server import Server, Service
from slideway_inference.serving.settings import Settings, resident_bytes

_WATCH_SECONDS = 0.25
_STUCK_DRAIN_SECONDS = 10.0


def work(listening: int, lifeline: int, again: int) -> int:
    """Serves on the socket with that number until SIGTERM, or until another process is to take its place, which
    `again` says as the exit code."""
    log = Log()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it comes through the process that watches
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    started = time.monotonic()
    settings = Settings.from_environment()
    try:
        package = open_folder(settings.folder)
        log.bind(model=package.spec.name)
        cores = processors()
        predictors = load_predictors(package, cores)
    except SlidewayError as error:
        log.event("serve-failed", level="error", error=error.name, message=str(error))
        print(f"{error.name}: {error}", file=sys.stderr)
        return 1
    gpus = sum(predictor.on_gpu for predictor in predictors)
    batcher = Batcher(predictors, readers_for(cores - gpus), settings.model_seconds)
    service = Service(settings, batcher, package.spec.outputs, log)
    server = Server(socket.socket(fileno=listening), service)
    threading.Thread(target=server.serve_forever, name="accept", daemon=True).start()
    log.event(
        "serving",
        version=package.spec.version,
        format=package.format,
        device=predictors[0].device_name,
        devices=len(predictors),
        batch=batcher.batch,
        seconds=round(time.monotonic() - started, 3),
    )

    def make_way(event: str, reason: str, seconds: float) -> NoReturn:
        """Answers what is under way, as far as it can be, and leaves new connections to the next worker. Nobody is
        told to try again before new requests go there."""
        log.event(event, level="error", message=reason)
        server.shutdown()
        service.stop(f"The server starts anew. {reason}")
        batcher.give_up()
        service.drained(seconds)
        _leave(again)

    while not stop.wait(_WATCH_SECONDS):
        reason = batcher.stuck()
        if reason is not None:
            make_way("model-stuck", reason, _STUCK_DRAIN_SECONDS)
        resident = resident_bytes()
        if resident > settings.memory:
            reason = f"The process has {resident >> 20} MB; {settings.memory >> 20} MB is the limit."
            make_way("memory-high", reason, settings.drain_seconds)
    service.stop("The server is stopping.")
    drained = service.drained(settings.drain_seconds)
    log.event("serve-ended", level="info" if drained else "warning", exitCode=0, drained=drained)
    return _leave(0)


def _leave(code: int) -> NoReturn:
    """Without waiting for threads that may never end."""
    sys.stdout.flush()
    os._exit(code)


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)
