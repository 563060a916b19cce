"""Writes tiles.parquet. With pyarrow the columns are compressed; without it (plain Debian packages) a small writer
makes the same table as uncompressed, PLAIN-encoded Parquet. Neither puts in a time, so equal tables give equal
bytes with the same writer."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.int32] | npt.NDArray[np.float32] | Sequence[str]

_PAGE_ROWS = 1 << 20
_INT32, _FLOAT, _BYTE_ARRAY = 1, 4, 6


def write_parquet(columns: Mapping[str, Column], metadata: Mapping[str, str]) -> bytes:
    """A table of required columns (int32, float32 or strings), in order, with file metadata."""
    try:
        import pyarrow
    except ImportError:
        return write_plain(columns, metadata)
    from pyarrow import parquet

    types = {np.dtype(np.int32): pyarrow.int32(), np.dtype(np.float32): pyarrow.float32()}
    fields, arrays = [], []
    for name, column in columns.items():
        kind = types[column.dtype] if isinstance(column, np.ndarray) else pyarrow.string()
        fields.append(pyarrow.field(name, kind, nullable=False))
        arrays.append(pyarrow.array(column, kind))
    schema = pyarrow.schema(fields, metadata=dict(sorted(metadata.items())))
    target = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), target, compression="zstd")
    return target.getvalue()


def write_plain(columns: Mapping[str, Column], metadata: Mapping[str, str]) -> bytes:
    """The same without pyarrow: one row group, one page per million rows, no compression."""
    out = bytearray(b"PAR1")
    rows = len(next(iter(columns.values())))
    schema = [_struct((4, "schema"), (5, _i32(len(columns))))]
    chunks = []
    for name, column in columns.items():
        kind = _kind(column)
        text: list[_Field] = [(6, _i32(0))] if kind == _BYTE_ARRAY else []
        schema.append(_struct((1, _i32(kind)), (3, _i32(0)), (4, name), *text))
        start = len(out)
        for first in range(0, max(rows, 1), _PAGE_ROWS):
            part = column[first : first + _PAGE_ROWS]
            data = _plain(part)
            page = _struct((1, _i32(len(part))), (2, _i32(0)), (3, _i32(3)), (4, _i32(3)))
            out += _struct((1, _i32(0)), (2, _i32(len(data))), (3, _i32(len(data))), (5, page))
            out += data
        size = len(out) - start
        details = _struct(
            (1, _i32(kind)),
            (2, _list(5, [_zigzag(0)])),
            (3, _list(8, [_string(name)])),
            (4, _i32(0)),
            (5, _i64(rows)),
            (6, _i64(size)),
            (7, _i64(size)),
            (9, _i64(start)),
        )
        chunks.append((_struct((2, _i64(start)), (3, details)), size))
    group = _struct(
        (1, _list(12, [chunk for chunk, _ in chunks])),
        (2, _i64(sum(size for _, size in chunks))),
        (3, _i64(rows)),
    )
    pairs = [_struct((1, key), (2, value)) for key, value in sorted(metadata.items())]
    footer = _struct(
        (1, _i32(1)),
        (2, _list(12, schema)),
        (3, _i64(rows)),
        (4, _list(12, [group])),
        (5, _list(12, pairs)),
        (6, "slideway"),
    )
    return bytes(out + footer + struct.pack("<I", len(footer)) + b"PAR1")


def _kind(column: Column) -> int:
    if not isinstance(column, np.ndarray):
        return _BYTE_ARRAY
    return {np.dtype(np.int32): _INT32, np.dtype(np.float32): _FLOAT}[column.dtype]


def _plain(column: Column) -> bytes:
    if isinstance(column, np.ndarray):
        return column.astype(column.dtype.newbyteorder("<")).tobytes()
    encoded = [text.encode() for text in column]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)


# Thrift's compact protocol, as far as Parquet's footer needs it. A field is (id, value): text, or (type, bytes).

_Typed = tuple[int, bytes]
_Field = tuple[int, str | bytes | _Typed]


def _struct(*fields: _Field) -> bytes:
    """Bytes alone are a nested struct."""
    out, last = bytearray(), 0
    for identifier, value in fields:
        if isinstance(value, str):
            kind, data = 8, _string(value)
        elif isinstance(value, bytes):
            kind, data = 12, value
        else:
            kind, data = value
        out.append((identifier - last) << 4 | kind)
        out += data
        last = identifier
    return bytes(out) + b"\0"


def _list(kind: int, items: Sequence[bytes]) -> _Typed:
    head = bytes([len(items) << 4 | kind]) if len(items) < 15 else bytes([0xF0 | kind]) + _varint(len(items))
    return 9, head + b"".join(items)


def _i32(value: int) -> _Typed:
    return 5, _zigzag(value)


def _i64(value: int) -> _Typed:
    return 6, _zigzag(value)


def _string(text: str) -> bytes:
    data = text.encode()
    return _varint(len(data)) + data


def _zigzag(value: int) -> bytes:
    return _varint(value << 1 if value >= 0 else (-value << 1) - 1)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
