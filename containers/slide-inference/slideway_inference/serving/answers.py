"""What requests hold and what they are answered with: packs and JSON Lines, single images, JSON."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from slideway_inference.errors import (
    MediaTypeNotSupported,
    ModelError,
    RequestInvalid,
    RequestRefused,
    SlidewayError,
)
from slideway_inference.serving.batcher import Request
from slideway_inference.serving.pack import Member, read_pack

try:
    _orjson: Any = import_module("orjson")
except ImportError:  # Python's own is slower by far, which only an embedding's many numbers show
    _orjson = None

_PIECE = 1 << 20


class TileRefused(RequestRefused):
    """An image that was asked for alone has no answer; named as its reason is."""

    def __init__(self, reason: SlidewayError) -> None:
        super().__init__(str(reason))
        self._name = reason.name
        self.status = 500 if isinstance(reason, ModelError) else 400

    @property
    def name(self) -> str:
        return self._name


def members(media_type: str, body: memoryview) -> list[Member]:
    """The tiles of a request. Raises RequestRefused."""
    if media_type in ("application/x-tar", "application/tar"):
        return read_pack(body)
    if media_type in ("image/jpeg", "image/png"):
        return [("image", body)]
    if media_type == "application/json":
        return _instances(body)
    raise MediaTypeNotSupported(
        "Content-Type must be application/x-tar, image/jpeg, image/png or application/json."
    )


def _instances(body: memoryview) -> list[Member]:
    try:
        document = json.loads(bytes(body))
        return [
            (str(index), memoryview(base64.b64decode(instance["b64"], validate=True)))
            for index, instance in enumerate(document["instances"])
        ]
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise RequestInvalid('The JSON must be {"instances": [{"b64": "<image>"}, …]}.') from error


def answer(
    media_type: str, names: Sequence[str], request: Request, outputs: Sequence[str]
) -> tuple[str, list[bytes]]:
    """Media type and body, in pieces. Raises TileRefused."""
    if media_type in ("application/x-tar", "application/tar"):
        return "application/jsonlines", list(_pieces(_lines(names, request)))
    if request.errors:
        index = min(request.errors)
        if len(names) == 1:
            raise TileRefused(request.errors[index])
        raise TileRefused(type(request.errors[index])(f"Instance {index}: {request.errors[index]}"))
    if media_type == "application/json":
        document: dict[str, Any] = {"predictions": list(request.values)}
    else:
        document = {"values": request.values[0], "outputs": list(outputs)}
    return "application/json", [to_json(document)]


def _lines(names: Sequence[str], request: Request) -> Iterator[bytes]:
    for index, name in enumerate(names):
        error = request.errors.get(index)
        if error is None:
            yield to_json({"tile": name, "values": request.values[index]})
        else:
            yield to_json({"tile": name, "error": {"error": error.name, "message": str(error)}})


def _pieces(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Lines joined, so that few large pieces are sent."""
    piece = bytearray()
    for line in lines:
        piece += line
        if len(piece) >= _PIECE:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece)


def _to_json_slowly(document: object) -> bytes:
    def numbers(array: npt.NDArray[np.float32]) -> list[float]:
        return [float(value) for value in array]  # exact, hence the same float32 when read back

    return json.dumps(document, default=numbers, separators=(",", ":")).encode() + b"\n"


def _to_json_quickly(document: object) -> bytes:
    """The shortest decimals that are read back as the same float32."""
    made: bytes = _orjson.dumps(document, option=_orjson.OPT_SERIALIZE_NUMPY | _orjson.OPT_APPEND_NEWLINE)
    return made


to_json: Callable[[object], bytes] = _to_json_slowly if _orjson is None else _to_json_quickly
