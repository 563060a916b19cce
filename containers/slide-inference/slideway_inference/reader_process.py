"""The process that reads slides; reading.py starts it with `main(connection, arena)`.

Native image libraries crash and hang on damaged files. Reading in processes of their own keeps that to one slide:
the parent sees the process end and goes on. Such a process holds one slide at a time, imports no PyTorch, writes
tiles straight into the arena it shares with its parent, and ends when its parent does."""

from __future__ import annotations

import mmap
import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slideway_inference.errors import InternalError, SlidewayError
from slideway_inference.grid import TileGeometry
from slideway_inference.reader import SlideReader, open_slide
from slideway_inference.survey import Survey, SurveyRequest, survey


@dataclass(frozen=True)
class ReadRequest:
    """Tiles to read into the arena from byte `offset` on, as (n, px, px, 3) uint8."""

    path: Path
    geometry: TileGeometry
    positions: npt.NDArray[np.int32]
    offset: int


@dataclass(frozen=True)
class ReleaseRequest:
    """Close the slide, so that its space on disk is given back."""


@dataclass(frozen=True)
class ErrorReply:
    name: str
    message: str


Request = SurveyRequest | ReadRequest | ReleaseRequest
Reply = Survey | npt.NDArray[np.bool_] | ErrorReply | None


class _Worker:
    def __init__(self, arena: mmap.mmap) -> None:
        self._arena = arena
        self._path: Path | None = None
        self._slide: SlideReader | None = None

    def answer(self, request: Request) -> Reply:
        try:
            if isinstance(request, ReleaseRequest):
                self._release()
                return None
            slide = self._open(request.path)
            if isinstance(request, SurveyRequest):
                return survey(slide, request)
            px = request.geometry.px
            shape = (len(request.positions), px, px, 3)
            out = np.frombuffer(self._arena, np.uint8, shape[0] * px * px * 3, request.offset).reshape(shape)
            return slide.read_tiles(request.geometry, request.positions, out)
        except SlidewayError as error:
            return ErrorReply(error.name, self._without_paths(str(error)))
        except Exception as error:
            return ErrorReply(InternalError.__name__, self._without_paths(f"{type(error).__name__}: {error}"))

    def _open(self, path: Path) -> SlideReader:
        if self._slide is None or self._path != path:
            self._release()
            self._path = path
            self._slide = open_slide(path)
        return self._slide

    def _release(self) -> None:
        if self._slide is not None:
            self._slide.close()
        self._slide = self._path = None

    def _without_paths(self, message: str) -> str:
        """File names can hold what a lab writes on its slides."""
        if self._path is None:
            return message
        return message.replace(str(self._path), "the slide").replace(str(self._path.parent), "")


def main(connection_fd: int, arena_fd: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the parent decides, and ends this process by closing the connection
    connection = Connection(connection_fd)
    worker = _Worker(mmap.mmap(arena_fd, os.fstat(arena_fd).st_size))
    while True:
        try:
            request: Request = connection.recv()
            connection.send(worker.answer(request))
        except (EOFError, OSError):
            return
