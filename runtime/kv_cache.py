"""The key-value cache of all slots: one row a slot, contiguous, so that a prefill touches its own row alone."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen2vl_trt.config import TextConfig
from qwen2vl_trt.errors import LimitError

_SMALLEST = 128


class KVCache:
    """Per layer ``k`` and ``v`` of ``[slots, Hkv, capacity, D]``.

    The capacity follows what is used, in powers of two up to ``max_seq_len``: ONNX Runtime's attention computes
    over all of it, whatever the rows' lengths. Or it is ``fixed`` at ``max_seq_len``: TensorRT takes no other.
    """

    def __init__(
        self,
        config: TextConfig,
        slots: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
        fixed: bool = False,
    ) -> None:
        self.slots, self.max_seq_len = slots, max_seq_len
        self._least = max_seq_len if fixed else min(_SMALLEST, max_seq_len)
        self._dtype, self._device = dtype, device
        self._config = config
        self.k, self.v = self._allocate(self._least)

    @property
    def capacity(self) -> int:
        """M, positions a row has now."""
        return self.k[0].shape[2]

    def reserve(self, length: int) -> None:
        """Make room for rows of ``length`` positions, keeping what is written.

        Raises:
            LimitError: more than ``max_seq_len``.
        """
        if length > self.max_seq_len:
            raise LimitError(f"{length:,} tokens do not fit the cache of {self.max_seq_len:,} (--max-seq-len)")
        if length <= self.capacity:
            return
        old, used = (self.k, self.v), self.capacity
        self.k, self.v = self._allocate(min(self.max_seq_len, 1 << (length - 1).bit_length()))
        for before, after in zip((*old[0], *old[1]), (*self.k, *self.v)):
            after[:, :, :used] = before

    def reset(self) -> None:
        """Forget everything and shrink: for when no slot is in use."""
        if self.capacity > self._least:
            self.k, self.v = self._allocate(self._least)

    def rows(self, first: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """Views ``[count, Hkv, capacity, D]`` of neighbouring slots, contiguous."""
        return [k[first : first + count] for k in self.k], [v[first : first + count] for v in self.v]

    def _allocate(self, capacity: int) -> tuple[list[Tensor], list[Tensor]]:
        shape = (self.slots, self._config.num_key_value_heads, capacity, self._config.head_dim)
        layers = range(self._config.num_hidden_layers)
        # Zeros, not empty: a masked key still enters the arithmetic, and NaN times zero is NaN.
        k, v = ([torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in layers] for _ in ("k", "v"))
        return k, v
