"""A folder of features that survives a kill: shards that appear whole, and what follows from them.

``features-00000.safetensors`` and so on hold one tensor an image, named by its key; their metadata's ``grids`` says
each image's ``[1, h, w]`` in patches. A shard is written beside its place, synced to the disk, read back, then renamed:
it is there whole or not at all, so the shards alone say what is done. A thread writes one shard while the next is
filled. ``index.jsonl`` (a line an image: which shard, shape, grid) is for readers, appended after each shard and
rebuilt from the shards when a run resumes. JSON lines because any language reads them without this project, they can
be appended, and a torn last line harms nothing.
``errors.jsonl`` names each image that the latest run could not use, ``settings.json`` what the features depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.errors import FeaturesError
from qwen2vl_trt.files import atomic_file, atomic_write
from qwen2vl_trt.windows import Grid

from ..options import PipelineOptions
from ..preprocessing.settings import PreprocessorSettings
from .names import as_unicode, header_bytes, name_fault
from .shards import (
    LARGEST_HEADER,
    SHARDS,
    read_header,
    shard_number,
    shard_path,
    shard_paths,
    write_shard,
    writing,
)

IfExists = Literal["refuse", "resume", "overwrite"]

SHARD_BYTES = 512 << 20
"""A shard ends here even if it has room for more images; writing one takes twice this in memory, beside the next."""

ERRORS = "errors.jsonl"
_INDEX, _SETTINGS, _LOCK = "index.jsonl", "settings.json", ".lock"
_DIGEST = 16


def holds_features(folder: Path) -> bool:
    """Whether a run, ended or not, has saved features here."""
    return any(folder.glob(SHARDS))


@dataclass
class _Shard:
    """The shard that is being filled."""

    number: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    bytes: int = 0
    header: int = 0


class FeatureStore:
    """Features by key; ``key in store`` says whether an image's are safe on the disk. Made by :func:`open_store`."""

    def __init__(self, folder: Path, shard_size: int) -> None:
        self.folder = folder
        self.failed = 0
        self.first_failure: str | None = None
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
    def room(self) -> int:
        """Images that the current shard still takes; at least 1."""
        return self._shard_size - len(self._shard.tensors)

    def refusal(self, key: str) -> str | None:
        """Why nothing can be stored under a key, if so."""
        return name_fault(key)

    def add(self, key: str, grid: Grid, features: Tensor) -> None:
        """Keep an image's features; they are on the disk after :meth:`flush`, and when the shard after theirs is full.

        Raises:
            FeaturesError: an earlier shard could not be written.
        """
        shard = self._shard
        shard.tensors[key], shard.grids[key] = features, grid
        shard.bytes += features.numel() * features.element_size()
        shard.header += header_bytes(key)
        if not self.room or shard.bytes >= SHARD_BYTES or shard.header >= LARGEST_HEADER // 2:
            self._hand_over()

    def fail(self, key: str, reason: str) -> None:
        """Note that an image has no features, and why.

        Raises:
            FeaturesError: the note cannot be written.
        """
        with writing(self.folder / ERRORS):
            self._errors.write(json.dumps({"image": as_unicode(key), "error": as_unicode(reason)}) + "\n")
            self._errors.flush()
        self.failed += 1
        self.first_failure = self.first_failure or reason

    def flush(self) -> None:
        """Write what has been added since the last shard, as a shard, and wait until all is on the disk.

        Raises:
            FeaturesError: it cannot be written; nothing of it is left, and what was saved before stays.
        """
        if self._shard.tensors:
            self._hand_over()
        self._wait()

    def _hand_over(self) -> None:
        """Let the thread write the shard, once it has written the one before: no more than one waits in memory."""
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
    """Open a folder of features for one run; no other can while it lasts.

    Args:
        folder: made if missing.
        settings: what the features depend on, by name. A resumed run must have the same.
        if_exists: what to do where a run has written before. ``resume`` where none has is a new run.
        shard_size: most images in a shard.

    Raises:
        FeaturesError: a run has written here and ``if_exists`` is ``refuse``; its settings differ; another run is at
            work here; a shard is damaged; or the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise FeaturesError(
                f"{folder}: another run is writing there; wait for it, or give another --output"
            ) from None
    try:
        if if_exists == "refuse" and holds_features(folder):
            raise FeaturesError(in_the_way(folder))
        with writing(folder):
            for leftover in folder.glob(".*.tmp"):  # of a run that was killed
                leftover.unlink()
            if if_exists == "overwrite":
                clear(folder)
            if not holds_features(folder):
                atomic_write(folder / _SETTINGS, json.dumps(settings, indent=2).encode())
        check_settings(folder, settings)
        store = FeatureStore(folder, shard_size)
        try:
            yield store
        finally:
            store.close()
    finally:
        lock.release()


def in_the_way(output: Path) -> str:
    """The message where an earlier run's features are."""
    return f"{output} holds the features of an earlier run; --resume goes on with it, --overwrite starts again"


def clear(folder: Path) -> None:
    """Remove a run's files, and no other."""
    for path in (folder / _SETTINGS, *folder.glob(SHARDS), folder / _INDEX, folder / ERRORS):
        path.unlink(missing_ok=True)


def common_settings(manifest: Manifest, options: PipelineOptions, preprocessor: PreprocessorSettings) -> dict[str, Any]:
    """What all results depend on; a resumed run must have the same. JSON values only."""
    return {
        "model": manifest.model,
        "model_hash": manifest.model_hash,
        "precision": manifest.precision,
        "min_pixels": preprocessor.image.min_pixels,
        "max_pixels": preprocessor.image.max_pixels,
        "image_pixel_limit": options.image_pixel_limit,
        "min_hw_dims": manifest.profile.min_hw_dims,
        "max_hw_dims": manifest.profile.max_hw_dims,
        "strict_size": options.strict_size,
        "decode": options.decode,
        "allow_special_tokens": options.allow_special_tokens,
    }


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """See that a run that goes on with a folder has the settings that its ``settings.json`` names.

    Raises:
        FeaturesError: naming the first that differs.
    """
    try:
        found = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError):
        raise FeaturesError(
            f"{folder / _SETTINGS} cannot be read: nobody knows of what settings the results there are;"
            " --overwrite starts again"
        ) from None
    for name in sorted({*found, *settings}):
        if found.get(name) != settings.get(name):
            raise FeaturesError(
                f"{folder} was begun with {name} {found.get(name)!r}, this run has {settings.get(name)!r}; give"
                " another --output, or --overwrite"
            )


def _index_line(key: str, shard: str, shape: list[int], grid: Grid) -> str:
    return json.dumps({"image": key, "shard": shard, "shape": shape, "grid": list(grid)}, ensure_ascii=False) + "\n"


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=_DIGEST).digest()
