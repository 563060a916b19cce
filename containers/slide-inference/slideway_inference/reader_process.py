"""The process that reads slides: `main`. reading.py has it forked by another process, `nursery`.

Native image libraries crash and hang on damaged files. Reading in processes of their own keeps that to one slide:
the parent sees the process end and goes on. Such a process holds one slide at a time, imports no PyTorch, writes
tiles straight into the arena it shares with its parent, and ends when its parent does.

It reads in two ways. A slide on disk is read request by request, with one thread. A slide in S3 is streamed by the
fast reader, with threads for requests and for decoding: the parent grants room in the arena ahead of time and hears
of each part as it is filled, so that neither waits for the other."""

from __future__ import annotations

import mmap
import os
import queue
import signal
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slideway_inference.contracts import ShardSlide
from slideway_inference.errors import InternalError, SlidewayError
from slideway_inference.fast import Form, NotFast
from slideway_inference.grid import TileGeometry
from slideway_inference.interpreter import hand_over_quickly, spare_the_collector
from slideway_inference.reader import SlideReader, open_slide
from slideway_inference.remote import RemoteSlide, Usage
from slideway_inference.survey import Survey, SurveyRequest, survey

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ReadRequest:
    """Tiles to read into the arena from byte `offset` on, as (n, px, px, 3) uint8. `level_size` names the level
    where another reader made the geometry."""

    path: Path
    geometry: TileGeometry
    positions: npt.NDArray[np.int32]
    offset: int
    level_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class StreamRequest:
    """Begins to read all of these tiles of the slide that was surveyed last, `first` of them into the first room
    that is granted, `batch` into each that follows, less where a strip ends. See FastReader.read_batches."""

    geometry: TileGeometry
    positions: npt.NDArray[np.int32]
    batch: int
    first: int
    form: Form


@dataclass(frozen=True)
class Grant:
    """Room in the arena for the next `count` tiles of the stream, from byte `offset` on. No answer of its own."""

    offset: int
    count: int


@dataclass(frozen=True)
class ReleaseRequest:
    """Close the slide, so that its space on disk is given back."""


@dataclass(frozen=True)
class ErrorReply:
    name: str
    message: str


@dataclass(frozen=True)
class NotFastReply:
    reason: str


@dataclass(frozen=True)
class SurveyReply:
    """`strips`: of how many tiles each, in a slide that will be streamed."""

    survey: Survey
    usage: Usage
    strips: list[int]


@dataclass(frozen=True)
class Filled:
    """The grant at `offset` is filled: which tiles lie there, by their index, which of them could be read, which of
    the others OpenSlide may be able to read, and how many bytes those have that lie there in another form than
    pixels (0)."""

    offset: int
    indices: npt.NDArray[np.intp]
    readable: npt.NDArray[np.bool_]
    again: npt.NDArray[np.bool_]
    stored: npt.NDArray[np.int32]


@dataclass(frozen=True)
class StreamEnded:
    """All tiles have come, or the error that ended the stream before."""

    usage: Usage
    error: ErrorReply | None


Request = SurveyRequest | ReadRequest | StreamRequest | Grant | ReleaseRequest
Reply = SurveyReply | NotFastReply | npt.NDArray[np.bool_] | Filled | StreamEnded | ErrorReply | None


