"""Both writers make the same table."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest

from slideway_inference.parquet import Column, read_plain, write_parquet, write_plain


def table(rows: int) -> dict[str, Column]:
    return {
        "minx": np.arange(rows, dtype=np.int32) - 5,
        "offset": np.arange(rows, dtype=np.int64) * 10_000_000_000,
        "value_a": np.where(np.arange(rows) % 7 == 3, np.nan, np.arange(rows) / 3).astype(np.float32),
        "status": ["ok" if row % 3 else "unreadable" for row in range(rows)],
    }


@pytest.mark.parametrize("rows", [0, 1, 17, (1 << 20) + 5])
def test_the_plain_writer_is_read_like_pyarrows(rows: int) -> None:
    metadata = {"slideId": "ä", "codeVersion": "1", "parameters": '{"a":1}'}
    plain = pq.read_table(io.BytesIO(write_plain(table(rows), metadata)))
    compressed = pq.read_table(io.BytesIO(write_parquet(table(rows), metadata)))
    assert plain.schema.equals(compressed.schema)
    for name in plain.column_names:
        np.testing.assert_array_equal(plain[name].to_numpy(), compressed[name].to_numpy())
    for table_read in (plain, compressed):
        assert {key.decode(): value.decode() for key, value in table_read.schema.metadata.items()} == metadata


@pytest.mark.parametrize("rows", [0, 1, 17, (1 << 20) + 5])
def test_what_the_plain_writer_made_is_read_back(rows: int) -> None:
    wanted = table(rows)
    found = read_plain(write_plain(wanted, {"slideId": "ä"}))
    assert list(found) == list(wanted)
    for name, column in wanted.items():
        np.testing.assert_array_equal(found[name], column)
        if isinstance(column, np.ndarray):
            assert np.asarray(found[name]).dtype == column.dtype


def test_other_parquet_is_refused_by_the_plain_reader() -> None:
    plain = write_plain(table(9), {})
    for data in (b"", b"{}", plain[:50], plain[:-8] + b"\xff\xff\xff\xffPAR1", write_parquet(table(9), {})):
        with pytest.raises(ValueError, match=r"."):
            read_plain(data)


def test_equal_tables_give_equal_bytes() -> None:
    for write in (write_plain, write_parquet):
        assert write(table(100), {"b": "2", "a": "1"}) == write(table(100), {"a": "1", "b": "2"})


def test_wide_tables_are_written_in_groups_of_rows_from_columns_that_lie_across() -> None:
    values = np.random.default_rng(0).standard_normal((9000, 1024), np.float32)
    columns: dict[str, Column] = {"status": ["ok"] * 9000}
    columns |= {f"value_f{index:04}": values[:, index] for index in range(1024)}
    file = pq.ParquetFile(io.BytesIO(write_parquet(columns, {})))
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [4088, 4088, 824]
    read = file.read()
    assert np.array_equal(np.stack([read[name].to_numpy() for name in list(columns)[1:]], 1), values)
    assert read["status"].to_pylist() == columns["status"]


def test_more_than_fifteen_columns_fit() -> None:
    columns: dict[str, Column] = {f"value_{index}": np.full(3, index, np.float32) for index in range(40)}
    assert pq.read_table(io.BytesIO(write_plain(columns, {}))).num_columns == 40
