"""Checkpoints of real shapes without real weights, for machines that have no access to a hub."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qwen2vl_trt.checkpoint import SINGLE_FILE
from qwen2vl_trt.config import Qwen2VLConfig, read_json
from qwen2vl_trt.errors import BenchmarkError
from qwen2vl_trt.export.graphs import decoder_graph, vision_graph
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.weights import LM_HEAD, PATCH_EMBEDDING

_COMMON: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-VL-7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
"""Of the published checkpoints, by name."""

_PIXELS = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}  # as published; the tiny model's are smaller
_SPECIAL = tuple(name for name in _COMMON if name.endswith("_token_id"))
_DRAWN = 1 << 22  # weights that a thread draws at once


def config_of(name: str, layers: int | None = None, blocks: int | None = None) -> dict[str, Any]:
    """``config.json`` of a published checkpoint, with another depth where asked.

    Args:
        name: a key of :data:`SHAPES`.
        layers: of the decoder.
        blocks: of the vision tower. Where all blocks with full attention are cut off, the last one becomes one.

    Raises:
        BenchmarkError: an unknown name, or a depth below 1.
    """
    if name not in SHAPES:
        raise BenchmarkError(f"no shape of {name!r} is known without its config.json; known: {', '.join(SHAPES)}")
    shape = SHAPES[name]
    vision = _COMMON["vision_config"]
    layers = shape["num_hidden_layers"] if layers is None else layers
    blocks = vision["depth"] if blocks is None else blocks
    if layers < 1 or blocks < 1:
        raise BenchmarkError(f"{layers} layers and {blocks} blocks are not a model; both must be at least 1")
    full = [block for block in vision["fullatt_block_indexes"] if block < blocks] or [blocks - 1]
    cut = {"depth": blocks, "fullatt_block_indexes": full, "out_hidden_size": shape["hidden_size"]}
    return {**_COMMON, **shape, "num_hidden_layers": layers, "vision_config": vision | cut}


def write_sparse_checkpoint(folder: Path, config: dict[str, Any]) -> int:
    """Write a checkpoint in BF16 that is all zeros and takes no room on the disk; returns the weights' bytes."""
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes = _shapes(Qwen2VLConfig.from_dict(config))
    with _new_weights(folder, shapes) as (file, size):
        file.truncate(file.tell() + size)
    return size


def write_random_checkpoint(folder: Path, config: dict[str, Any]) -> int:
    """Write a checkpoint in BF16 with normal weights of standard deviation 0.02 and norms of 1.

    It gets the tiny model's tokenizer and template, and its special tokens, so that requests with images run from end
    to end; the words that it answers mean nothing.

    Returns:
        The weights' bytes.
    """
    companions = resolve_model("tiny").folder
    special = {name: value for name, value in read_json(companions / "config.json").items() if name in _SPECIAL}
    for source in sorted(companions.iterdir()):
        if source.suffix in (".json", ".jinja") and source.name != "config.json":
            shutil.copyfile(source, folder / source.name)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        edges = {"shortest_edge": _PIXELS["min_pixels"], "longest_edge": _PIXELS["max_pixels"]}
        (folder / name).write_text(json.dumps(read_json(companions / name) | _PIXELS | {"size": edges}, indent=2))
    config = config | special
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes = _shapes(Qwen2VLConfig.from_dict(config))
    with _new_weights(folder, shapes) as (file, size), ThreadPoolExecutor(os.cpu_count()) as pool:
        chunks = list(_chunks(shapes))
        for first in range(0, len(chunks), os.cpu_count() or 1):  # as many in memory as there are threads
            for raw in pool.map(_draw, chunks[first : first + (os.cpu_count() or 1)]):
                file.write(raw)
    return size


@dataclass(frozen=True)
class _Chunk:
    seed: int
    count: int
    norm: bool


def _chunks(shapes: dict[str, tuple[int, ...]]) -> Iterator[_Chunk]:
    seeds = count()
    for name, shape in shapes.items():
        norm, size = len(shape) == 1 and name.endswith("weight"), math.prod(shape)
        for first in range(0, size, _DRAWN):
            yield _Chunk(next(seeds), min(_DRAWN, size - first), norm)


def _draw(chunk: _Chunk) -> bytes:
    generator = torch.Generator().manual_seed(chunk.seed)
    weights = torch.ones(chunk.count) if chunk.norm else torch.randn(chunk.count, generator=generator) * 0.02
    return weights.to(torch.bfloat16).view(torch.int16).numpy().tobytes()


def random_checkpoint(name: str, layers: int | None, blocks: int | None, root: Path) -> Path:
    """Folder of a random checkpoint of a published shape, under ``root``; written where it is not there yet.

    Raises:
        BenchmarkError: an unknown name, or no room on the disk.
    """
    config = config_of(name, layers, blocks)
    folder = root / f"{name}-random-{config['num_hidden_layers']}-{config['vision_config']['depth']}"
    if (folder / SINGLE_FILE).is_file():
        return folder
    needed = 2 * sum(map(math.prod, _shapes(Qwen2VLConfig.from_dict(config)).values()))
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
        if free < needed:
            raise BenchmarkError(
                f"{root} has {free / 1e9:.1f} GB free, {name}'s weights take {needed / 1e9:.1f} GB; make room, or pass"
                " --layers and --blocks"
            )
        with tempfile.TemporaryDirectory(dir=root) as temporary:
            written = Path(temporary) / folder.name
            written.mkdir()
            write_random_checkpoint(written, config)
            written.rename(folder)
    except OSError as error:
        raise BenchmarkError(f"{folder}: {error.strerror or error}") from None
    return folder


def _shapes(config: Qwen2VLConfig) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a published checkpoint, by its name there."""
    shapes: dict[str, tuple[int, ...]] = {}
    for graph in (vision_graph(config, torch.bfloat16), decoder_graph(config, torch.bfloat16)):
        with torch.device("meta"):
            state = graph.module().state_dict()
        shapes |= {graph.prefix + name: tuple(tensor.shape) for name, tensor in state.items()}
    if config.text.tie_word_embeddings:
        del shapes[LM_HEAD]
    vision = config.vision
    kernel = (vision.in_chans, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes[PATCH_EMBEDDING] = (vision.hidden_size, *kernel)
    return shapes


@contextmanager
def _new_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[BinaryIO, int]]:
    """A safetensors file with its header written, and the bytes of BF16 that must follow."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / SINGLE_FILE).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        yield file, end
