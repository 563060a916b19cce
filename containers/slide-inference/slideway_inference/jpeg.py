"""The few facts of a JPEG stream that say which colours it holds, whatever the file around it claims."""

from __future__ import annotations


def segments(data: bytes) -> list[tuple[int, bytes]]:
    """Marker and body of each segment before the scan."""
    found, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((data[at + 1], data[at + 4 : at + 2 + size]))
        at += 2 + size
    return found


def subsampled(data: bytes) -> bool:
    """Whether its components differ in sampling. Only YCbCr is made so: such a stream is not RGB."""
    frames = [body for marker, body in segments(data) if 0xC0 <= marker <= 0xC2 and len(body) >= 15]
    return any(len({body[7], body[10], body[13]}) > 1 for body in frames)