class _Worker:
    def __init__(self, arena: mmap.mmap, connection: Connection, threads: int) -> None:
        self._arena = arena
        self._connection = connection
        self._threads = threads
        self._source: Path | ShardSlide | None = None
        self._slide: SlideReader | None = None
        self._remote: RemoteSlide | None = None
        self._room: queue.Queue[U8] = queue.Queue()
        self._offsets: dict[int, int] = {}
        self._px = 0

    def handle(self, request: Request) -> None:
        """Grants come while a stream runs; every other request is answered before the next one comes."""
        if isinstance(request, Grant):
            tiles = self._tiles(request.offset, request.count, self._px)
            self._offsets[id(tiles)] = request.offset
            self._room.put(tiles)
        elif isinstance(request, StreamRequest):
            self._room, self._offsets, self._px = queue.Queue(), {}, request.geometry.px
            threading.Thread(target=self._stream, args=(request,), name="stream").start()
        else:
            self._connection.send(self._answer(request))

    def _answer(self, request: SurveyRequest | ReadRequest | ReleaseRequest) -> Reply:
        try:
            if isinstance(request, ReleaseRequest):
                self._release()
                return None
            if isinstance(request, SurveyRequest):
                if isinstance(request.slide, Path):
                    return SurveyReply(survey(self._open(request.slide), request), Usage(), [])
                remote = self._open_remote(request.slide)
                found = survey(remote.reader, request)
                return SurveyReply(found, remote.usage(), remote.reader.strips(found.geometry, found.positions))
            slide = self._open(request.path)
            geometry = request.geometry
            if request.level_size is not None:
                sizes = [(level.width, level.height) for level in slide.levels]
                if request.level_size not in sizes:
                    return np.zeros(len(request.positions), np.bool_)
                geometry = replace(geometry, level=sizes.index(request.level_size))
            return slide.read_tiles(
                geometry, request.positions, self._tiles(request.offset, len(request.positions), geometry.px)
            )
        except NotFast as reason:
            return NotFastReply(str(reason))
        except Exception as error:
            return self._error(error)

    def _tiles(self, offset: int, count: int, px: int) -> U8:
        return np.frombuffer(self._arena, np.uint8, count * px * px * 3, offset).reshape(count, px, px, 3)

    def _stream(self, request: StreamRequest) -> None:
        usage, error = Usage(), None
        try:
            assert self._remote is not None
            batches = self._remote.reader.read_batches(
                request.geometry, request.positions, request.batch, self._room, request.first, request.form
            )
            for batch in batches:
                readable, again = np.ones(len(batch.indices), np.bool_), np.zeros(len(batch.indices), np.bool_)
                for place, unread in batch.unread.items():
                    readable[place], again[place] = False, unread.retry
                offset = self._offsets.pop(id(batch.buffer))
                self._connection.send(Filled(offset, batch.indices, readable, again, batch.stored))
            usage = self._remote.usage()
        except Exception as reason:
            error = self._error(reason)
        with suppress(OSError):  # the parent has gone; so does this process
            self._connection.send(StreamEnded(usage, error))

    def _open(self, path: Path) -> SlideReader:
        if self._slide is None or self._source != path:
            self._release()
            self._source = path
            self._slide = open_slide(path)
        return self._slide

    def _open_remote(self, slide: ShardSlide) -> RemoteSlide:
        self._release()
        self._source = slide
        self._remote = RemoteSlide(slide, self._threads)
        return self._remote

    def _release(self) -> None:
        for slide in (self._slide, self._remote):
            if slide is not None:
                slide.close()
        self._slide = self._remote = self._source = None

    def _error(self, error: Exception) -> ErrorReply:
        if isinstance(error, SlidewayError):
            return ErrorReply(error.name, self._without_paths(str(error)))
        return ErrorReply(InternalError.__name__, self._without_paths(f"{type(error).__name__}: {error}"))

    def _without_paths(self, message: str) -> str:
        """File names can hold what a lab writes on its slides."""
        if isinstance(self._source, Path):
            return message.replace(str(self._source), "the slide").replace(str(self._source.parent), "")
        for file in self._source.files if self._source else ():
            message = message.replace(file.key, "the slide")
        return message


def main(connection_fd: int, arena_fd: int, threads: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the parent decides, and ends this process by closing the connection
    hand_over_quickly()
    spare_the_collector()
    connection = Connection(connection_fd)
    worker = _Worker(mmap.mmap(arena_fd, os.fstat(arena_fd).st_size), connection, threads)
    while True:
        try:
            worker.handle(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # a stream that waits for room would keep it alive


NURSERY_REQUEST = struct.Struct("i")
"""A number of threads, with the descriptors of connection and arena: fork a reader. Less than 0: the process of
this id, negated, is to end."""
NURSERY_REPLY = struct.Struct("?i")
"""Whether there is an answer, and it: the id of the new process, or the exit code of the one that has ended."""


def nursery(door_fd: int) -> None:
    """Forks reader processes and ends them, as it is asked by the door; ends when that is closed. It has no thread
    but this, so that what it forks is whole."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    spare_the_collector()
    with socket.socket(fileno=door_fd) as door:
        while True:
            message, descriptors, _, _ = socket.recv_fds(door, NURSERY_REQUEST.size, 2)
            if not message:
                return
            (number,) = NURSERY_REQUEST.unpack(message)
            try:
                answer = _fork(door, descriptors, number) if number >= 0 else _end(-number)
            except OSError:
                door.send(NURSERY_REPLY.pack(False, 0))
            else:
                door.send(NURSERY_REPLY.pack(True, answer))


def _fork(door: socket.socket, descriptors: Sequence[int], threads: int) -> int:
    try:
        pid = os.fork()
        if pid == 0:
            try:
                door.close()
                connection, arena = descriptors
                main(connection, arena, threads)
            finally:
                os._exit(1)
        return pid
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _end(pid: int) -> int:
    """Raises ChildProcessError for a process that is not this one's."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended == 0:
        os.kill(pid, signal.SIGKILL)  # does nothing to one that is crashing
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)
