"""HTTP, as SageMaker asks it of a container: `/ping`, `/execution-parameters`, `/invocations`.

Python's own http.server with a thread a connection. There are few connections (at most as many as concurrent
transforms), each carries megabytes, and a thread that reads straight into the request's memory is both the fastest
and the simplest way to take them. A thread that waits for memory before it reads a body makes TCP slow the sender
down, so that no more than a bounded number of bytes is ever here."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from slideway_inference.errors import (
    AnswerTimeout,
    InternalError,
    PayloadTooLarge,
    RequestInvalid,
    RequestRefused,
    RequestTimeout,
    SlidewayError,
    Unavailable,
)
from slideway_inference.log import Log
from slideway_inference.serving.answers import answer, members, to_json
from slideway_inference.serving.batcher import Batcher, Request
from slideway_inference.serving.budget import Budget
from slideway_inference.serving.settings import Settings, resident_bytes

_SOCKET_SECONDS = 75
"""Without a byte for so long a connection is closed."""
_LEFTOVER_BYTES = 256 << 20
_CONNECTIONS = 128
_NUMBER_BYTES = 4 + 13
"""Of an answer's number: float32, and its text."""
_LINE_BYTES = 256


class Service:
    """What the handlers share. `available` says why there is no serving at the moment."""

    def __init__(self, settings: Settings, batcher: Batcher, outputs: tuple[str, ...], log: Log) -> None:
        self.settings = settings
        self.outputs = outputs
        self.log = log
        self._batcher = batcher
        self._bodies = Budget(2 * settings.payload, "The requests")
        self._answers = Budget(max(512 << 20, 4 * settings.payload), "The answers")
        self._changed = threading.Condition()
        self._active = 0
        self._refusal: str | None = None

    def stop(self, reason: str) -> None:
        """Refuses new requests from now on."""
        with self._changed:
            self._refusal = self._refusal or reason

    def drained(self, seconds: float) -> bool:
        """Whether all requests under way have been answered within the time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._active == 0, seconds)

    def check(self) -> None:
        """Raises Unavailable."""
        if self._refusal is not None:
            raise Unavailable(self._refusal)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A request under way. Raises Unavailable."""
        with self._changed:
            self.check()
            self._active += 1
        try:
            yield
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()

    def invoke(
        self, media_type: str, size: int, read: Callable[[], memoryview], send: Callable[[str, list[bytes]], None]
    ) -> None:
        """One request from its body, which `read` gives, to its answer, for `send`. Raises RequestRefused."""
        started = time.monotonic()
        until = started + self.settings.request_seconds
        with self._bodies.held(size, until):
            body = read()
            found = members(media_type, body)
            size = len(body)
            names = [name for name, _ in found]
            request = Request([data for _, data in found], len(self.outputs))
            room = len(names) * (len(self.outputs) * _NUMBER_BYTES + _LINE_BYTES)
            with self._answers.held(room, until):
                self._batcher.submit(request)
                if not request.wait(until - time.monotonic()):
                    request.fail(AnswerTimeout(f"No answer within {self.settings.request_seconds:g} s."))
                    request.wait(0)
                request.tiles = ()
                del body, found
                made = answer(media_type, names, request, self.outputs)
                send(*made)
        unreadable = sum(error.name == "TileUnreadable" for error in request.errors.values())
        self.log.event(
            "invocation",
            tiles=len(names),
            tilesUnreadable=unreadable,
            tilesFailed=len(request.errors) - unreadable,
            bytesRead=size,
            seconds=round(time.monotonic() - started, 3),
            residentMB=resident_bytes() >> 20,
        )


