"""Safetensors files of features, each there whole or not at all."""

from __future__ import annotations

import errno
import json
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from qwen2vl_trt.errors import FeaturesError
from qwen2vl_trt.files import atomic_file
from qwen2vl_trt.windows import Grid

from .output_folder import writing

SHARDS = "features-*.safetensors"
LARGEST_HEADER = 100_000_000
"""Bytes; readers of safetensors refuse more."""
_COPY_BLOCK = 1 << 24
_RESERVED = "__metadata__"
_LONGEST = 1 << 16  # bytes of a name; a path on Linux has at most 4,096
_LIKE_SPELLED_OUT = re.compile(r"(?<!\\)\\+(?=ud[89a-f][0-9a-f]{2}|[\ud800-\udfff])")
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, SafetensorError)


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


def write_shard(path: Path, tensors: dict[str, Tensor], grids: dict[str, Grid]) -> None:
    """Write a shard, and read it back before it gets its name.

    Raises:
        OSError: it cannot be written, or what is on the disk is not what was written.
    """
    content = save(tensors, {"grids": json.dumps(grids)})
    shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
    _write_durably(path, lambda file: file.write(content), shapes)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """A shard's tensors by key (``dtype``, ``shape``, ``data_offsets``), its grids by key, and where its data begin.

    Raises:
        FeaturesError: the file is no whole shard.
    """
    try:
        return _read_header(path)
    except _DAMAGE:
        raise FeaturesError(f"{path} is damaged or not of this command; delete it and --resume") from None


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    with safe_open(path, "pt"):
        pass  # what safetensors itself does not read is no shard: a name that it refuses, a gap, a byte too many
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        tensors = json.loads(file.read(length))
    grids = json.loads(tensors.pop("__metadata__")["grids"])
    if set(grids) != set(tensors):
        raise ValueError
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
        if twice := tensors.keys() & found.keys():
            raise FeaturesError(f"{path}: {min(twice)} is in an earlier shard too; delete one of the two and --resume")
        for key, tensor in found.items():
            start, end = tensor["data_offsets"]
            tensors[key] = {**tensor, "data_offsets": [start + offset, end + offset]}
        offset += sum(_size(tensor) for tensor in found.values())
        grids |= shard_grids
        parts.append((path, begin))
    header = json.dumps({"__metadata__": {"grids": json.dumps(grids)}, **tensors}).encode()
    header += b" " * (-len(header) % 8)  # as safetensors does, so that the data are aligned
    if len(header) > LARGEST_HEADER:
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

    shapes = {key: tensor["shape"] for key, tensor in tensors.items()}
    with writing(target, f"; the features are safe in {folder}: run again with --resume"):
        _write_durably(target, write, shapes)


def _write_durably(
    path: Path, write: Callable[[BinaryIO], object], shapes: Mapping[str, list[int]] | None = None
) -> None:
    """With ``shapes``, of tensors by key, what was written must read back as a shard of these."""
    check = None if shapes is None else partial(_read_back, shapes=shapes)
    with atomic_file(path, check) as temporary, temporary.open("wb") as file:
        write(file)


def _read_back(written: Path, shapes: Mapping[str, list[int]]) -> None:
    try:
        tensors, _, _ = _read_header(written)
        if {key: tensor["shape"] for key, tensor in tensors.items()} != shapes:
            raise ValueError
    except _DAMAGE:
        raise OSError(errno.EIO, "it does not read back as it was written; the disk may be damaged") from None


def name_fault(name: str) -> str | None:
    """Why no tensor of a safetensors file can have a name, if so."""
    if name == _RESERVED:
        return "safetensors keeps this name for itself; rename it"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "its name is not valid UTF-8; rename it"
    if size > _LONGEST:
        return f"its name has more than {_LONGEST:,} bytes; rename it"
    return None


def header_bytes(name: str) -> int:
    """What a tensor takes in a shard's header at most, its grid included: twice JSON, all escaped."""
    return len(json.dumps(name)) + len(json.dumps(json.dumps(name))) + 256


def as_unicode(text: str) -> str:
    """Text with bytes of a file's name that are no UTF-8, spelled out: readers of JSON and Parquet refuse them.

    No two texts become the same: backslashes before what is spelled out, or looks like it, are doubled.
    """
    return _LIKE_SPELLED_OUT.sub(r"\g<0>\g<0>", text).encode("utf-8", "backslashreplace").decode()
