"""Packs, the unit that Batch Transform gets: a tar file with one encoded tile a member. Plain ustar is read here,
because Python's tarfile takes several times as long and holds the interpreter's lock meanwhile."""

from __future__ import annotations

import io
import tarfile

from slideway_inference.errors import PackInvalid

_BLOCK = 512
_EMPTY = bytes(_BLOCK)

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
        try:
            length = int(header[124:136].rstrip(b" \0") or b"0", 8)
        except ValueError as error:
            raise PackInvalid(f"The pack is damaged at byte {at}.") from error
        start, at = at + _BLOCK, at + _BLOCK + -(-length // _BLOCK) * _BLOCK
        if at > size:
            raise PackInvalid("The pack ends early.")
        name = header[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
        members.append((tile_name(name), body[start : start + length]))


def tile_name(path: str) -> str:
    return path.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _sound(header: bytes) -> bool:
    try:
        stated = int(header[148:156].split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return False
    return sum(header) - sum(header[148:156]) + 8 * 0x20 == stated


def _by_tarfile(body: memoryview) -> list[Member]:
    try:
        with tarfile.open(fileobj=io.BytesIO(body), mode="r:") as tar:
            found = [member for member in tar if member.isfile()]
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        raise PackInvalid(f"The pack cannot be read: {error}") from error
    if any(member.offset_data + member.size > len(body) for member in found):
        raise PackInvalid("The pack ends early.")
    return [
        (tile_name(member.name), body[member.offset_data : member.offset_data + member.size]) for member in found
    ]
