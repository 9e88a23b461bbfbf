"""Records what blocks give, on PyTorch modules, and brings it into one order.

The order is that of Transformers' processor, in which patches enter its vision tower: item by item, merge groups in
raster order, the patches of a group together. Both vision towers compute in another: by windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.windows import WindowLayout, unpad


class Recorder:
    """The outputs of blocks by name, FP32 on the CPU, one for each call since the last :meth:`clear`."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Tensor]] = {}

    def add(self, name: str, output: Tensor) -> None:
        """Keep a copy of an output."""
        self.calls.setdefault(name, []).append(output.detach().to("cpu", torch.float32, copy=True))

    def clear(self) -> None:
        """Forget everything."""
        self.calls.clear()

    @contextmanager
    def listen(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Record what modules return: the first of several outputs."""

        def hook(name: str) -> Any:
            return lambda module, inputs, output: self.add(name, output[0] if isinstance(output, tuple) else output)

        handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def vision_modules(tower: nn.Module) -> dict[str, nn.Module]:
    """The patch embedding and the blocks of a vision tower, ours or Transformers', by the checkpoint's names."""
    return {
        "visual.patch_embed": tower.get_submodule("patch_embed"),
        **{f"visual.blocks.{n}": block for n, block in enumerate(tower.get_submodule("blocks").children())},
    }


def decoder_modules(stack: nn.Module) -> dict[str, nn.Module]:
    """The layers of a decoder, ours or Transformers', by the checkpoint's names."""
    return {f"model.layers.{n}": layer for n, layer in enumerate(stack.get_submodule("layers").children())}


def in_patch_order(states: Tensor, layout: WindowLayout, config: VisionConfig) -> Tensor:
    """States of packed windows, ``[W, S, C]`` or without the empty slots ``[..., P, C]``, as ``[P, C]``.

    Transformers' towers keep the second form: their windows are ours without the empty slots.
    """
    states = states.flatten(0, -2)
    padded = len(states) == layout.sequence_position.numel()
    index = layout.merge_index if padded else unpad(layout, config).merge_index
    return states.unflatten(0, (-1, config.merge_unit))[index].flatten(0, 1)


def pack(patches: Tensor, layout: WindowLayout, config: VisionConfig) -> Tensor:
    """Patches ``[P, D]`` in Transformers' order as windows ``[W, S, D]``, empty slots zero."""
    windows, slots = layout.sequence_position.shape
    packed = patches.new_zeros(windows * slots // config.merge_unit, config.merge_unit, patches.shape[1])
    packed[layout.merge_index] = patches.unflatten(0, (-1, config.merge_unit))
    return packed.view(windows, slots, -1)
