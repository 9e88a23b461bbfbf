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

    Attributes:
        owner: who wrote last; a scheduler that finds another's mark trusts nothing that it left here.
    """

    owner: object = None

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
    def nbytes(self) -> int:
        """Bytes of the whole cache now."""
        return sum(cache.nbytes for cache in (*self.k, *self.v))

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
        self._resize(self._bucket(length))

    def trim(self, length: int) -> None:
        """Shrink to what rows of ``length`` positions need, keeping those; for when no longer row is in use."""
        capacity = self._bucket(length)
        if capacity < self.capacity:
            self._resize(capacity)

    def reset(self) -> None:
        """Shrink to the smallest size: for when no slot is in use."""
        self.trim(0)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give slot ``target`` the first ``length`` positions of slot ``source``, on the device."""
        for cache in (*self.k, *self.v):
            cache[target, :, :length] = cache[source, :, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot in which NaN may lie: a masked key still enters the arithmetic, and NaN times zero is NaN."""
        for cache in (*self.k, *self.v):
            cache[slot].zero_()

    def rows(self, first: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """Views ``[count, Hkv, capacity, D]`` of neighbouring slots, contiguous."""
        return [k[first : first + count] for k in self.k], [v[first : first + count] for v in self.v]

    def _bucket(self, length: int) -> int:
        return min(self.max_seq_len, max(self._least, 1 << (max(length, 1) - 1).bit_length()))

    def _resize(self, capacity: int) -> None:
        """Both caches are allocated before either is given up: out of memory leaves everything as it was."""
        k, v = self._allocate(capacity)
        used = min(capacity, self.capacity)
        for before, after in zip((*self.k, *self.v), (*k, *v)):
            after[:, :, :used] = before[:, :, :used]
        self.k, self.v = k, v

    def _allocate(self, capacity: int) -> tuple[list[Tensor], list[Tensor]]:
        shape = (self.slots, self._config.num_key_value_heads, capacity, self._config.head_dim)
        layers = range(self._config.num_hidden_layers)
        # Zeros, not empty, for the reason that `clear` gives.
        k, v = ([torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in layers] for _ in ("k", "v"))
        return k, v
