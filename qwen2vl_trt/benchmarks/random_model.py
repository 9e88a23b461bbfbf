"""Checkpoints of published shapes without real weights, for machines that reach no hub."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qwen2vl_trt.checkpoint import SINGLE_FILE, header_of
from qwen2vl_trt.config import Qwen2VLConfig, read_json
from qwen2vl_trt.errors import BenchmarkError, reason
from qwen2vl_trt.export.graphs import decoder_graph, vision_graph
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.published import SHAPES, published_config
from qwen2vl_trt.runtime.preprocessing.settings import PixelSettings
from qwen2vl_trt.weights import LM_HEAD, PATCH_EMBEDDING

_DRAWN = 1 << 22  # weights that a thread draws at once
_Chunk = tuple[int, int, bool]  # seed, number of weights, whether they are a norm's


def config_of(name: str, layers: int | None = None, blocks: int | None = None) -> dict[str, Any]:
    """``config.json`` of a published checkpoint, with another depth where asked.

    Args:
        name: a key of :data:`~qwen2vl_trt.published.SHAPES`.
        layers: of the decoder.
        blocks: of the vision tower. Where all blocks with full attention are cut off, the last one becomes one.

    Raises:
        BenchmarkError: an unknown name, or a depth below 1.
    """
    if name not in SHAPES:
        raise BenchmarkError(f"no shape of {name!r} is known without its config.json; known: {', '.join(SHAPES)}")
    config = published_config(name)
    vision = config["vision_config"]
    layers = config["num_hidden_layers"] if layers is None else layers
    blocks = vision["depth"] if blocks is None else blocks
    if layers < 1 or blocks < 1:
        raise BenchmarkError(f"{layers} layers and {blocks} blocks are not a model; both must be at least 1")
    full = [block for block in vision["fullatt_block_indexes"] if block < blocks] or [blocks - 1]
    cut = vision | {"depth": blocks, "fullatt_block_indexes": full}
    return config | {"num_hidden_layers": layers, "vision_config": cut}


def write_sparse_checkpoint(folder: Path, config: dict[str, Any]) -> int:
    """Write a checkpoint in BF16 that is all zeros and takes no space on the disk; returns the weights' bytes."""
    with _new_weights(folder, config) as (file, shapes):
        size = 2 * sum(map(math.prod, shapes.values()))
        file.truncate(file.tell() + size)
    return size


def write_random_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Write a checkpoint in BF16 with normal weights of standard deviation 0.02 and norms of 1.

    It gets the tiny model's tokenizer, template and special tokens, so that requests with images run from end to end;
    the words that it answers mean nothing.
    """
    tiny = resolve_model("tiny").folder
    special = {name: value for name, value in read_json(tiny / "config.json").items() if name.endswith("_token_id")}
    for source in sorted(tiny.iterdir()):
        if source.suffix in (".json", ".jinja") and source.name != "config.json":
            shutil.copyfile(source, folder / source.name)
    low, high = PixelSettings().min_pixels, PixelSettings().max_pixels  # as published; the tiny model's are smaller
    limits = {"min_pixels": low, "max_pixels": high, "size": {"shortest_edge": low, "longest_edge": high}}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text(json.dumps(read_json(tiny / name) | limits, indent=2))
    threads = os.cpu_count() or 1
    with _new_weights(folder, config | special) as (file, shapes), ThreadPoolExecutor(threads) as pool:
        chunks = list(_chunks(shapes))
        for first in range(0, len(chunks), threads):  # as many in memory as there are threads
            for raw in pool.map(_draw, chunks[first : first + threads]):
                file.write(raw)


def _chunks(shapes: dict[str, tuple[int, ...]]) -> Iterator[_Chunk]:
    seeds = count()
    for name, shape in shapes.items():
        norm, size = len(shape) == 1 and name.endswith("weight"), math.prod(shape)
        for first in range(0, size, _DRAWN):
            yield next(seeds), min(_DRAWN, size - first), norm


def _draw(chunk: _Chunk) -> bytes:
    seed, size, norm = chunk
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(size) if norm else torch.randn(size, generator=generator) * 0.02
    return weights.to(torch.bfloat16).view(torch.int16).numpy().tobytes()


def random_checkpoint(name: str, layers: int | None, blocks: int | None, root: Path) -> Path:
    """Folder of a random checkpoint of a published shape, under ``root``; written where it is not there yet.

    Raises:
        BenchmarkError: an unknown name, or too little space on the disk.
    """
    config = config_of(name, layers, blocks)
    folder = root / f"{name}-random-{config['num_hidden_layers']}-{config['vision_config']['depth']}"
    if (folder / SINGLE_FILE).is_file():
        return folder
    needed = 2 * sum(map(math.prod, tensor_shapes(config).values()))
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
        if free < needed:
            raise BenchmarkError(
                f"{root} has {free / 1e9:.1f} GB free, {name}'s weights take {needed / 1e9:.1f} GB; free some, or pass"
                " --layers and --blocks"
            )
        with tempfile.TemporaryDirectory(dir=root) as temporary:
            written = Path(temporary) / folder.name
            written.mkdir()
            write_random_checkpoint(written, config)
            written.rename(folder)
    except OSError as error:
        raise BenchmarkError(f"{folder}: {reason(error)}") from None
    return folder


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a published checkpoint, by its name there."""
    model = Qwen2VLConfig.from_dict(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for graph in (vision_graph(model, torch.bfloat16), decoder_graph(model, torch.bfloat16)):
        with torch.device("meta"):
            state = graph.module().state_dict()
        shapes |= {graph.prefix + name: tuple(tensor.shape) for name, tensor in state.items()}
    if model.text.tie_word_embeddings:
        del shapes[LM_HEAD]
    vision = model.vision
    kernel = (vision.in_chans, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes[PATCH_EMBEDDING] = (vision.hidden_size, *kernel)
    return shapes


@contextmanager
def _new_weights(folder: Path, config: dict[str, Any]) -> Iterator[tuple[BinaryIO, dict[str, tuple[int, ...]]]]:
    """``config.json``, and a safetensors file with its header written: the BF16 of these shapes must follow."""
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes = tensor_shapes(config)
    with (folder / SINGLE_FILE).open("wb") as file:
        file.write(header_of(shapes, torch.bfloat16))
        yield file, shapes
