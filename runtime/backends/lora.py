"""Several LoRA adapters over one decoder, unmerged: every request of a step has its own, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2vl_trt.lora import Factors

from .steps import Chunk


class StepAdapters:
    """Which tokens of the step under way belong to which adapter; all layers look here.

    Attributes:
        places: of the tokens of each adapter, int64; empty outside a step, and for requests without one.
    """

    def __init__(self) -> None:
        self.places: dict[str, Tensor] = {}

    @contextmanager
    def step(self, chunks: Sequence[Chunk]) -> Iterator[None]:
        """Surrounds a step over these chunks, one after the other."""
        places: dict[str, list[int]] = {}
        start = 0
        for chunk in chunks:
            if chunk.adapter is not None:
                places.setdefault(chunk.adapter, []).extend(range(start, start + chunk.length))
            start += chunk.length
        self.places = {name: torch.tensor(each) for name, each in places.items()}
        try:
            yield
        finally:
            self.places = {}


class LoraLinear(nn.Module):
    """A linear layer, and ``B @ (A @ x)`` added for the tokens of each adapter that has factors for it."""

    def __init__(self, base: nn.Module, step: StepAdapters) -> None:
        super().__init__()
        self.base = base
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._step = step

    def forward(self, x: Tensor) -> Tensor:
        """``x [1, T, C]``."""
        y = self.base(x)
        for name, places in self._step.places.items():
            if name in self.factors:
                down, up = self.factors[name]
                y[0].index_add_(0, places, F.linear(F.linear(x[0, places], down), up))
        return y


def add_adapters(module: nn.Module, adapters: Mapping[str, Factors], dtype: torch.dtype) -> StepAdapters:
    """Put a :class:`LoraLinear` in the place of every layer of a decoder that an adapter has factors for."""
    step = StepAdapters()
    for name, factors in adapters.items():
        for path, (down, up) in factors.items():
            layer = module.get_submodule(path)
            if not isinstance(layer, LoraLinear):
                layer = LoraLinear(layer, step)
                owner, _, leaf = path.rpartition(".")
                setattr(module.get_submodule(owner), leaf, layer)
            layer.factors[name] = down.to(dtype), up.to(dtype)
    return step
