"""Safetensors files of features, each there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qwen2vl_trt.errors import FeaturesError

SHARDS = "features-*.safetensors"
_LARGEST_HEADER = 100_000_000  # bytes; readers of safetensors refuse more
_COPY_BLOCK = 1 << 24


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard belongs."""
    return folder / f"features-{number:05d}.safetensors"


def shard_paths(folder: Path) -> list[Path]:
    """A folder's shards in the order in which they were written."""
    return sorted(folder.glob(SHARDS), key=shard_number)


def shard_number(path: Path) -> int:
    """The number in a shard's name; raises FeaturesError where there is none."""
    digits = path.stem.removeprefix("features-")
    if not digits.isdecimal():
        raise FeaturesError(f"{path} is no shard of this command; move it away")
    return int(digits)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """A shard's tensors by key (``dtype``, ``shape``, ``data_offsets``), its grids by key, and where its data begin.

    Raises:
        FeaturesError: the file is no whole shard.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            tensors = json.loads(file.read(min(length, _LARGEST_HEADER)))
            size = file.seek(0, os.SEEK_END)
        grids = json.loads(tensors.pop("__metadata__")["grids"])
        if set(grids) != set(tensors) or size != 8 + length + sum(_size(tensor) for tensor in tensors.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise FeaturesError(f"{path} is damaged or not of this command; delete it and --resume") from None
    return tensors, grids, 8 + length


def _size(tensor: dict[str, Any]) -> int:
    return tensor["data_offsets"][1] - tensor["data_offsets"][0]


def merge_shards(folder: Path, target: Path) -> None:
    """Join a folder's shards into one safetensors file, copying a block at a time.

    Raises:
        FeaturesError: more images than one file's header takes, or the file cannot be written.
    """
    tensors: dict[str, Any] = {}
    grids: dict[str, Any] = {}
    parts: list[tuple[Path, int]] = []
    offset = 0
    for path in shard_paths(folder):
        found, shard_grids, begin = read_header(path)
        for key, tensor in found.items():
            start, end = tensor["data_offsets"]
            tensors[key] = {**tensor, "data_offsets": [start + offset, end + offset]}
        offset += sum(_size(tensor) for tensor in found.values())
        grids |= shard_grids
        parts.append((path, begin))
    header = json.dumps({"__metadata__": {"grids": json.dumps(grids)}, **tensors}).encode()
    header += b" " * (-len(header) % 8)  # as safetensors does, so that the data are aligned
    if len(header) > _LARGEST_HEADER:
        raise FeaturesError(
            f"{target}: {len(tensors):,} images are more than one safetensors file takes; they are safe in {folder}"
            " as shards. Rename that folder and use it as it is."
        )

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(header)) + header)
        for path, begin in parts:
            with path.open("rb") as shard:
                shard.seek(begin)
                shutil.copyfileobj(shard, file, _COPY_BLOCK)

    with writing(target, f"; the features are safe in {folder}: run again with --resume"):
        _write_durably(target, write)


def write_durably(path: Path, content: bytes) -> None:
    """Make a file appear whole or not at all, also when the power fails; raises OSError."""
    _write_durably(path, lambda file: file.write(content))


def _write_durably(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself is on the disk when its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def writing(path: Path, way_out: str = "") -> Iterator[None]:
    """Turn an OSError into a FeaturesError that names the file and the way out."""
    try:
        yield
    except OSError as error:
        raise FeaturesError(f"{path} cannot be written: {error.strerror or error}{way_out}") from None
