"""The torch backend's key-value cache on a GPU, and decode steps under CUDA graphs.

There is one graph for each padded batch size and length (:func:`~qwen2vl_trt.runtime.backends.common.padded_step`),
captured when first needed. All share input and output buffers and one memory pool. The argmax is part of the graph, and
the host never waits. For the caches see :class:`qwen2vl_trt.decoder.LayerCache`.

Letters: B batch, S new tokens, M cache capacity, D head size.
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

from .common import KVCache, padded_batch, padded_length, padded_step
from .runners import Step

logger = logging.getLogger(__name__)

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Captures what a function enqueues and returns its replay. Raises RuntimeError where that is not possible."""

_capture_lock = Lock()  # PyTorch captures one graph at a time in a process


@dataclass(frozen=True)
class Chunk:
    """A prompt chunk: B neighbouring slots that all hold the same number of tokens.

    Attributes:
        first: the first slot.
        end: tokens in each slot after the step.
        fused: use :func:`qwen2vl_trt.varlen.chunk_attention`.
        places: of the B * S new tokens, on the cache's device.
    """

    first: int
    end: int
    fused: bool
    places: Places


class ChunkCache(NamedTuple):
    """One layer's ``k`` and ``v`` ``[slots, Hkv, M, D]`` in a prompt chunk."""

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
        return chunk_attention(q, k, v) if chunk.fused else full_attention(q, k, v, causal=True)


@dataclass(frozen=True)
class NewTokens:
    """A decode step over the first B slots: what all layers share.

    Attributes:
        places: of the B new tokens.
        longest: keys that are read of each slot.
        fused: lengths ``[B]`` int32 and bounds for :func:`qwen2vl_trt.varlen.cached_attention`; None without it.
        mask: ``[B, 1, 1, longest]`` added to scores without the fused kernel.
    """

    places: Places
    longest: int
    fused: tuple[Tensor, CacheBounds] | None
    mask: Tensor | None

    @classmethod
    def of(
        cls, places: Places, lengths: Tensor, longest: int, dtype: torch.dtype, bounds: CacheBounds | None
    ) -> NewTokens:
        """Prepare a step of slots 0 to B - 1, which attend to ``lengths [B]`` int64 keys.

        ``dtype`` is that of queries and keys; ``bounds``, of B slots, are None without the fused kernel.
        """
        if bounds is not None:
            return cls(places, longest, (lengths.int(), bounds), None)
        beyond = torch.arange(longest, device=lengths.device) >= lengths[:, None]
        mask = torch.zeros(beyond.shape, dtype=dtype, device=lengths.device).masked_fill(beyond, -torch.inf)
        return cls(places, longest, None, mask[:, None, None])


class NewTokenCache(NamedTuple):
    """One layer's ``k`` and ``v`` ``[slots, Hkv, M, D]`` in a decode step."""

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
        # Query heads that share a key-value head become its queries: each key is read once, not once a head.
        shared = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        mask = new.mask.expand(-1, shared.shape[1], shared.shape[2], -1)
        k, v = k[:, :, : new.longest], v[:, :, : new.longest]
        return F.scaled_dot_product_attention(shared, k, v, attn_mask=mask).reshape(q.shape)


_Cache = TypeVar("_Cache", ChunkCache, NewTokenCache)


def _append(cache: _Cache, k: Tensor, v: Tensor) -> _Cache:
    rows, positions = cache.places
    for whole, new in ((cache.k, k), (cache.v, v)):
        whole[rows, :, positions] = new.transpose(1, 2).flatten(0, 1)
    return cache


class GraphCapture:
    """Captures CUDA graphs that share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with (
            _capture_lock,
            torch.cuda.device(self._device),
            torch.cuda.stream(torch.cuda.current_stream(self._device)),  # current again where a capture fails
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            body()
        return graph.replay


class DecodeGraphs:
    """Runs decode steps.

    Args:
        module: the decoder.
        cache: must never be reallocated.
        dtype: of activations and cache.
        device: of both.
        capture: None runs every step without a graph.
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
        self,
        first: int,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        starts: Sequence[int],
        slot_lengths: Sequence[int],
    ) -> Step | None:
        """One token a slot, see :meth:`qwen2vl_trt.runtime.backends.runners.DecoderRunner.step`.

        ``slot_lengths`` are the tokens in every slot. Returns buffers of the graph; None if a padding slot is full.
        """
        last = first + len(starts)
        batch = padded_batch(last, self._cache.slots)
        rows = padded_step(first, starts, slot_lengths, batch, self._cache.capacity)
        if rows is None:
            return None
        numbers = torch.zeros(5, batch, dtype=torch.int64)
        numbers[:3, first:last] = position_ids[:, :, 0]
        numbers[3:] = torch.tensor(rows)
        self._numbers[: 5 * batch].copy_(to_device(numbers.view(-1), self._numbers.device))
        self._inputs_embeds[first:last].copy_(inputs_embeds)
        key = batch, padded_length(max(rows[1]), self._cache.capacity)
        replay = self._replays.get(key)
        if replay is not None:
            replay()
        else:  # run this step eagerly, which also warms up for the capture; the next one replays
            self._run(*key)
            self._record(key)
        return Step(self._logits[first:last], self._hidden_states[first:last], self._greedy[first:last])

    def _record(self, key: tuple[int, int]) -> None:
        if self._capture is None:
            return
        try:
            self._replays[key] = self._capture(partial(self._run, *key))
        except RuntimeError as error:
            self._capture = None  # what fails for one shape fails for all
            logger.warning("decoding goes on without CUDA graphs, which costs time: %s", " ".join(str(error).split()))

    def _run(self, batch: int, longest: int) -> None:
        """The first ``batch`` slots over their first ``longest`` keys, from buffers to buffers."""
        numbers = self._numbers[: 5 * batch].view(5, batch)
        bounds = self._bounds and CacheBounds(*(bound[: batch + 1] for bound in self._bounds))
        places = Places(self._rows[:batch], numbers[3].clone())  # compiled functions expect a storage offset of 0
        new = NewTokens.of(places, numbers[4], longest, self._inputs_embeds.dtype, bounds)
        caches = [NewTokenCache(k, v, new) for k, v in zip(self._cache.k, self._cache.v)]
        hidden_states, _ = self._module.model(self._inputs_embeds[:batch], numbers[:3, :, None], caches)
        self._hidden_states[:batch].copy_(hidden_states)
        self._logits[:batch].copy_(self._module.lm_head(hidden_states[:, 0]))
        torch.argmax(self._logits[:batch], dim=-1, out=self._greedy[:batch])
