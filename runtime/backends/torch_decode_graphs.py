"""The torch decoder's steps of one new token a slot, under CUDA graphs: one launch instead of hundreds.

One graph for each number of slots and of keys of :mod:`qwen2vl_trt.runtime.backends.common`, captured when a
step first needs it. All run over the same buffers: inputs are copied in, the likeliest tokens are found inside, and
nothing waits for the GPU. What graphs use in between comes from one pool, for they run one after another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2vl_trt.decoder import Decoder, Places
from qwen2vl_trt.ops import full_attention
from qwen2vl_trt.transfer import to_device
from qwen2vl_trt.varlen import CacheBounds, cached_attention, chunk_attention

from .common import KVCache, graph_length, graph_rows, graph_size
from .runners import Step

logger = logging.getLogger(__name__)

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function enqueues and returns what replays it. Raises RuntimeError where that cannot be."""


_capturing = Lock()
"""PyTorch captures one graph at a time in a process, whatever the thread."""


class GraphCapture:
    """Captures CUDA graphs on a GPU; they share their memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with (
            _capturing,
            torch.cuda.device(self._device),
            torch.cuda.stream(torch.cuda.current_stream(self._device)),  # current again where a capture fails
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            body()
        return graph.replay


class DecodeGraphs:
    """Steps of one new token a slot.

    Args:
        module: the decoder.
        cache: of all slots, which never moves.
        dtype: of activations and cache.
        device: of both.
        capture: None runs every step as it is.
        fused: use :func:`qwen2vl_trt.varlen.cached_attention`.
    """

    def __init__(
        self,
        module: Decoder,
        cache: KVCache,
        dtype: torch.dtype,
        device: torch.device,
        capture: Capture | None,
        fused: bool,
    ) -> None:
        self._module, self._cache, self._capture = module, cache, capture
        config, slots = module.config, cache.slots
        self._bounds = CacheBounds.of(slots, cache.k[0]) if fused else None
        self._replays: dict[tuple[int, int], Callable[[], None]] = {}
        self._rows = torch.arange(slots, device=device)
        self._numbers = torch.zeros(5 * slots, dtype=torch.int64, device=device)  # 3 positions, start, length
        self._inputs_embeds = torch.zeros(slots, 1, config.hidden_size, dtype=dtype, device=device)
        self._hidden_states = torch.empty_like(self._inputs_embeds)
        self._logits = torch.empty(slots, config.vocab_size, dtype=torch.float32, device=device)
        self._greedy = torch.empty(slots, dtype=torch.int64, device=device)

    def step(
        self, first: int, inputs_embeds: Tensor, position_ids: Tensor, starts: Sequence[int], held: Sequence[int]
    ) -> Step | None:
        """One step, whose outputs the next one overwrites; None where a full slot stands in the way.

        Args:
            first: the first of B neighbouring slots.
            inputs_embeds: ``[B, 1, C]``.
            position_ids: ``[3, B, 1]``, on the host.
            starts: tokens that they hold.
            held: tokens that each slot holds.
        """
        last = first + len(starts)
        size = graph_size(last, self._cache.slots)
        rows = graph_rows(first, starts, held, size, self._cache.capacity)
        if rows is None:
            return None
        numbers = torch.zeros(5, size, dtype=torch.int64)
        numbers[:3, first:last] = position_ids[:, :, 0]
        numbers[3:] = torch.tensor(rows)
        self._numbers[: 5 * size].copy_(to_device(numbers.view(-1), self._numbers.device))
        self._inputs_embeds[first:last].copy_(inputs_embeds)
        key = size, graph_length(max(rows[1]), self._cache.capacity)
        replay = self._replays.get(key)
        if replay is not None:
            replay()
        else:  # this step as it is, which makes ready what a capture cannot; the graph for the next one
            self._run(*key)
            self._record(key)
        return Step(self._logits[first:last], self._hidden_states[first:last], self._greedy[first:last])

    def _record(self, key: tuple[int, int]) -> None:
        if self._capture is None:
            return
        try:
            self._replays[key] = self._capture(partial(self._run, *key))
        except RuntimeError as error:
            self._capture = None  # what one graph cannot hold, the others cannot either
            logger.warning("decoding goes on without CUDA graphs, which costs time: %s", " ".join(str(error).split()))

    def _run(self, size: int, longest: int) -> None:
        """The first ``size`` slots over their first ``longest`` keys, from the buffers to the buffers."""
        numbers = self._numbers[: 5 * size].view(5, size)
        bounds = self._bounds and CacheBounds(*(bound[: size + 1] for bound in self._bounds))
        places = Places(self._rows[:size], numbers[3].clone())  # compiled functions want it at the begin of its memory
        new = NewTokens.of(places, numbers[4], longest, self._inputs_embeds.dtype, bounds)
        caches = [NewTokenCache(k, v, new) for k, v in zip(self._cache.k, self._cache.v)]
        hidden_states, _ = self._module.model(self._inputs_embeds[:size], numbers[:3, :, None], caches)
        self._hidden_states[:size].copy_(hidden_states)
        self._logits[:size].copy_(self._module.lm_head(hidden_states[:, 0]))
        torch.argmax(self._logits[:size], dim=-1, out=self._greedy[:size])


# MERGED runtime/backends/torch_decode_graphs.py: """How the torch backend writes to and attends to its cache on a GPU: without reading what no row uses.  See :class:`qwen2vl_trt.decoder.LayerCache`. Letters: B batch, S new tokens, T = B S, M cache capacity, D head size. """
@dataclass(frozen=True)
class Chunk:
    """Rows that all hold the same number of tokens, which the host knows: a chunk of a prompt.

    Attributes:
        first: the first of B neighbouring slots.
        end: tokens in each afterwards.
        fused: use :func:`qwen2vl_trt.varlen.chunk_attention`.
        places: of the B * S new tokens, on the cache's device.
    """

    first: int
    end: int
    fused: bool
    places: Places


class ChunkCache(NamedTuple):
    """One layer's cache for a chunk: ``k`` and ``v`` of ``[slots, Hkv, M, D]``."""

    k: Tensor
    v: Tensor
    chunk: Chunk

    @property
    def places(self) -> Places:
        return self.chunk.places

    def append(self, k: Tensor, v: Tensor) -> ChunkCache:
        return _append(self, k, v)

    def attend(self, q: Tensor) -> Tensor:
        chunk = self.chunk
        k, v = (cache[chunk.first : chunk.first + len(q), :, : chunk.end] for cache in (self.k, self.v))
        if chunk.fused:
            return chunk_attention(q, k, v)
        return full_attention(q, k, v, causal=True)


