"""The Parquet file of one partition, there whole or not at all, and the bad rows beside it.

The file alone says that a partition is done: it is written beside its place, synced, then linked to its name, which
fails if another attempt was first. What went wrong with rows is in its metadata too, and ``errors/`` is written from
that, so that the two cannot disagree wherever a worker is lost.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from qwen2vl_trt.errors import BatchError
from qwen2vl_trt.files import atomic_write, fsync
from qwen2vl_trt.runtime.features.extraction import Store
from qwen2vl_trt.runtime.features.output_folder import writing
from qwen2vl_trt.runtime.features.shards import as_unicode
from qwen2vl_trt.windows import Grid

from .journal import Journal

DATA, ERRORS = "data", "errors"
_GROUP_BYTES = 64 << 20
"""A row group ends here: what a worker holds until it is written."""
_WAY_OUT = "; the partitions that are done are safe: run again with --resume"

ANSWER_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("original_size", pa.list_(pa.int32())),
        ("resized_size", pa.list_(pa.int32())),
    ]
)


def feature_schema(width: int | None) -> pa.Schema:
    """Columns of features: ``width`` values a row where every row has one vector, else any number.

    BF16 values are stored as the FP32 that equals them, which every reader of Parquet knows; ``dtype`` says what they
    were.
    """
    values = pa.list_(pa.float32(), width) if width else pa.list_(pa.float32())
    fields = [("id", pa.string()), ("features", values), ("shape", pa.list_(pa.int32())), ("dtype", pa.string())]
    return pa.schema([*fields, ("grid", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class Done:
    """What a partition came to: rows with a result, and ``{"id", "error"}`` of each without."""

    saved: int
    failures: list[dict[str, str]]


def data_path(output: Path, number: int) -> Path:
    """Where a partition's results are."""
    return output / DATA / f"part-{number:05d}.parquet"


def errors_path(output: Path, number: int) -> Path:
    """Where a partition's bad rows are named, if it has any."""
    return output / ERRORS / f"part-{number:05d}.jsonl"


def read_done(output: Path, number: int) -> Done | None:
    """What a partition came to, None if it is not done; sees that its bad rows are in their file.

    Raises:
        BatchError: the partition's file is damaged.
        FeaturesError: the bad rows cannot be written.
    """
    path = data_path(output, number)
    try:
        metadata = pq.read_metadata(path)
        failures = json.loads(metadata.metadata[b"failures"])
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise BatchError(f"{path} is damaged or not of this command ({error}); delete it and --resume") from None
    errors = errors_path(output, number)
    if failures and not errors.exists():
        content = "".join(json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures)
        with writing(errors):
            # Attempts that overlap write the same under names of their own.
            temporary = errors.with_name(f".{errors.name}.{uuid.uuid4().hex}")
            atomic_write(temporary, content.encode())
            temporary.replace(errors)
    return Done(metadata.num_rows, failures)


class PartitionWriter(Store):
    """Collects the results of one attempt at a partition, in order; takes the place of a feature store.

    Args:
        output: of the run.
        number: of the partition.
        rows: of the partition, how many.
        schema: of the results.
        work: folder of attempts, removed when a run begins: what an earlier run's worker still writes is lost there.
        journal: told of each row that is finished.
    """

    def __init__(self, output: Path, number: int, rows: int, schema: pa.Schema, work: Path, journal: Journal) -> None:
        self._path, self._rows, self._schema, self.journal = data_path(output, number), rows, schema, journal
        self._temporary = work / f"{self._path.name}.{uuid.uuid4().hex}"
        self._saved, self._bytes = 0, 0
        self._group: list[Mapping[str, Any]] = []
        self.failures: list[dict[str, str]] = []
        with writing(self._temporary, _WAY_OUT):
            self._writer = pq.ParquetWriter(self._temporary, schema)

    @property
    def remaining(self) -> int:
        """Rows still to come, at most: with as many images a shard, `run.py features` makes the same batches."""
        return self._rows - self._saved

    def add(self, key: str, grid: Grid, features: Tensor) -> None:
        values = features.to(torch.float32).reshape(-1).numpy()
        dtype = str(features.dtype).removeprefix("torch.")
        self.add_row(
            {"id": key, "features": values, "shape": list(features.shape), "dtype": dtype, "grid": list(grid)},
            values.nbytes,
        )

    def add_row(self, row: Mapping[str, Any], size: int) -> None:
        """Keep a row of the schema, about ``size`` bytes."""
        self._group.append(row)
        self._saved += 1
        self._bytes += size
        self.journal.finish(row["id"])
        if self._bytes >= _GROUP_BYTES:
            self.flush()

    def fail(self, key: str, reason: str) -> None:
        self.failures.append({"id": key, "error": as_unicode(reason)})
        self.failed += 1
        self.first_failure = self.first_failure or reason
        self.journal.finish(key)

    def flush(self) -> None:
        """Write a row group."""
        if self._group:
            with writing(self._path, _WAY_OUT):
                self._writer.write_table(pa.Table.from_pylist(self._group, self._schema))
        self._group, self._bytes = [], 0

    def commit(self) -> None:
        """Make the partition done, unless another attempt has; FeaturesError if that fails, or the run has ended."""
        self.flush()
        with writing(self._path, _WAY_OUT):
            self._writer.add_key_value_metadata({"failures": json.dumps(self.failures)})
            self._writer.close()
            fsync(self._temporary)
            try:
                os.link(self._temporary, self._path)
            except FileExistsError:
                pass
            except OSError:  # no hard links there, or the attempt is gone, which the renaming finds too
                self._temporary.replace(self._path)
            fsync(self._path.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the attempt."""
        with suppress(OSError, pa.ArrowException):
            self._writer.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)
