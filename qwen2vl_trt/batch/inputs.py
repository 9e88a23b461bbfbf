"""Any input becomes a list of partitions that stays the same however often a run is resumed.

Images of a folder or a glob are first listed in a Parquet table of their own, so that workers read one form only, and
so that files that come or go later move no row to another partition.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen2vl_trt.errors import BatchError, MediaError
from qwen2vl_trt.files import atomic_file
from qwen2vl_trt.runtime.features.output_folder import writing
from qwen2vl_trt.runtime.features.shards import as_unicode
from qwen2vl_trt.runtime.inputs.image_formats import image_suffixes
from qwen2vl_trt.runtime.inputs.image_listing import counted, list_images

from .rows import (
    JSON_LINES,
    TABLES,
    Columns,
    Partition,
    generated_id,
    is_uri,
    open_filesystem,
    own_id,
    parse_line,
)

PARTITIONS, IMAGES = "partitions.parquet", "images.parquet"
_LISTED = Columns("image", None, "id")
_DIGEST = 16


@dataclass(frozen=True)
class Input:
    """What a run reads: the source as the user gave it, its columns, and the path or URI of each table.

    Where the source is images there are no tables, and the columns are those of the listing.
    """

    source: str
    columns: Columns
    tables: tuple[str, ...]


def find_input(source: str, image: str | None, prompt: str | None, row_id: str | None) -> Input:
    """See what there is: a folder of images, a table (``*.parquet``, ``*.jsonl``), or a glob of either.

    Columns that are not named are ``image``, and ``prompt`` and ``id`` where there are such.

    Raises:
        MediaError: there is nothing.
        BatchError: a table cannot be read or has no such column.
    """
    if not source:
        raise MediaError("the input is empty: it names no folder, file or glob")
    if not source.endswith(TABLES):
        if image or prompt or row_id:
            raise BatchError(f"{source} is images, not a table: it has no columns to name")
        there: Counter[str] = Counter()
        if next(_listed(source, there), None) is None:
            others = f", but {counted(there)}" if there else ""
            raise MediaError(f"{source}: no image there{others}; a folder of tables is given as 'DIR/*.parquet'")
        return Input(source, _LISTED, ())
    tables = tuple(_match(source))
    if not tables:
        raise MediaError(f"{source}: there is no such file, and as a glob it matches none")
    found = _column_names(tables[0])
    columns = Columns(
        _column(tables[0], found, "image", image) or "image",
        _column(tables[0], found, "prompt", prompt),
        _column(tables[0], found, "id", row_id),
    )
    for table in tables:
        if table.endswith(JSON_LINES):
            continue
        counts = found if table == tables[0] else _column_names(table)
        for name in columns.names:
            if not counts[name]:
                raise BatchError(f"{table} has no column {name!r}, which {tables[0]} has")
            if counts[name] > 1:
                raise BatchError(f"{table} has {counts[name]} columns {name!r}; one of them is to be read")
    return Input(source, columns, tables)


def divide(given: Input, rows: int, folder: Path) -> Counter[str]:
    """Write the partitions of an input into a folder, ``partitions.parquet`` last.

    Memory: 16 bytes a row for the ids of tables; of folders, what listing one takes.

    Returns:
        How many files of a folder are no images and were passed over, by suffix.

    Raises:
        BatchError: two rows have the same id or one has none, there is no row, or a table cannot be read.
        FeaturesError: the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tables = given.tables
        passed_over: Counter[str] = Counter()
        if not tables:
            _write_listing(given.source, folder / IMAGES, rows, passed_over)
            tables = (str((folder / IMAGES).resolve()),)
    root = os.path.commonpath([PurePosixPath(table).parent for table in tables])
    partitions: list[Partition] = []
    digests = bytearray()
    for table in tables:
        name = _name(table, root)
        # The ids of a listing are paths, each there once: only those of tables are compared.
        columns = given.columns if given.tables else replace(given.columns, id=None)
        starts, count = _scan(table, name, columns, rows, digests)
        size = _size(table)
        for first, offset in starts:
            number, length = len(partitions), min(rows, count - first)
            partitions.append(Partition(number, table, name, first, length, offset, size))
    if not partitions:
        raise BatchError(f"{given.source} has no rows")
    _refuse_duplicates(tables, root, given.columns, digests)
    with writing(folder / PARTITIONS), atomic_file(folder / PARTITIONS) as temporary:
        listed = [asdict(partition) | {"path": os.fsencode(partition.path)} for partition in partitions]
        pq.write_table(pa.Table.from_pylist(listed), temporary)  # a path as its bytes: it need not be Unicode
    return passed_over


def read_partitions(folder: Path) -> list[Partition]:
    """The partitions of a run that has begun.

    Raises:
        BatchError: their list is damaged, or a table is no longer what it was.
    """
    try:
        listed = pq.read_table(folder / PARTITIONS).to_pylist()
        partitions = [Partition(**row | {"path": os.fsdecode(row["path"])}) for row in listed]
    except (OSError, pa.ArrowException, TypeError, KeyError) as error:
        raise BatchError(f"{folder / PARTITIONS} cannot be read: {error}; --overwrite starts again") from None
    for path, size in {partition.path: partition.size for partition in partitions}.items():
        if _size(path) != size:
            raise BatchError(f"{path} has changed since the run began; --overwrite starts again")
    return partitions


def _match(source: str) -> list[str]:
    filesystem, path = open_filesystem(source)
    try:
        found = sorted(filesystem.glob(path)) if any(c in path for c in "*?[") else [path]
        found = [path for path in found if filesystem.isfile(path)]
    except OSError as error:
        raise MediaError(f"{source} cannot be listed: {error}") from None
    if not is_uri(source):
        return found
    scheme = source.split("://")[0]
    return [f"{scheme}://{path}" for path in found]


