"""Lazy access to a Hugging Face checkpoint folder.

Opening one reads the headers of its safetensors files. Export needs only where a tensor's bytes lie (``locate``). The
weights that a quantised checkpoint holds in other tensors have their ordinary names here (``packed``).

File format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, a JSON header, then the
tensors' bytes without gaps).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import Qwen2VLConfig, read_json
from .errors import CheckpointError, reason
from .foreign import lacking, refuse_foreign
from .quantized.formats import QUANTIZATION_FILE, packed_weights, stated_format
from .quantized.linear import PackedWeight

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
RECORD = "calibration.json"
"""What a quantised checkpoint was made from, where it was quantised here."""

# What changes an answer beside the weights.
_HASHED_FILES = (
    "config.json",
    QUANTIZATION_FILE,
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_MAX_RANK = 64  # torch's own limit
_LFS_POINTER = b"version "  # begins the files that `git clone` leaves without git-lfs
_SAMPLE = 4096  # bytes hashed at each end of a tensor


@dataclass(frozen=True)
class TensorLocation:
    """Where the bytes of one tensor lie: row-major, little-endian, contiguous.

    Attributes:
        path: the real file; a hard link to a symbolic link of the hub's cache would stay a symbolic link.
        offset: bytes from the start of the file.
        length: bytes.
    """

    path: Path
    offset: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """A checkpoint folder: configuration, tensor index, lazy tensors. Opening one checks headers and file sizes.

    Attributes:
        format: of quantised weights that no layer computes with; None of other checkpoints, Model Optimizer's FP8 too.
        packed: those weights, by the names of plain ones; they are dequantised when they are loaded. The tensors that
            hold them are not among the others.

    Raises:
        CheckpointError: no such folder, no ``config.json``, not a Qwen2.5-VL, no safetensors, a shard missing,
            truncated or corrupt, an incomplete download, a tensor of a type that torch lacks, or a quantisation that
            is not read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.exists():
            raise CheckpointError(f"{self.folder}: there is no such folder")
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is a file; a checkpoint is a folder with config.json")
        refuse_foreign(self.folder)
        self.config = Qwen2VLConfig.from_folder(self.folder)
        self._shards, self._locations = _read_index(self.folder)
        self.packed: dict[str, PackedWeight] = {}
        parts: set[str] = set()
        self.format = stated_format(self.folder)
        if self.format is not None:
            self.packed, parts = packed_weights(self.folder, self.format, self._locations, self._read)
        self._plain = {name: location for name, location in self._locations.items() if name not in parts}

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, sorted."""
        return tuple(sorted({*self._plain, *self.packed}))

    @property
    def weight_files(self) -> frozenset[Path]:
        """The real files of all tensors."""
        return frozenset(self._shards.values())

    @property
    def companions(self) -> tuple[Path, ...]:
        """The model's files beside the weights: configuration, tokenizer, templates, index, record."""
        return tuple(path for name in (*_HASHED_FILES, INDEX_FILE, RECORD) if (path := self.folder / name).is_file())

    def __contains__(self, name: str) -> bool:
        return name in self._plain or name in self.packed

    def entry(self, name: str) -> TensorLocation | PackedWeight:
        """The type and the shape of a tensor as it is loaded; reads nothing.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        return self.packed[name] if name in self.packed else self.locate(name)

    def locate(self, name: str) -> TensorLocation:
        """Where a tensor's bytes lie; reads nothing.

        Raises:
            CheckpointError: the checkpoint has no such tensor, or not as it is loaded (``packed``).
        """
        try:
            return self._plain[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: there is no tensor {name!r}") from None

    def load(self, name: str) -> Tensor:
        """Read one tensor, on the CPU, in its own type and shape; it may be a memory map of the file.

        Raises:
            CheckpointError: no such tensor, or the file changed since the folder was opened.
        """
        if name in self.packed:
            return self.packed[name].read().dequantize().to(self.packed[name].dtype)
        self.locate(name)
        return self._read(name)

    def map(self, name: str) -> Tensor:
        """One tensor as a private memory map of its own part of the file, which ends with the tensor.

        Those of :meth:`load` map the whole file each. It may lie at an odd address.

        Raises:
            CheckpointError: no such tensor, or no room for it.
        """
        location = self.locate(name)
        try:
            values = np.memmap(location.path, np.uint8, "c", location.offset, (location.length,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{location.path}: tensor {name!r} cannot be mapped: {reason(error)}") from None
        return torch.from_numpy(values).view(location.dtype).view(location.shape)

    def _read(self, name: str) -> Tensor:
        return load_tensor(self._locations[name].path, name)

    @cached_property
    def hash(self) -> str:
        """SHA-256 that identifies the model, in hex.

        It covers config, tokenizer, preprocessor and template files, every shard's header, and the first and last
        4 KiB of every tensor; all of it would be 15 GB to read at each start, and training moves all weights of a
        tensor. An edit in the middle of a large tensor goes unseen.
        """
        digest = hashlib.sha256()

        def add(data: bytes) -> None:
            """With its length, so that two fields cannot trade bytes."""
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)

        for name in _HASHED_FILES:
            path = self.folder / name
            if path.is_file():
                add(name.encode())
                add(path.read_bytes())
        for name, path in self._shards.items():
            add(name.encode())
            here = (location for location in self._locations.values() if location.path == path)
            with path.open("rb") as file:
                add(file.read(int.from_bytes(file.read(8), "little")))
                for location in sorted(here, key=lambda location: location.offset):
                    head = min(location.length, _SAMPLE)
                    tail = min(location.length - head, _SAMPLE)
                    file.seek(location.offset)
                    add(file.read(head))
                    file.seek(location.offset + location.length - tail)
                    add(file.read(tail))
        return digest.hexdigest()


def load_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file, on the CPU; it may be a memory map of the file.

    Raises:
        CheckpointError: it cannot be read, or is not there.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: no room for the map
        raise CheckpointError(f"{path}: tensor {name!r} cannot be read: {reason(error)}") from None


def _read_index(folder: Path) -> tuple[dict[str, Path], dict[str, TensorLocation]]:
    """The shards (name to real file) and the tensors (name to location) of a folder."""
    if (folder / SINGLE_FILE).is_file():  # before the index, as in Transformers
        path = (folder / SINGLE_FILE).resolve()
        return {SINGLE_FILE: path}, read_header(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        if any(folder.glob("*.bin")):
            raise CheckpointError(
                f"{folder} has its weights as pickled .bin files, which are not read;"
                " safetensors are needed (in Transformers: model.save_pretrained(folder))"
            )
        raise lacking(folder, f"has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")

    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX_FILE}: weight_map does not map tensor names to file names")
    named = sorted(set(weight_map.values()))
    there = {path.name for path in folder.iterdir() if path.is_file()}
    for shard in named:
        if Path(shard).name != shard:
            raise CheckpointError(f"{folder / INDEX_FILE} names {shard!r}, which is not a file name in that folder")
    missing = [shard for shard in named if shard not in there]
    if missing:
        part = f"{len(named) - len(missing)} of the {len(named)} shards that {INDEX_FILE} names"
        raise lacking(folder, f"has {part}; {missing[0]} is missing")
    shards = {shard: (folder / shard).resolve() for shard in named}
    headers = {shard: read_header(folder / shard) for shard in named}
    locations = {}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{folder / shard} does not hold tensor {name!r}, which {INDEX_FILE} places there")
        locations[name] = headers[shard][name]
    return shards, locations


def header_of(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | Mapping[str, torch.dtype]) -> bytes:
    """What a safetensors file begins with whose tensors, of one type or each of its own, follow in this order."""
    name_of = {kind: name for name, kind in _DTYPES.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        kind = dtype if isinstance(dtype, torch.dtype) else dtype[name]
        begin, end = end, end + kind.itemsize * math.prod(shape)
        header[name] = {"dtype": name_of[kind], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_tensors(path: Path, entries: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file, one tensor in memory at a time.

    Args:
        entries: the tensors' types and shapes, by name; they may be on the meta device.
        tensors: all of them by name, in any order.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    placed = sorted(entries, key=lambda name: -entries[name].itemsize)  # readers want each at a multiple of its size
    header = header_of(
        {name: tuple(entries[name].shape) for name in placed}, {name: entries[name].dtype for name in placed}
    )
    offsets, end = {}, len(header)
    for name in placed:
        offsets[name], end = end, end + entries[name].nbytes
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            file.seek(offsets[name])
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def read_header(path: Path) -> dict[str, TensorLocation]:
    """Read and check the header of one safetensors file: tensor name to location.

    Raises:
        CheckpointError: the file is truncated, longer than its header says, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if prefix == _LFS_POINTER:
                raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; `git lfs pull` fetches them")
            header_length = int.from_bytes(prefix, "little") if len(prefix) == 8 else -1
            if not 0 < header_length <= min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{path} is truncated or no safetensors file ({size:,} bytes)")
            raw = json.loads(file.read(header_length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is corrupt: its header is not JSON") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is corrupt: its header is not a JSON object")

    start = 8 + header_length
    real = path.resolve()
    entries = {name: entry for name, entry in raw.items() if name != "__metadata__"}
    locations = {name: _location(path, real, start, name, entry) for name, entry in entries.items()}
    end = start
    for location in sorted(locations.values(), key=lambda location: (location.offset, location.length)):
        if location.offset != end:
            raise CheckpointError(f"{path} is corrupt: its tensors overlap or leave gaps at byte {end:,}")
        end += location.length
    if end != size:
        state = "truncated" if size < end else "corrupt"
        raise CheckpointError(f"{path} is {state}: it has {size:,} bytes, its header promises {end:,}")
    return locations


def _location(path: Path, real: Path, start: int, name: str, entry: Any) -> TensorLocation:
    try:
        dtype_name, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        whole = (
            isinstance(dtype_name, str)
            and len(shape) <= _MAX_RANK
            and all(type(number) is int and 0 <= number < 2**63 for number in (begin, end, *shape))
        )
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is corrupt: the header's entry for tensor {name!r} makes no sense")
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name!r} has type {dtype_name!r}; supported are {', '.join(_DTYPES)}")
    length = math.prod(shape) * dtype.itemsize
    if end - begin != length:
        raise CheckpointError(
            f"{path} is corrupt: tensor {name!r} {dtype_name} {list(shape)} needs {length:,} bytes,"
            f" its header gives it {end - begin:,}"
        )
    return TensorLocation(real, start + begin, length, dtype, shape)
