"""The interface of a backend, and opening an engine folder."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.backends import BACKENDS, Backend
from qwen2vl_trt.engines.host_memory import warn_of_memory
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.engines.precision import Precision, computed_on_cpu
from qwen2vl_trt.errors import BuildError, EngineError
from qwen2vl_trt.lora import Adapter, Factors
from qwen2vl_trt.windows import WindowLayout

from .common import KVCache
from .paged_cache import PagedKVCache
from .steps import Chunk, Step


class VisionRunner(Protocol):
    """Runs the vision engine.

    Attributes:
        padded: attention costs as much for each sequence of a call as for the longest.
    """

    @property
    def padded(self) -> bool: ...

    def __call__(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        """Embed one packed batch: ``[W, S, qwen2_vl_dim]`` on the runner's device to ``[T, C]``."""


class DecoderRunner(Protocol):
    """Runs the decoder engine and owns its key-value cache.

    Attributes:
        slots: most requests under way, ``max_num_seqs``.
        vocab_size: V, the width of the logits.
        cache: their keys and values.
        packed: a step takes chunks of any lengths and slots without padding. Otherwise the slots must be neighbours in
            ascending order, and shorter chunks are padded to the longest, within the cache's ``max_seq_len``.
        enqueues: on a GPU, a step returns before it has been computed.
    """

    slots: int
    vocab_size: int
    packed: bool
    enqueues: bool

    @property
    def cache(self) -> KVCache | PagedKVCache: ...

    def embed(self, token_ids: list[int] | Tensor) -> Tensor:
        """Text embeddings ``[n, C]``."""

    def step(
        self,
        chunks: Sequence[Chunk],
        inputs_embeds: Tensor,
        position_ids: Tensor,
        wanted: Sequence[int] | None = None,
        hidden: bool = False,
    ) -> Step:
        """Append tokens to slots, T together, in one call of the engine.

        Args:
            chunks: of different slots.
            inputs_embeds: ``[T, C]``, chunk after chunk.
            position_ids: ``[3, T]`` int64, on the host.
            wanted: the numbers of the chunks, ascending, that logits are returned of; by default all.
            hidden: return the hidden states too.
        """

    def reset(self) -> None:
        """Release the cache's memory; no slot may be in use."""

    def warm_up(self, chunk: int, longest: int) -> None:
        """Allocate, and capture CUDA graphs, before the first request. Call :meth:`reset` afterwards.

        Args:
            chunk: prompt tokens of a step.
            longest: most tokens of a slot.
        """


class RunnerModule(Protocol):
    """What :attr:`qwen2vl_trt.engines.backends.Backend.runner` names."""

    def default_device(self) -> str:
        """Raises EngineError if the backend runs on no device of this machine."""

    def load_vision(self, engines: Engines) -> VisionRunner: ...

    def load_decoder(self, engines: Engines) -> DecoderRunner: ...


@dataclass(frozen=True)
class Engines:
    """An opened engine folder. Each engine is loaded at its first use: image features need no decoder.

    Attributes:
        adapters: that requests may name.
    """

    folder: Path
    manifest: Manifest
    checkpoint: Checkpoint
    device: torch.device
    precision: Precision
    backend: Backend
    runner: RunnerModule
    adapters: Mapping[str, Factors] = field(default_factory=dict)

    def with_adapters(self, folders: Mapping[str, str | Path]) -> Engines:
        """The same engines, not loaded yet, with LoRA adapters that requests may name.

        Raises:
            EngineError: the backend runs none, or not on this device.
            CheckpointError: one cannot be read, does not fit, or changes more than the decoder's linear layers.
        """
        if self.backend.name != "torch" or self.device.type != "cpu":
            raise EngineError(
                f"adapters of requests (lora_modules) run with backend torch on a CPU, not with {self.backend.name} on"
                f" {self.device.type}; merge one into the engines with --lora"
            )
        adapters = {name: Adapter.read(Path(folder)).factors(self.checkpoint) for name, folder in folders.items()}
        return replace(self, adapters=adapters)

    @property
    def dtype(self) -> torch.dtype:
        """Of pixels and the vision engine; the decoder's is ``precision.decoder``."""
        return self.precision.vision

    @cached_property
    def vision(self) -> VisionRunner:
        """Raises EngineError if the engine does not load."""
        self._check_unchanged()
        with torch.inference_mode(False):  # the next caller may not be in it, and caches are written in place
            return self.runner.load_vision(self)

    @cached_property
    def decoder(self) -> DecoderRunner:
        """Raises EngineError if the engine does not load."""
        self._check_unchanged()
        with torch.inference_mode(False):
            return self.runner.load_decoder(self)

    def _check_unchanged(self) -> None:
        """The folder may have been rebuilt since it was opened."""
        if Manifest.read(self.folder) != self.manifest:
            raise EngineError(f"{self.folder} was built again since it was opened; open it again")


def parse_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1``. Raises EngineError for another, or a GPU that does not exist."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise EngineError(f"unknown device {name!r}; known: cpu, cuda, cuda:0 and so on")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineError(f"device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here")
    return device


def runner_module(backend: Backend) -> RunnerModule:
    """The module that runs a backend's engines; imports its package."""
    return cast(RunnerModule, import_module(backend.runner))


def open_engines(folder: str | Path, device: str | None = None) -> Engines:
    """Open an engine folder, after checking it against its manifest.

    Args:
        folder: as a build wrote it.
        device: see :func:`parse_device`; by default the backend's.

    Raises:
        EngineError: no folder, no engine, damaged, of another format, or not runnable here.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise EngineError(f"the engine folder is {folder!r:.60}; give its path, as a string or a pathlib.Path")
    folder = Path(folder)
    while True:
        manifest = Manifest.read(folder)
        try:
            checkpoint = manifest.verify(folder)
            break
        except EngineError:
            if Manifest.read(folder) == manifest:  # another one: a build's files took their places meanwhile
                raise
    try:
        backend = BACKENDS[manifest.backend]
        precision = backend.precision(manifest.precision)
    except (KeyError, BuildError):
        kind = f"backend {manifest.backend!r} in {manifest.precision!r}"
        raise EngineError(f"{folder} is for {kind}, which this release cannot run") from None
    try:
        backend = backend.with_options(manifest.options)
    except BuildError as error:
        raise EngineError(f"{folder}: its manifest is corrupt ({error}). Rebuild.") from None
    runner = runner_module(backend)
    chosen = parse_device(device or runner.default_device())
    if chosen.type == "cpu":
        if backend.measures_cpu:
            precision = computed_on_cpu(precision)
        warn_of_memory(checkpoint, backend, precision)
    return Engines(folder, manifest, checkpoint, chosen, precision, backend, runner)


def run_steps(decoder: DecoderRunner, chunk: int, rows: Collection[int]) -> None:
    """Warm up: one prompt chunk, then a decode step for every batch size in ``rows``.

    Overwrites the first slots; none may be in use.
    """
    decoder.cache.allot(max(rows), chunk + 1)
    for count, start, length in [(1, 0, chunk), *((count, 1, 1) for count in rows)]:
        embeds = decoder.embed([0] * length * count)
        positions = torch.arange(start, start + length).repeat(count).expand(3, -1)
        decoder.step([Chunk(slot, start, length) for slot in range(count)], embeds, positions)