def _listed(source: str, passed_over: Counter[str]) -> Iterator[tuple[str, str]]:
    """Id and absolute path or URI of each image, in an order that does not change."""
    if not is_uri(source):
        for key, path in list_images(source, passed_over):
            yield key, str(Path(path).absolute())
        return
    filesystem, path = open_filesystem(source)
    scheme = source.split("://")[0]
    try:
        if filesystem.isdir(path):
            root = path.rstrip("/")
            taken = image_suffixes()
            suffixes = {name: PurePosixPath(name).suffix.lower() for name in filesystem.find(path)}
            found = [name for name, suffix in suffixes.items() if suffix in taken]
            others = Counter(suffix or "without a suffix" for suffix in suffixes.values())
            passed_over.update({suffix: count for suffix, count in others.items() if suffix not in taken})
        else:
            found = [name for name in filesystem.glob(path) if filesystem.isfile(name)]
            plain = path[: min((path.index(c) for c in "*?[" if c in path), default=len(path))]
            root = plain.rpartition("/")[0]
    except OSError as error:
        raise MediaError(f"{source} cannot be listed: {error}") from None
    for name in sorted(found):
        yield name.removeprefix(f"{root}/"), f"{scheme}://{name}"


def _write_listing(source: str, path: Path, rows: int, passed_over: Counter[str]) -> None:
    # Paths as their bytes, which need not be Unicode as a string must.
    schema = pa.schema([("id", pa.binary()), ("image", pa.struct([("path", pa.binary())]))])
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        group: list[dict[str, Any]] = []
        for key, image in _listed(source, passed_over):
            group.append({"id": os.fsencode(key), "image": {"path": os.fsencode(image)}})
            if len(group) == rows:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema))


def _column_names(table: str) -> Counter[str]:
    """Of a table's columns, each with the number of those of that name."""
    with _opened(table) as file:
        if not table.endswith(JSON_LINES):
            return Counter(pq.read_schema(file).names)
        parsed = (parse_line(line) for line in file if line.strip())
        first = next((values for values in parsed if isinstance(values, dict)), None)
    if first is None:
        raise BatchError(f"{table} holds no JSON object, one of which belongs on each line")
    return Counter(dict.fromkeys(first, 1))


def _column(table: str, found: Counter[str], kind: str, given: str | None) -> str | None:
    if (given or kind) in found:
        return given or kind
    if given or kind == "image":
        raise BatchError(
            f"{table} has no column {given or kind!r}, it has {', '.join(sorted(found))}; name it with --{kind}-column"
        )
    return None


def _size(table: str) -> int:
    filesystem, path = open_filesystem(table)
    try:
        return int(filesystem.info(path)["size"])
    except OSError as error:
        raise BatchError(f"{table} cannot be read: {error}") from None


def _scan(table: str, name: str, columns: Columns, rows: int, digests: bytearray) -> tuple[list[tuple[int, int]], int]:
    """Row and byte at which each of a table's partitions begins, and its rows; adds the digests of ids of its own."""
    if not table.endswith(JSON_LINES) and columns.id is None:
        with _opened(table) as file:
            count = int(pq.read_metadata(file).num_rows)
        return [(first, 0) for first in range(0, count, rows)], count
    starts, count = [], 0
    for count, (row_id, offset) in enumerate(_ids(table, name, columns), start=1):
        if (count - 1) % rows == 0:
            starts.append((count - 1, offset))
        if columns.id is not None:
            digests += _digest(row_id)
    return starts, count


@contextmanager
def _opened(table: str) -> Iterator[Any]:
    filesystem, path = open_filesystem(table)
    try:
        with filesystem.open(path, "rb") as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise BatchError(f"{table} cannot be read: {error}") from None


def _ids(table: str, name: str, columns: Columns) -> Iterator[tuple[str, int]]:
    """Id and first byte of each row; of Parquet 0."""
    number = offset = 0

    def checked(value: Any) -> str:
        if value is None:
            raise BatchError(f"{table}: row {number} has no {columns.id!r}; every row needs one, or none of them")
        return own_id(value)

    with _opened(table) as file:
        if not table.endswith(JSON_LINES):
            for batch in pq.ParquetFile(file).iter_batches(columns=[columns.id]):
                for value in batch.column(0).to_pylist():
                    yield checked(value), 0
                    number += 1
            return
        for line in file:
            if line.strip():
                values = "" if columns.id is None else parse_line(line)
                if isinstance(values, str) or columns.id is None:  # what is wrong with a line is said where it is read
                    yield generated_id(name, number), offset
                else:
                    yield checked(values.get(columns.id)), offset
                number += 1
            offset += len(line)


def _name(table: str, root: str) -> str:
    """Of a table, in the ids of its rows."""
    return as_unicode(os.path.relpath(table, root).replace(os.sep, "/"))


def _refuse_duplicates(tables: tuple[str, ...], root: str, columns: Columns, digests: bytearray) -> None:
    values = np.sort(np.frombuffer(digests, dtype=f"S{_DIGEST}"))
    twice = np.flatnonzero(values[1:] == values[:-1])
    if not len(twice):
        return
    wanted, places = values[twice[0] : twice[0] + 1].tobytes(), []
    for table in tables:
        name = _name(table, root)
        for number, (row_id, _) in enumerate(_ids(table, name, columns)):
            if _digest(row_id) == wanted:
                places.append(f"{name} row {number}")
                found = row_id
    raise BatchError(
        f"the id {found!r} is given {len(places)} times ({', '.join(places[:3])}); ids name the rows of the output"
    )


def _digest(row_id: str) -> bytes:
    return hashlib.blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=_DIGEST).digest()
