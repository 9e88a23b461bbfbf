"""Rows of a table, Parquet or JSON lines, on any file system, from any place in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow.fs import FileSystem

from qwen2vl_trt.errors import BatchError, MediaError
from qwen2vl_trt.runtime.features.shards import as_unicode

JSON_LINES = (".jsonl", ".ndjson")
TABLES = (".parquet", *JSON_LINES)
_NATIVE = ("s3", "gs", "gcs")
"""File systems of pyarrow's own wheels: no further package, credentials from the environment."""
_READ_ROWS = 64
"""Rows in memory at a time: with the bytes of photographs in a column, some hundred megabytes."""


@dataclass(frozen=True)
class Columns:
    """The columns that a run reads; None for one that the tables do not have."""

    image: str
    prompt: str | None
    id: str | None

    @property
    def names(self) -> list[str]:
        return [name for name in (self.image, self.prompt, self.id) if name is not None]


@dataclass(frozen=True)
class Partition:
    """The unit of work, of retries and of output: neighbouring rows of one table.

    Attributes:
        number: from 0; the output has it in its name.
        path: the table, a path or URI.
        name: the table in the ids of its rows.
        first_row: in the table.
        rows: how many.
        offset: of JSON lines, the byte at which the first row begins.
        size: of the table in bytes when it was divided.
    """

    number: int
    path: str
    name: str
    first_row: int
    rows: int
    offset: int
    size: int


@dataclass(frozen=True)
class Row:
    """One row of the input: its image is a path, a URI or the bytes of a file, ``fault`` what is wrong with the row."""

    id: str
    image: str | bytes | None = None
    prompt: str | None = None
    fault: str | None = None


def read_rows(partition: Partition, columns: Columns) -> Iterator[Row]:
    """The rows of a partition in order, a few in memory at a time.

    Raises:
        BatchError: the table cannot be read, or has fewer rows than when it was divided.
    """
    read = _json_lines if partition.path.endswith(JSON_LINES) else _parquet
    count = 0
    try:
        for count, values in enumerate(read(partition, columns), start=1):
            yield _row(values, columns, partition, partition.first_row + count - 1)
    except (OSError, pa.ArrowException) as error:
        raise BatchError(f"{partition.path} cannot be read: {error}") from None
    if count != partition.rows:
        raise BatchError(f"{partition.path} has changed since the run began; --overwrite starts again")


def generated_id(name: str, row: int) -> str:
    """What a row without an id of its own is called: its table and its number there, from 0."""
    return f"{name}:{row}"


def _parquet(partition: Partition, columns: Columns) -> Iterator[dict[str, Any] | str]:
    filesystem, path = open_filesystem(partition.path)
    with filesystem.open(path, "rb") as file:
        table = pq.ParquetFile(file)
        skip = partition.first_row
        groups: list[int] = []
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if groups or skip < rows:
                groups.append(group)
            else:
                skip -= rows
        left = partition.rows
        for batch in table.iter_batches(_READ_ROWS, row_groups=groups, columns=columns.names):
            wanted = batch.slice(skip, left)
            skip = max(0, skip - batch.num_rows)
            left -= wanted.num_rows
            yield from wanted.to_pylist()
            if not left:
                return


def _json_lines(partition: Partition, columns: Columns) -> Iterator[dict[str, Any] | str]:
    filesystem, path = open_filesystem(partition.path)
    with filesystem.open(path, "rb") as file:
        file.seek(partition.offset)
        left = partition.rows
        for line in file if left else ():
            if not line.strip():
                continue
            yield parse_line(line)
            left -= 1
            if not left:
                return


def own_id(value: Any) -> str:
    """What a row with an id of its own is called; some writers of Parquet store text as bytes."""
    return as_unicode(value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value))


def parse_line(line: bytes) -> dict[str, Any] | str:
    """The object on a line of JSON lines, or what is wrong with the line."""
    try:
        values = json.loads(line)
    except ValueError as error:
        return f"the line is not JSON: {error}"
    return values if isinstance(values, dict) else "the line is not a JSON object"


def _row(values: dict[str, Any] | str, columns: Columns, partition: Partition, number: int) -> Row:
    row_id = generated_id(partition.name, number)
    if isinstance(values, str):
        return Row(row_id, fault=values)
    if columns.id is not None and values.get(columns.id) is not None:
        row_id = own_id(values[columns.id])
    image, prompt = values.get(columns.image), values.get(columns.prompt) if columns.prompt else None
    if isinstance(image, dict):  # as Hugging Face's datasets store images
        path = image.get("path")
        image = image.get("bytes") or (os.fsdecode(path) if isinstance(path, bytes) else path)
    if image is None:
        return Row(row_id, fault=f"the column {columns.image!r} is empty")
    if not isinstance(image, (str, bytes)):
        return Row(row_id, fault=f"the column {columns.image!r} holds a {type(image).__name__}, not a path or bytes")
    if prompt is not None and not isinstance(prompt, str):
        return Row(row_id, fault=f"the column {columns.prompt!r} holds a {type(prompt).__name__}, not text")
    if isinstance(image, str) and not Path(image).is_absolute() and not is_uri(image):
        image = f"{partition.path.rpartition('/')[0] or '.'}/{image}"
    return Row(row_id, image, prompt)


def is_uri(path: str) -> bool:
    """Whether a path is for a file system, ``s3://bucket/key`` for one, and not a path of this machine."""
    return "://" in path


def open_filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system that a path or URI is on, and the path there; MediaError where there is none."""
    try:
        if path.split("://")[0] in _NATIVE and is_uri(path):
            # A wildcard is no part of a URI that pyarrow takes, so only the bucket goes into it.
            scheme, rest = path.split("://", 1)
            filesystem, _ = FileSystem.from_uri(f"{scheme}://{rest.split('/', 1)[0]}")
            return ArrowFSWrapper(filesystem), rest
        return url_to_fs(path)
    except (ValueError, ImportError, OSError) as error:
        raise MediaError(f"{path} cannot be opened: {error}") from None
