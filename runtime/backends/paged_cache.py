"""The key-value cache in pages, which sequences share and give back one by one; vLLM's PagedAttention.

https://arxiv.org/abs/2309.06180. Page 0 belongs to nobody: what pads a captured step is written there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qwen2vl_trt.config import TextConfig
from qwen2vl_trt.errors import LimitError

from .common import Places
from .steps import Chunk

PAGE = 256
"""Tokens of a page: FlashAttention takes multiples of it."""


class PagedKVCache:
    """``k`` and ``v`` of every layer, each ``[pages, 256, Hkv, D]``.

    Attributes:
        pages: their number, page 0 included.
        block_table: ``[slots, pages of max_seq_len]`` int32, on the host: the pages of each slot, written by whoever
            gives them out.
        owner: the scheduler that gives out pages.
    """

    owner: object = None

    def __init__(
        self,
        config: TextConfig,
        slots: int,
        max_seq_len: int,
        pages: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.pages, self.max_seq_len = pages, max_seq_len
        self.block_table = np.zeros((slots, pages_of(max_seq_len)), np.int32)
        shape = (pages, PAGE, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.k, self.v = ([torch.zeros(shape, dtype=dtype, device=device) for _ in layers] for _ in ("k", "v"))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache."""
        return sum(cache.nbytes for cache in (*self.k, *self.v))

    def allot(self, count: int, length: int) -> None:
        """Give each of the first ``count`` slots pages for ``length`` tokens, without a scheduler.

        Raises:
            LimitError: there are not so many pages.
        """
        each = pages_of(length)
        if count * each >= self.pages:
            raise LimitError(f"{count} sequences of {length:,} tokens do not fit the cache of {self.pages - 1:,} pages")
        self.block_table[:count, :each] = np.arange(1, 1 + count * each).reshape(count, each)

    def slot_mapping(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """Where the new tokens go, ``[T]``: page times page size, plus the place in the page."""
        slots, positions = Places.of(chunks)
        pages = self.block_table[slots, positions // PAGE].astype(np.int64)
        return pages * PAGE + positions % PAGE

    def clear(self, pages: Sequence[int]) -> None:
        """Zero pages that may hold NaN: a masked key still enters the arithmetic, and NaN times zero is NaN."""
        for cache in (*self.k, *self.v):
            cache[list(pages)] = 0


def pages_of(tokens: int) -> int:
    """Pages that so many tokens fill."""
    return -(-tokens // PAGE)


def page_bytes(config: TextConfig, dtype: torch.dtype) -> int:
    """Bytes of a page: keys and values of all layers, and the prompt's embeddings, which recomputation needs."""
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return PAGE * (heads + config.hidden_size) * dtype.itemsize
