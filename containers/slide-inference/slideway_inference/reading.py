"""The parent's side of the reader processes: an arena of shared memory for tiles, a nursery in which processes are
started, and the processes, which are started when needed and replaced when they die. See reader_process.py for why
they are processes."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slideway_inference.errors import SlideUnreadable, Stopped, by_name
from slideway_inference.fast import Form, NotFast
from slideway_inference.grid import TileGeometry
from slideway_inference.reader_process import (
    NURSERY_REPLY,
    NURSERY_REQUEST,
    ErrorReply,
    Filled,
    Grant,
    NotFastReply,
    ReadRequest,
    ReleaseRequest,
    Reply,
    Request,
    StreamEnded,
    StreamRequest,
    SurveyReply,
)
from slideway_inference.survey import Survey, SurveyRequest

_READ_SECONDS = 600.0
_SURVEY_SECONDS = 3600.0
"""Longest that a reader may be silent before it counts as hung; a survey of a slide without small levels reads it
all."""


class Arena:
    """Shared memory in `slots` slots of `slot_bytes`, without a name in any file system: nothing is left behind
    whatever happens, and the size of /dev/shm does not matter."""

    def __init__(self, slots: int, slot_bytes: int, folder: Path) -> None:
        size = slots * slot_bytes
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("slideway-tiles")
        else:
            with tempfile.TemporaryFile(dir=folder) as file:
                self.descriptor = os.dup(file.fileno())
        os.ftruncate(self.descriptor, size)
        self.slot_bytes = slot_bytes
        self._memory = mmap.mmap(self.descriptor, size)

    def offset(self, slot: int, first: int, px: int) -> int:
        """Where the tile `first` of a slot begins."""
        return slot * self.slot_bytes + first * px * px * 3

    def tiles(self, slot: int, count: int, px: int) -> npt.NDArray[np.uint8]:
        """The tiles in a slot, (count, px, px, 3); a view, valid until the slot is read into again."""
        data = np.frombuffer(self._memory, np.uint8, count * px * px * 3, slot * self.slot_bytes)
        return data.reshape(count, px, px, 3)

    def close(self) -> None:
        os.close(self.descriptor)


class Nursery:
    """Starts reader processes: one process has loaded what they need and forks itself for each, a small part of the
    work of loading it again. Where forking is not safe (macOS) each process loads it itself. Any
    thread may ask."""

    forks = sys.platform == "linux"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._door: socket.socket | None = None
        self._alone: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, connection: int, arena: int, threads: int) -> int:
        """The id of a new process, which has these descriptors. Raises OSError."""
        with self._lock:
            if not self.forks:
                process = _python(f"main({connection}, {arena}, {threads})", connection, arena)
                self._alone[process.pid] = process
                return process.pid
            for _ in range(2):
                if (pid := self._ask(threads, [connection, arena])) is not None:
                    return pid
                self._close()  # it was ended; another takes its place
            raise OSError("No reader process could be started.")

    def end(self, pid: int) -> int | None:
        """Ends a process that was started, if it has not ended; its exit code, negative for a signal. None where
        nobody knows."""
        with self._lock:
            if process := self._alone.pop(pid, None):
                process.kill()
                return process.wait()
            if (code := self._ask(-pid, [])) is None:
                with suppress(ProcessLookupError):  # the nursery that it came from is gone
                    os.kill(pid, signal.SIGKILL)
            return code

    def close(self) -> None:
        with self._lock:
            self._close()

    def _ask(self, number: int, descriptors: list[int]) -> int | None:
        """The nursery's answer; None where it has none, or is gone."""
        door = self._open()
        if door is None:
            return None
        try:
            socket.send_fds(door, [NURSERY_REQUEST.pack(number)], descriptors)
            known, answer = NURSERY_REPLY.unpack(door.recv(NURSERY_REPLY.size))
        except (OSError, struct.error):
            return None
        return int(answer) if known else None

    def _open(self) -> socket.socket | None:
        if self._door is None and self.forks:
            self._door, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = _python(f"nursery({theirs.fileno()})", theirs.fileno())
        return self._door

    def _close(self) -> None:
        if self._door is not None and self._process is not None:
            self._door.close()
            self._process.kill()
            self._process.wait()
            self._door = self._process = None