class Server(ThreadingHTTPServer):
    """Serves on a socket that listens already."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, service: Service) -> None:
        super().__init__(listening.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.service = service
        self._room = threading.BoundedSemaphore(_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        self._room.acquire()  # further connections wait in the system's queue
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """A connection that broke concerns only the one who broke it."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _SOCKET_SECONDS
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        service = self.server.service
        if self.path == "/ping":
            self._answer(service.check, lambda: self._send("application/json", [b"{}\n"]))
        elif self.path == "/execution-parameters":
            parameters = {
                "MaxConcurrentTransforms": service.settings.requests,
                "BatchStrategy": "SINGLE_RECORD",
                "MaxPayloadInMB": service.settings.payload >> 20,
            }
            self._send("application/json", [to_json(parameters)])
        else:
            self._send_error(404, "NotFound", "There are /ping, /execution-parameters and /invocations.")

    def do_POST(self) -> None:
        if self.path != "/invocations":
            self.close_connection = True
            self._send_error(404, "NotFound", "POST goes to /invocations.")
            return
        self._left: int | None = None
        try:
            with self.server.service.admitted():  # until it is answered, so that who drains waits for the answer
                self._invoke()
        except Unavailable as error:
            self._refuse(error.status, error)

    def _invoke(self) -> None:
        try:
            size = self._size()
            media_type = self.headers.get_content_type()
            reserved = self.server.service.settings.payload if size is None else size
            self.server.service.invoke(media_type, reserved, lambda: self._read(size), self._send)
        except RequestRefused as error:
            self._refuse(error.status, error)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            self._refuse(500, InternalError(f"{type(error).__name__}: {error}"[:500]))

    # --- the request's body ------------------------------------------------------------------------------------

    def handle_expect_100(self) -> bool:
        """Says that a body may come only when it would be taken."""
        try:
            self.server.service.check()
            self._size()
        except RequestRefused as error:
            self._left = 0
            self.close_connection = True
            self._refuse(error.status, error)
            return False
        return super().handle_expect_100()

    def _size(self) -> int | None:
        """The body's size as the request states it; None where it comes in chunks. Raises RequestRefused."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return None
        stated = self.headers.get("Content-Length", "")
        if not stated.isdecimal():
            self.close_connection = True
            raise RequestInvalid("Content-Length must say how large the request is.")
        self._left = size = int(stated)
        limit = self.server.service.settings.payload
        if size > limit:
            raise PayloadTooLarge(f"The request has {size} bytes; {limit} is the limit.")
        return size

    def _read(self, size: int | None) -> memoryview:
        try:
            if size is not None:
                body = np.empty(size, np.uint8).data  # not filled with zeros first
                if self.rfile.readinto(body) < size:
                    raise RequestInvalid("The request ended before its Content-Length.")
                self._left = 0
                return body
            return memoryview(self._read_chunks())
        except TimeoutError as error:
            self.close_connection = True
            self._left = 0
            raise RequestTimeout(f"Nothing of the request came for {_SOCKET_SECONDS} s.") from error
        except RequestInvalid:
            self.close_connection = True
            self._left = 0
            raise

    def _read_chunks(self) -> bytearray:
        limit = self.server.service.settings.payload
        body = bytearray()
        while True:
            try:
                size = int(self.rfile.readline(64).split(b";", 1)[0], 16)
            except ValueError as error:
                raise RequestInvalid("The chunks of the request are damaged.") from error
            if size < 0 or len(body) + size > limit:
                self._left = None
                raise PayloadTooLarge(f"The request has more than {limit} bytes, which is the limit.")
            body += self.rfile.read(size)
            if self.rfile.readline(64).strip():
                raise RequestInvalid("The chunks of the request are damaged.")
            if size == 0:
                self._left = 0
                return body

    # --- the answer --------------------------------------------------------------------------------------------

    def _answer(self, check: Callable[[], None], send: Callable[[], None]) -> None:
        try:
            check()
        except RequestRefused as error:
            self._send_error(error.status, error.name, str(error))
        else:
            send()

    def _send(self, media_type: str, pieces: list[bytes], status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(sum(map(len, pieces))))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)

    def _send_error(self, status: int, name: str, message: str) -> None:
        self._send("application/json", [to_json({"error": name, "message": message})], status)

    def _refuse(self, status: int, error: SlidewayError) -> None:
        """What of the body was not read is read now, as far as it is bearable: a sender that is cut off while it
        sends does not see the answer."""
        self.server.service.log.event(
            "invocation-refused", level="warning", status=status, error=error.name, message=str(error)
        )
        self.close_connection = self.close_connection or self._left != 0
        with suppress(OSError):
            self._send_error(status, error.name, str(error))
            self.wfile.flush()
            if self._left != 0:
                self.connection.shutdown(socket.SHUT_WR)
                self.connection.settimeout(2)
                left = min(self._left or _LEFTOVER_BYTES, _LEFTOVER_BYTES)
                while left > 0 and (piece := self.rfile.read1(min(left, 1 << 20))):
                    left -= len(piece)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses: malformed requests and other methods."""
        self.close_connection = True
        with suppress(OSError):
            self._send_error(code, "RequestInvalid", message or "")

    def log_message(self, format: str, *args: object) -> None:
        """Requests are told of as events."""
