"""The vision engine in processes of its own, for decoders that have none: TensorRT-LLM's disaggregated serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from qwen2vl_trt.errors import ExecutionError
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.windows import WindowLayout

_ATTEMPTS = 4
"""Encoders that may be lost with one call in hand."""


class Encoder:
    """A deployment of Ray Serve: the vision engine alone.

    Args:
        engine_dir: opened here.
        device: see :func:`~qwen2vl_trt.runtime.backends.runners.open_engines`.
    """

    def __init__(self, engine_dir: Path, device: str) -> None:
        self._engines = open_engines(engine_dir, device)
        self._runner = self._engines.vision

    async def padded(self) -> bool:
        """See :class:`~qwen2vl_trt.runtime.backends.runners.VisionRunner`."""
        return self._runner.padded

    def embed(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        """One call of the engine: ``[W, S, qwen2_vl_dim]`` to ``[T, C]``, both on the host."""
        with torch.inference_mode():
            return self._runner(pixel_values.to(self._engines.device), layout).cpu()


class RemoteVision:
    """A :class:`~qwen2vl_trt.runtime.backends.runners.VisionRunner` over encoders; its thread waits for each call.

    Pixels and embeddings go through Ray's object store.

    Args:
        encoders: of :class:`Encoder`.
        padded: of theirs.
        device: the decoder's.
    """

    def __init__(self, encoders: DeploymentHandle, padded: bool, device: torch.device) -> None:
        self._encoders, self.padded, self._device = encoders, padded, device

    def __call__(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        """Raises ExecutionError where encoders are lost over it, one after another."""
        pixels = pixel_values.cpu()
        for _ in range(_ATTEMPTS):
            try:
                embeds: Any = self._encoders.embed.remote(pixels, layout).result()
                return embeds.to(self._device)
            except RayActorError:
                continue
        raise ExecutionError(f"{_ATTEMPTS} encoders were lost with these images in hand")
