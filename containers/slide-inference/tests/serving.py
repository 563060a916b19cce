"""A real `serve` process for tests, packs to send to it, and what it answers."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from slideway_inference.model.package import unpack

CONTAINER = Path(__file__).resolve().parents[1]


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:  # noqa: ANN401
        return json.loads(self.body)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.body.splitlines()]

    @property
    def values(self) -> np.ndarray:
        return np.array([line["values"] for line in self.lines], np.float32)


class Served:
    """`serve` with a package, on a port of its own."""

    def __init__(self, root: Path, package: bytes, **environment: str) -> None:
        root.mkdir(parents=True, exist_ok=True)
        (root / "model.tar.gz").write_bytes(package)
        unpack(root / "model.tar.gz", root / "model")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "slideway_inference", "serve"],
            cwd=CONTAINER,
            env={
                **os.environ,
                "SLIDEWAY_ML_ROOT": str(root),
                "SLIDEWAY_BIND_HOST": "127.0.0.1",
                "SAGEMAKER_BIND_TO_PORT": str(self.port),
                "PYTHONWARNINGS": "ignore",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.events: list[dict[str, Any]] = []
        self.stderr = ""
        self._threads = [threading.Thread(target=self._hear), threading.Thread(target=self._hear_errors)]
        for thread in self._threads:
            thread.start()

    def _hear(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def _hear_errors(self) -> None:
        assert self.process.stderr is not None
        self.stderr = self.process.stderr.read()

    def ready(self) -> Served:
        until = time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if self.ask("GET", "/ping").status == 200:
                    return self
            except OSError:
                time.sleep(0.05)
        raise AssertionError(f"serve is not ready: {self.stderr}")

    def ask(
        self, method: str, path: str, body: bytes = b"", media_type: str = "", timeout: float = 60, **headers: str
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(
                method, path, body or None, {**({"Content-Type": media_type} if media_type else {}), **headers}
            )
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())
        finally:
            connection.close()

    def invoke(self, body: bytes, media_type: str = "application/x-tar", **more: Any) -> Answer:  # noqa: ANN401
        return self.ask("POST", "/invocations", body, media_type, **more)

    def worker(self) -> int:
        """The process that serves."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(child)

    def named(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in list(self.events) if entry["event"] == event]

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(90)
        for thread in self._threads:
            thread.join(10)
        return code


def flat(px: int, values: list[int]) -> list[np.ndarray]:
    """Tiles of one grey each."""
    return [np.full((px, px, 3), value, np.uint8) for value in values]


def jpeg(tile: np.ndarray) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(tile), 90, "RGB", "444"))


def npy(tile: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, tile)
    return out.getvalue()


def pack(files: Mapping[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def pack_of(tiles: list[np.ndarray]) -> bytes:
    """Plain pixels, named 0_0, 64_0, …"""
    return pack({f"{index * 64}_0.npy": npy(tile) for index, tile in enumerate(tiles)})