def _python(call: str, *descriptors: int) -> subprocess.Popen[bytes]:
    """A process that calls a function of reader_process.py."""
    package = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    # Not -m: what is pickled must be known by the same module name on both sides.
    return subprocess.Popen(
        [sys.executable, "-c", f"from slideway_inference import reader_process; reader_process.{call}"],
        pass_fds=descriptors,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # image libraries name files there
    )


class ReaderProcess:
    """One reader process, with `threads` threads for slides in S3. Starts on the first request, and anew after a
    crash. Used by one thread, but that a stream's room may be granted by another."""

    def __init__(self, arena: Arena, nursery: Nursery, stop: threading.Event, threads: int = 1) -> None:
        self._arena = arena
        self._nursery = nursery
        self._stop = stop
        self._threads = threads
        self.pid: int | None = None
        self._connection: Connection | None = None
        self._sending = threading.Lock()

    def survey(self, request: SurveyRequest) -> Survey:
        """Raises SlideQuarantined of all kinds; NotFast for a slide in S3 that must be read from disk."""
        return self.open(request).survey

    def open(self, request: SurveyRequest) -> SurveyReply:
        """The same, with what streaming needs."""
        reply = self._call(request, _SURVEY_SECONDS)
        assert isinstance(reply, SurveyReply)
        return reply

    def read(self, request: ReadRequest) -> npt.NDArray[np.bool_]:
        """Reads tiles into the arena; which of them were readable. Raises SlideUnreadable."""
        reply = self._call(request, _READ_SECONDS)
        assert isinstance(reply, np.ndarray)
        return reply

    def stream(
        self, geometry: TileGeometry, positions: npt.NDArray[np.int32], batch: int, first: int, form: Form
    ) -> None:
        """Begins to read tiles of the slide that was opened last; see StreamRequest."""
        self._tell(StreamRequest(geometry, positions, batch, first, form))

    def grant(self, offset: int, count: int) -> None:
        """Gives the stream room for `count` tiles in the arena. From any thread."""
        self._tell(Grant(offset, count))

    def streamed(self, waits: Callable[[], bool]) -> Filled | StreamEnded:
        """The next grant that was filled, or the end of the stream; the process may be silent for long only while
        it `waits` for room. Raises SlideUnreadable, and what `waits` raises."""
        reply = self._receive(_READ_SECONDS, waits)
        assert isinstance(reply, Filled | StreamEnded)
        return reply

    def release(self) -> None:
        """Closes the slide that the process holds."""
        if self._connection is not None:
            self._call(ReleaseRequest(), _READ_SECONDS)

    def close(self) -> int | None:
        """Ends the process, if it has not ended; its exit code, where it is known."""
        with self._sending:
            if self.pid is None or self._connection is None:
                return None
            self._connection.close()
            code = self._nursery.end(self.pid)
            self.pid = self._connection = None
            return code

    def _tell(self, request: Request) -> None:
        with self._sending, suppress(OSError):  # who receives learns that the process has died
            if self._connection is not None:
                self._connection.send(request)

    def _call(self, request: Request, seconds: float) -> Reply:
        if self._connection is None:
            self._start()
        self._tell(request)
        return self._receive(seconds)

    def _receive(self, seconds: float, waits: Callable[[], bool] = lambda: False) -> Reply:
        connection = self._connection
        deadline = time.monotonic() + seconds
        try:
            if connection is None:
                raise EOFError
            while not connection.poll(0.2):
                if self._stop.is_set():
                    self.close()
                    raise Stopped("The job was told to stop.")
                if waits():
                    deadline = time.monotonic() + seconds
                elif time.monotonic() > deadline:
                    self.close()
                    raise SlideUnreadable(f"Reading it took more than {seconds:.0f} s: the file is damaged.")
            reply: Reply = connection.recv()
        except (EOFError, OSError) as error:
            raise SlideUnreadable(f"Reading it crashed the image library ({self._ending()}).") from error
        if isinstance(reply, ErrorReply):
            raise by_name(reply.name, reply.message)
        if isinstance(reply, NotFastReply):
            raise NotFast(reply.reason)
        return reply

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.pid = self._nursery.start(theirs.fileno(), self._arena.descriptor, self._threads)
        self._connection = Connection(ours.detach())

    def _ending(self) -> str:
        code = self.close()
        if code is None:
            return "it was ended"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
