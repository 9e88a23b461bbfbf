"""What the pipeline asks of a backend, and how an engine folder becomes one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.backends import BACKENDS, Backend
from qwen2vl_trt.engines.host_memory import warn_of_memory
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.engines.precision import Precision
from qwen2vl_trt.errors import BuildError, EngineError
from qwen2vl_trt.windows import WindowLayout

from .common import KVCache


class VisionRunner(Protocol):
    """Runs the vision engine."""

    def __call__(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        """Embed one packed batch: ``[W, S, qwen2_vl_dim]`` on the runner's device to ``[T, C]``."""
        ...


class Step(NamedTuple):
    """``logits [B, V]`` FP32 of each row's last token; ``hidden_states [B, S, C]`` where asked for.

    ``greedy [B]`` int64 are the likeliest tokens, on the logits' device, where the backend computed them with the step.
    All may be buffers that the next step overwrites.
    """

    logits: Tensor
    hidden_states: Tensor | None
    greedy: Tensor | None = None


class DecoderRunner(Protocol):
    """Runs the decoder engine over its own cache."""

    slots: int
    cache: KVCache

    def embed(self, token_ids: list[int]) -> Tensor:
        """Text embeddings ``[n, C]``."""
        ...

    def step(
        self, first_slot: int, inputs_embeds: Tensor, position_ids: Tensor, starts: list[int], hidden: bool = False
    ) -> Step:
        """Append S tokens to each of B neighbouring slots.

        Args:
            first_slot: the first of the B slots.
            inputs_embeds: ``[B, S, C]``.
            position_ids: ``[3, B, S]`` int64, on the host.
            starts: B numbers of tokens that the slots hold so far.
            hidden: return the hidden states too.
        """
        ...

    def reset(self) -> None:
        """Release the cache's memory; only while no slot is in use."""
        ...

    def warm_up(self, chunk: int, longest: int) -> None:
        """Make ready for steps to come, CUDA graphs included; only while no slot is in use, and then :meth:`reset`.

        Args:
            chunk: tokens of a prompt that a step will read.
            longest: most tokens that a slot will hold.
        """
        ...


class RunnerModule(Protocol):
    """What :attr:`qwen2vl_trt.engines.backends.Backend.runner` names."""

    def default_device(self) -> str:
        """Raises EngineError where the backend runs on no device of this machine."""
        ...

    def load_vision(self, engines: Engines) -> VisionRunner: ...

    def load_decoder(self, engines: Engines) -> DecoderRunner: ...


@dataclass(frozen=True)
class Engines:
    """An opened engine folder. Each engine is loaded when it is first used: features of images need no decoder."""

    folder: Path
    manifest: Manifest
    checkpoint: Checkpoint
    device: torch.device
    precision: Precision
    backend: Backend
    runner: RunnerModule

    @property
    def dtype(self) -> torch.dtype:
        """Of pixels, and of all that the vision engine computes; the decoder's is ``precision.decoder``."""
        return self.precision.vision

    @cached_property
    def vision(self) -> VisionRunner:
        """Raises EngineError where the engine does not load."""
        self._check_unchanged()
        return self.runner.load_vision(self)

    @cached_property
    def decoder(self) -> DecoderRunner:
        """Raises EngineError where the engine does not load."""
        self._check_unchanged()
        return self.runner.load_decoder(self)

    def _check_unchanged(self) -> None:
        """One engine may be loaded long after the other: not from another build."""
        if Manifest.read(self.folder) != self.manifest:
            raise EngineError(f"{self.folder} was built again since it was opened; open it again")


def parse_device(name: str) -> torch.device:
    """A device by its name.

    Raises:
        EngineError: unknown, or a GPU that is not there.
    """
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
    """Check an engine folder against its manifest and load it.

    Args:
        folder: as a build wrote it.
        device: ``cpu``, ``cuda``, ``cuda:1``; by default a GPU where the backend can use one here.

    Raises:
        EngineError: no engine, damaged, of another format, or not runnable here.
    """
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
        warn_of_memory(checkpoint, backend, precision)
    return Engines(folder, manifest, checkpoint, chosen, precision, backend, runner)


def run_steps(decoder: DecoderRunner, chunk: int, rows: Collection[int], lengths: Collection[int] = (1,)) -> None:
    """A chunk of a prompt in the first slot, then one token in each number of rows at each length.

    Writes over the first slots' rows of the cache.

    Args:
        decoder: no slot of which is in use.
        chunk: tokens of the prompt.
        rows: numbers of slots that decode together.
        lengths: tokens that each of them then holds, the new one included.
    """
    shapes = [(1, chunk, 0), *((count, 1, length - 1) for count in rows for length in lengths)]
    for count, tokens, start in shapes:
        embeds = decoder.embed([0] * tokens)[None].repeat(count, 1, 1)
        decoder.step(0, embeds, torch.arange(start, start + tokens).expand(3, count, -1), [start] * count)
