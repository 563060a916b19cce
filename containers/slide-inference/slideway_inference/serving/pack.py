"""Packs, the unit that Batch Transform gets: a tar file with one encoded tile a member. Plain ustar is read here,
because Python's tarfile takes several times as long and holds the interpreter's lock meanwhile."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator

from slideway_inference.errors import PackInvalid

_BLOCK = 512
_EMPTY = bytes(_BLOCK)
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
"""A number of a header. Python's own int() would take -1000 too, and a pack would have no end."""

Member = tuple[str, memoryview]
"""A tile's name without its extension, and its bytes, which are not copied."""


def read_pack(body: memoryview) -> list[Member]:
    """The members in their order. Raises PackInvalid."""
    members: list[Member] = []
    at, size = 0, len(body)
    while True:
        header = bytes(body[at : at + _BLOCK])
        if len(header) < _BLOCK:
            raise PackInvalid("The pack ends early." if at else "The pack is no tar file.")
        if header == _EMPTY:
            return members
        if not _sound(header):
            raise PackInvalid(f"The pack is damaged at byte {at}." if at else "The pack is no tar file.")
        kind = header[156:157]
        if kind == b"5":
            at += _BLOCK
            continue
        if kind not in (b"0", b"\0") or header[124] & 0x80:
            return _by_tarfile(body)  # long names and the like, which other tools write
        length = _number(header[124:136])
        if length is None:
            raise PackInvalid(f"The pack is damaged at byte {at}.")
        start, at = at + _BLOCK, at + _BLOCK + -(-length // _BLOCK) * _BLOCK
        if at > size:
            raise PackInvalid("The pack ends early.")
        name = header[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
        members.append((tile_name(name), body[start : start + length]))


def tile_name(path: str) -> str:
    return path.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _number(field: bytes) -> int | None:
    found = _OCTAL.fullmatch(field)
    return int(found[1] or b"0", 8) if found else None


def _sound(header: bytes) -> bool:
    return sum(header) - sum(header[148:156]) + 8 * 0x20 == _number(header[148:156])


def _by_tarfile(body: memoryview) -> list[Member]:
    try:
        with tarfile.open(fileobj=io.BytesIO(body), mode="r:") as tar:
            found = [member for member in _forward(tar) if member.isfile()]
    except (tarfile.TarError, EOFError, ValueError, OSError, OverflowError, RecursionError) as error:
        raise PackInvalid(f"The pack cannot be read: {str(error)[:200]}") from error
    if any(member.size < 0 or member.offset_data + member.size > len(body) for member in found):
        raise PackInvalid("The pack ends early.")
    return [
        (tile_name(member.name), body[member.offset_data : member.offset_data + member.size]) for member in found
    ]


def _forward(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members, as long as each lies behind the one before: tarfile follows a negative size backwards, for
    ever. Raises PackInvalid."""
    at = -1
    for member in tar:
        if tar.offset <= at:
            raise PackInvalid("The pack is damaged: a member's size is negative.")
        at = tar.offset
        if member.issparse():
            raise PackInvalid("The pack holds a sparse file: pack tiles as plain files.")
        yield member