@dataclass(frozen=True)
class NewTokens:
    """One new token in each of the first B slots: what all layers share, made once a step.

    Attributes:
        places: of the B new tokens.
        longest: keys that are read at most; every row's tokens and its new one fit.
        fused: lengths ``[B]`` int32 and bounds for the fused kernel; None without it.
        mask: ``[B, 1, 1, longest]`` added to scores where there is no fused kernel.
    """

    places: Places
    longest: int
    fused: tuple[Tensor, CacheBounds] | None
    mask: Tensor | None

    @classmethod
    def of(
        cls, places: Places, lengths: Tensor, longest: int, dtype: torch.dtype, bounds: CacheBounds | None
    ) -> NewTokens:
        """What a step needs.

        Args:
            places: rows are 0 to B - 1.
            lengths: ``[B]`` int64 keys that each row attends to.
            longest: no less than any length.
            dtype: of queries and keys.
            bounds: of B rows, for :func:`qwen2vl_trt.varlen.cached_attention`; None without the fused kernel.
        """
        if bounds is not None:
            return cls(places, longest, (lengths.int(), bounds), None)
        beyond = torch.arange(longest, device=lengths.device) >= lengths[:, None]
        mask = torch.zeros(beyond.shape, dtype=dtype, device=lengths.device).masked_fill(beyond, -torch.inf)
        return cls(places, longest, None, mask[:, None, None])


class NewTokenCache(NamedTuple):
    """One layer's cache ``[slots, Hkv, M, D]`` in a step of one new token a slot; reads ``new.longest`` keys of it."""

    k: Tensor
    v: Tensor
    new: NewTokens

    @property
    def places(self) -> Places:
        return self.new.places

    def append(self, k: Tensor, v: Tensor) -> NewTokenCache:
        return _append(self, k, v)

    def attend(self, q: Tensor) -> Tensor:
        new, k, v = self.new, self.k[: len(q)], self.v[: len(q)]
        if new.fused is not None:
            lengths, bounds = new.fused
            return cached_attention(q[:, :, 0], k, v, lengths, new.longest, bounds)[:, :, None]
        assert new.mask is not None
        # The query heads that share a key-value head become its queries: each key is read once, not once a head.
        shared = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        mask = new.mask.expand(-1, shared.shape[1], shared.shape[2], -1)
        k, v = k[:, :, : new.longest], v[:, :, : new.longest]
        return F.scaled_dot_product_attention(shared, k, v, attn_mask=mask).reshape(q.shape)


_Placed = TypeVar("_Placed", ChunkCache, NewTokenCache)


def _append(cache: _Placed, k: Tensor, v: Tensor) -> _Placed:
    rows, positions = cache.places
    for whole, new in ((cache.k, k), (cache.v, v)):
        whole[rows, :, positions] = new.transpose(1, 2).flatten(0, 1)
    return cache
