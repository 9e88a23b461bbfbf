"""Which keys a query sees, written out as a mask: the way round ``key_value_lengths`` of TensorRT's attention.

Lengths say the same in fewer bytes, and a kernel that knows them need not read beyond them. But TensorRT 11.1 and 11.2
are reported to build attention with lengths that sees what lies beyond them, in BF16 and on some GPUs alone, and not to
build it in FP16 at all (https://github.com/NVIDIA/TensorRT-Model-Connect/pull/1035 and 1048). A mask means one thing.
TensorRT-RTX 1.7.1 makes one of the lengths itself wherever a prompt is read, and runs the same kernels either way.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ATTENTION_MASKS = ("explicit", "lengths")
"""``--attention-mask``: a mask, or TensorRT's own lengths and causal kind."""


class MaskMaker:
    """Makes masks in a network, one for all attentions that see alike.

    Attributes:
        arrays: that the network points to; keep them until it is built.
    """

    def __init__(self, trt: Any, network: Any) -> None:
        self._trt, self._network = trt, network
        self._made: dict[tuple[str, str | None], Any] = {}
        self.arrays: list[np.ndarray] = []

    def mask(self, queries: Any, keys: Any, lengths: Any, starts: Any | None) -> Any:
        """``[B, 1, S, M]``, true where a query sees a key.

        Args:
            queries: ``[B, H, S, D]``.
            keys: ``[B, Hkv, M, D]``.
            lengths: ``[B]`` int64 keys that there are.
            starts: ``[B]`` int64 position of a row's first query, which sees no key behind its own; None where all do.
        """
        known = lengths.name, starts.name if starts is not None else None
        if known not in self._made:
            mask = self._make(queries, keys, lengths, starts)
            mask.name = mask_name(lengths.name)
            self._made[known] = mask
        return self._made[known]

    def _make(self, queries: Any, keys: Any, lengths: Any, starts: Any | None) -> Any:
        operation = self._trt.ElementWiseOperation
        key = self._shaped(self._count(keys, 1), (1, 1, 1, -1))
        there = self._combine(key, self._shaped(lengths, (-1, 1, 1, 1)), operation.LESS)
        # The sizes only shape what is counted here: as numbers on the GPU they would have to be copied there first.
        if starts is None:  # TensorRT broadcasts a mask over rows and heads, not over queries
            row = self._shaped(self._count(queries, 0), (1, 1, -1, 1))
            every = self._combine(row, self._constant(1, (1, 1, 1, 1)), operation.LESS)
            return self._combine(there, every, operation.AND)
        query = self._shaped(self._count(queries, 1), (1, 1, -1, 1))
        first = self._shaped(starts, (-1, 1, 1, 1))
        ahead = self._combine(self._combine(key, query, operation.SUB), first, operation.SUB)
        before = self._combine(ahead, self._constant(1, (1, 1, 1, 1)), operation.LESS)
        return self._combine(there, before, operation.AND)

    def _count(self, tensor: Any, step: int) -> Any:
        """``[n]`` 0, step, 2 step, ...: one for each position of a tensor ``[B, H, n, D]``."""
        shape = self._network.add_shape(tensor).get_output(0)
        size = self._network.add_gather(shape, self._constant(2, (1,)), 0).get_output(0)
        fill = self._network.add_fill((1,), self._trt.FillOperation.LINSPACE, self._trt.int64)
        for index, value in enumerate((size, self._constant(0, ()), self._constant(step, (1,)))):
            fill.set_input(index, value)
        return fill.get_output(0)

    def _constant(self, value: int, shape: tuple[int, ...]) -> Any:
        self.arrays.append(np.full(shape, value, dtype=np.int64))
        return self._network.add_constant(shape, self._trt.Weights(self.arrays[-1])).get_output(0)

    def _shaped(self, tensor: Any, shape: tuple[int, ...]) -> Any:
        layer = self._network.add_shuffle(tensor)
        layer.reshape_dims = shape
        return layer.get_output(0)

    def _combine(self, left: Any, right: Any, operation: Any) -> Any:
        return self._network.add_elementwise(left, right, operation).get_output(0)


def mask_name(lengths: str) -> str:
    """Of the mask that is made from these lengths."""
    return f"{lengths}_mask"
