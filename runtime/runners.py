"""What the pipeline asks of a backend, and how an engine folder becomes one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engines.backends import DTYPES
from engines.manifest import Manifest
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.windows import WindowLayout


class VisionRunner(Protocol):
    """Runs the vision engine."""

    def __call__(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        """Embed one packed batch: ``[W, S, qwen2_vl_dim]`` on the runner's device to ``[T, C]``."""
        ...


class Step(NamedTuple):
    """``logits [B, V]`` FP32 of each row's last token; ``hidden_states [B, S, C]`` where asked for.

    Both may be buffers that the next step overwrites.
    """

    logits: Tensor
    hidden_states: Tensor | None


class DecoderRunner(Protocol):
    """Runs the decoder engine over its own cache."""

    slots: int

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
            position_ids: ``[3, B, S]`` int64.
            starts: B numbers of tokens that the slots hold so far.
            hidden: return the hidden states too.
        """
        ...

    def reset(self) -> None:
        """Release the cache's memory; only while no slot is in use."""
        ...


@dataclass(frozen=True)
class Engines:
    """An opened engine folder."""

    folder: Path
    manifest: Manifest
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    vision: VisionRunner
    decoder: DecoderRunner


def open_engines(folder: str | Path, device: str | None = None) -> Engines:
    """Check an engine folder against its manifest and load it.

    Args:
        folder: as ``build_engines.py`` wrote it.
        device: ``cpu``, ``cuda``, ``cuda:1``; by default a GPU where the backend can use one here.

    Raises:
        EngineError: no engine, damaged, of another format, or not runnable here.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    checkpoint = manifest.verify(folder)
    dtype = DTYPES[manifest.precision]
    if manifest.backend == "torch":
        from . import torch_runner as runner
    elif manifest.backend == "onnxruntime":
        from . import onnxruntime_runner as runner  # type: ignore[no-redef]
    else:
        raise EngineError(f"{folder} is for backend {manifest.backend!r}, which this release cannot run")
    chosen = torch.device(device or runner.default_device())
    vision, decoder = runner.load(folder, checkpoint, manifest.profile, dtype, chosen)
    return Engines(folder, manifest, checkpoint, chosen, dtype, vision, decoder)
