"""A folder of features that survives a kill.

Shards appear whole or not at all, so they alone say what is done; a thread writes one while the next is filled.
``index.jsonl`` (a line an image: which shard, shape, grid) is for readers, appended after each shard and rebuilt from
the shards when a run resumes. ``errors.jsonl`` names each image that the latest run could not use.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qwen2vl_trt.errors import FeaturesError
from qwen2vl_trt.files import atomic_file
from qwen2vl_trt.windows import Grid

from .extraction import Store
from .output_folder import IfExists, OutputFolder, check_writable, in_the_way, writing
from .shards import (
    LARGEST_HEADER,
    SHARDS,
    as_unicode,
    header_bytes,
    merge_shards,
    name_fault,
    read_header,
    shard_number,
    shard_path,
    shard_paths,
    write_shard,
)

SHARD_BYTES = 512 << 20
"""A shard ends here, however few its images; writing one takes twice this in memory, beside the next."""

ERRORS = "errors.jsonl"
_INDEX = "index.jsonl"
_DIGEST = 16


@dataclass
class _Shard:
    """The shard that is being filled."""

    number: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    bytes: int = 0
    header: int = 0


class FeatureStore(Store):
    """Shards that are filled one after the other; made by :func:`open_store`."""

    def __init__(self, folder: Path, shard_size: int) -> None:
        self.folder = folder
        self._shard_size = shard_size
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write-shard")
        self._writing: Future[None] | None = None
        self._failure: str | None = None
        paths = shard_paths(folder)
        self._shard = _Shard(shard_number(paths[-1]) + 1 if paths else 0)
        self._done = self._rebuild_index(paths)
        self.saved = len(self._done)
        with writing(folder / ERRORS):
            self._errors = (folder / ERRORS).open("w", encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        digest = _digest(key)
        place = int(np.searchsorted(self._done, np.frombuffer(digest, self._done.dtype)[0]))
        return place < len(self._done) and self._done[place : place + 1].tobytes() == digest

    @property
    def remaining(self) -> int:
        return self._shard_size - len(self._shard.tensors)

    def refusal(self, key: str) -> str | None:
        return name_fault(key)

    def add(self, key: str, grid: Grid, features: Tensor) -> None:
        """See there; features are on the disk when the shard after theirs is full."""
        shard = self._shard
        shard.tensors[key], shard.grids[key] = features, grid
        shard.bytes += features.numel() * features.element_size()
        shard.header += header_bytes(key)
        if not self.remaining or shard.bytes >= SHARD_BYTES or shard.header >= LARGEST_HEADER // 2:
            self._hand_over()

    def fail(self, key: str, reason: str) -> None:
        with writing(self.folder / ERRORS):
            self._errors.write(json.dumps({"image": as_unicode(key), "error": as_unicode(reason)}) + "\n")
            self._errors.flush()
        self.failed += 1
        self.first_failure = self.first_failure or reason

    def flush(self) -> None:
        if self._shard.tensors:
            self._hand_over()
        self._wait()

    def _hand_over(self) -> None:
        """Let the thread write the shard, once it has written the one before."""
        self._wait()
        self._writing = self._writer.submit(self._write, self._shard)
        self._shard = _Shard(self._shard.number + 1)

    def _wait(self) -> None:
        try:
            if self._writing is not None:
                self._writing.result()
        except FeaturesError as error:
            self._failure = str(error)
        finally:  # it would hold the error, whose frames hold it and all that the caller has open
            self._writing = None
        if self._failure is not None:
            raise FeaturesError(self._failure)

    def _write(self, shard: _Shard) -> None:
        path = shard_path(self.folder, shard.number)
        with writing(path, f"; {self.saved:,} images are safe in {self.folder}: run again with --resume"):
            write_shard(path, shard.tensors, shard.grids)
            self.saved += len(shard.tensors)
            with (self.folder / _INDEX).open("a", encoding="utf-8") as index:
                index.writelines(
                    _index_line(key, path.name, list(tensor.shape), shard.grids[key])
                    for key, tensor in shard.tensors.items()
                )
                index.flush()
                os.fsync(index.fileno())

    def close(self) -> None:
        """Wait for a shard that is being written, and release the file of errors; what is not flushed is forgotten."""
        self._writer.shutdown()
        self._errors.close()
        if not self.failed:
            (self.folder / ERRORS).unlink(missing_ok=True)

    def _rebuild_index(self, paths: list[Path]) -> NDArray[np.bytes_]:
        """Write the index anew from the shards' headers, and return their keys' digests, sorted."""
        digests = bytearray()  # 16 bytes an image: a set of their names would take ten times that
        whole = self.folder / _INDEX
        with writing(whole), atomic_file(whole) as temporary, temporary.open("w", encoding="utf-8") as index:
            for path in paths:
                tensors, grids, _ = read_header(path)
                for key, grid in grids.items():
                    index.write(_index_line(key, path.name, tensors[key]["shape"], grid))
                    digests += _digest(key)
        # As byte strings: numpy drops trailing zeros of both sides of a comparison, which tells no two digests alike.
        return np.sort(np.frombuffer(bytes(digests), dtype=f"S{_DIGEST}"))


@contextmanager
def open_store(
    folder: Path, settings: dict[str, Any], if_exists: IfExists = "refuse", shard_size: int = 1024
) -> Iterator[FeatureStore]:
    """Open a folder of features for one run, see ``OutputFolder.open``; at most ``shard_size`` images a shard.

    Raises FeaturesError as that does, and where a shard is damaged.
    """
    with shard_folder(folder, if_exists).open(settings):
        store = FeatureStore(folder, shard_size)
        try:
            yield store
        finally:
            store.close()


def shard_folder(folder: Path, if_exists: IfExists) -> OutputFolder:
    """A folder of shards, for a run."""
    return OutputFolder(folder, if_exists, SHARDS, (SHARDS, _INDEX, ERRORS))


@dataclass(frozen=True)
class FeatureOutput:
    """Where features go: a folder of shards, or one safetensors file that is joined from shards at the end."""

    path: Path

    @property
    def is_file(self) -> bool:
        return self.path.suffix == ".safetensors"

    @property
    def folder(self) -> Path:
        """Where the shards are; of a file, beside it until it is whole."""
        return self.path.with_name(f"{self.path.name}.parts") if self.is_file else self.path

    @property
    def errors(self) -> Path:
        """Where the images that could not be used are named."""
        return self.path.with_suffix(".errors.jsonl") if self.is_file else self.path / ERRORS

    def check(self, if_exists: IfExists) -> None:
        """See before the work whether it can be written, as ``OutputFolder.check``."""
        if not self.is_file and self.path.exists() and not self.path.is_dir():
            raise FeaturesError(f"{self.path} is a file; name a folder, or a file that ends in .safetensors")
        shards = shard_folder(self.folder, if_exists)
        if not self.is_file:
            shards.check()
            return
        if self.path.is_dir():
            raise FeaturesError(f"{self.path} is a folder; a name that ends in .safetensors is for a file")
        check_writable(self.path)
        if if_exists == "refuse" and shards.in_use:
            raise FeaturesError(in_the_way(self.path))
        if self.path.exists() and not shards.in_use and if_exists != "overwrite":
            raise FeaturesError(f"{self.path} exists already; --overwrite makes it again")

    def finish(self, store: FeatureStore) -> None:
        """After a run that was not stopped, while the store is open: of a file, join the shards and remove them."""
        if not self.is_file:
            return
        self.errors.unlink(missing_ok=True)
        if store.failed:
            shutil.copyfile(self.folder / ERRORS, self.errors)
        if store.saved:
            merge_shards(self.folder, self.path)
        shutil.rmtree(self.folder)


def _index_line(key: str, shard: str, shape: list[int], grid: Grid) -> str:
    return json.dumps({"image": key, "shard": shard, "shape": shape, "grid": list(grid)}, ensure_ascii=False) + "\n"


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=_DIGEST).digest()
