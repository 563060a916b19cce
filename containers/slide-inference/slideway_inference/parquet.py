"""Writes tiles.parquet. With pyarrow the columns are compressed; without it (plain Debian packages) a small writer
makes the same table as uncompressed, PLAIN-encoded Parquet. Neither puts in a time, so equal tables give equal
bytes with the same writer. What the small writer made can be read back here without pyarrow too."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.int32] | npt.NDArray[np.int64] | npt.NDArray[np.float32] | Sequence[str]

_PAGE_ROWS = 1 << 20
_GROUP_BYTES = 16 << 20
"""Of a row group with pyarrow, at most: so much is copied at once."""
_TEXT_BYTES = 8
"""What a text counts for."""
_INT32, _INT64, _FLOAT, _BYTE_ARRAY = 1, 2, 4, 6
_KINDS: dict[np.dtype[Any], int] = {
    np.dtype(np.int32): _INT32,
    np.dtype(np.int64): _INT64,
    np.dtype(np.float32): _FLOAT,
}


def write_parquet(columns: Mapping[str, Column], metadata: Mapping[str, str]) -> bytes:
    """A table of required columns (int32, int64, float32 or strings), in order, with file metadata."""
    try:
        import pyarrow
    except ImportError:
        return write_plain(columns, metadata)
    from pyarrow import parquet

    types = {
        np.dtype(np.int32): pyarrow.int32(),
        np.dtype(np.int64): pyarrow.int64(),
        np.dtype(np.float32): pyarrow.float32(),
    }
    kinds = {
        name: types[column.dtype] if isinstance(column, np.ndarray) else pyarrow.string()
        for name, column in columns.items()
    }
    fields = [pyarrow.field(name, kind, nullable=False) for name, kind in kinds.items()]
    schema = pyarrow.schema(fields, metadata=dict(sorted(metadata.items())))
    target = io.BytesIO()
    # A dictionary of floats holds nearly every one of them, and each row its place in it besides.
    words = [name for name, column in columns.items() if not isinstance(column, np.ndarray)]
    rows = len(next(iter(columns.values())))
    step = _rows_of_a_group(columns)
    with parquet.ParquetWriter(target, schema, compression="zstd", use_dictionary=words) as writer:
        for first in range(0, max(rows, 1), step):
            arrays = [pyarrow.array(column[first : first + step], kinds[name]) for name, column in columns.items()]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
    return target.getvalue()


def _rows_of_a_group(columns: Mapping[str, Column]) -> int:
    width = sum(
        column.dtype.itemsize if isinstance(column, np.ndarray) else _TEXT_BYTES for column in columns.values()
    )
    return max(1, min(_PAGE_ROWS, _GROUP_BYTES // width))


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
    out += footer + struct.pack("<I", len(footer)) + b"PAR1"
    return bytes(out)


def _kind(column: Column) -> int:
    if not isinstance(column, np.ndarray):
        return _BYTE_ARRAY
    return _KINDS[column.dtype]


def _plain(column: Column) -> bytes:
    if isinstance(column, np.ndarray):
        return column.astype(column.dtype.newbyteorder("<")).tobytes()
    encoded = [text.encode() for text in column]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)


def read_plain(data: bytes) -> dict[str, Column]:
    """The columns of what `write_plain` made. Raises ValueError for anything else."""
    if len(data) < 12 or data[:4] != b"PAR1" or data[-4:] != b"PAR1":
        raise ValueError("it is no Parquet")
    (size,) = struct.unpack("<I", data[-8:-4])
    try:
        footer = _Thrift(data, len(data) - 8 - size).struct()
        if footer[6] != b"slideway":
            raise ValueError("another writer made it")
        columns: dict[str, Column] = {}
        for chunk in footer[4][0][1]:
            details = chunk[3]
            columns[details[3][0].decode()] = _read_column(data, details[1], details[9], details[5])
    except (KeyError, IndexError, TypeError, struct.error) as error:
        raise ValueError("its footer is damaged") from error
    return columns


def _read_column(data: bytes, kind: int, at: int, rows: int) -> Column:
    pages = []
    for _ in range(0, max(rows, 1), _PAGE_ROWS):
        page = _Thrift(data, at)
        head = page.struct()
        at = page.at + head[2]
        pages.append(data[page.at : at])
    body = b"".join(pages)
    if kind == _BYTE_ARRAY:
        texts, start = [], 0
        while start < len(body):
            (length,) = struct.unpack_from("<I", body, start)
            texts.append(body[start + 4 : start + 4 + length].decode())
            start += 4 + length
        column: Column = texts
    else:
        dtype = next(dtype for dtype, found in _KINDS.items() if found == kind)
        column = np.frombuffer(body, dtype.newbyteorder("<")).astype(dtype)
    if len(column) != rows:
        raise ValueError("a column has another length than the table")
    return column


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


class _Thrift:
    """Reads a struct as {field: value}, with lists, numbers, bytes and structs in it."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self.at = at

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        last = 0
        while head := self._data[self.at]:
            self.at += 1
            last += head >> 4
            fields[last] = self._value(head & 15)
        self.at += 1
        return fields

    def _value(self, kind: int) -> Any:  # noqa: ANN401
        if kind in (5, 6):
            number = self._varint()
            return number >> 1 ^ -(number & 1)
        if kind == 8:
            length = self._varint()
            self.at += length
            return self._data[self.at - length : self.at]
        if kind == 9:
            head = self._data[self.at]
            self.at += 1
            count = self._varint() if head >> 4 == 15 else head >> 4
            return [self._value(head & 15) for _ in range(count)]
        if kind == 12:
            return self.struct()
        raise ValueError(f"its footer has a field of type {kind}")

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
