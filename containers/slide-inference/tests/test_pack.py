"""Reading packs: whatever is sent, its members are read or it is refused, and soon."""

from __future__ import annotations

import io
import signal
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from slideway_inference.errors import PackInvalid
from slideway_inference.packs import header
from slideway_inference.serving.pack import read_pack

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """A loop without end fails its test, and no other."""

    def late(*_: object) -> None:
        raise AssertionError(f"It takes longer than {seconds} s.")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pack(members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytearray:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return bytearray(out.getvalue())


def sealed(block: bytearray) -> bytes:
    """With a checksum that is right for what the header says."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def stating(size: bytes, kind: bytes = b"0") -> bytes:
    """A pack whose second member states a size as it likes."""
    crafted = bytearray(header("1_0.jpg", 0))
    crafted[124:136] = size.ljust(12, b"\0")
    crafted[156:157] = kind
    return header("0_0.jpg", 3) + b"abc".ljust(512, b"\0") + sealed(crafted) + bytes(2048)


@pytest.mark.parametrize("size", [b"-1000", b"-1", b"+10", b"1_0", b"0o10", b"8", b"1 1", b"1\x001", b"\xff" * 11])
def test_a_size_that_is_no_octal_number_is_damage(size: bytes) -> None:
    with at_most(10), pytest.raises(PackInvalid):
        read_pack(memoryview(stating(size)))


@pytest.mark.parametrize("kind", [b"0", b"7", b"L", b"x", b"S"])
@pytest.mark.parametrize("size", [b"-1000", b"\xff" * 12, b"\xff" * 11 + b"\x10", b"\x80" + b"\x7f" * 11])
def test_sizes_below_nothing_or_beyond_all_are_refused_in_every_kind_of_member(kind: bytes, size: bytes) -> None:
    with at_most(10), pytest.raises(PackInvalid):
        read_pack(memoryview(stating(size, kind)))


@pytest.mark.parametrize("field", [b"       17 \0", b"00000000017\0", b"00000000017 ", b"17\0"])
def test_octal_sizes_are_read_however_they_are_padded(field: bytes) -> None:
    block = bytearray(header("5_6.jpg", 0))
    block[124:136] = field.ljust(12, b"\0")[:12]
    data = b"fifteen bytes.."
    whole = sealed(block) + data.ljust(512, b"\0") + bytes(1024)
    assert [(name, bytes(tile)) for name, tile in read_pack(memoryview(whole))] == [("5_6", data)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("long", [False, True])
def test_damaged_packs_are_read_or_refused_and_never_more(form: int, long: bool) -> None:
    rng = np.random.default_rng([form, long])
    folder = "folder/" * 20 if long and form != tarfile.USTAR_FORMAT else ""
    members = {f"{folder}{n}_{n * 256}.jpg": rng.bytes(int(rng.integers(0, 1500))) for n in range(4)}
    whole = pack(members, form)
    assert [bytes(tile) for _, tile in read_pack(memoryview(whole))] == list(members.values())
    heads = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    for _ in range(400):
        spoiled = bytearray(whole)
        at = int(rng.choice(heads))
        field = slice(at + 124, at + 136) if rng.random() < 0.5 else slice(at, at + 512)
        for place in rng.integers(field.start, field.stop, int(rng.integers(1, 4))):
            spoiled[place] = int(rng.choice([*b"-+ 0178_\0\x80\xff", int(rng.integers(256))]))
        spoiled[at : at + 512] = sealed(spoiled[at : at + 512])
        if rng.random() < 0.2:
            del spoiled[int(rng.integers(len(spoiled))) :]
        with at_most(10):
            try:
                found = read_pack(memoryview(spoiled))
            except PackInvalid:
                continue
        assert sum(len(tile) for _, tile in found) <= len(spoiled)


def test_headers_within_headers_are_refused_and_do_not_exhaust_the_interpreter() -> None:
    block = bytearray(header("long", 0))
    block[156:157] = b"L"
    with at_most(20), pytest.raises(PackInvalid):
        read_pack(memoryview(sealed(block) * 20_000 + bytes(1024)))
