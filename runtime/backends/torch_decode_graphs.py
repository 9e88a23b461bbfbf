"""The torch decoder's steps of one new token a slot, under CUDA graphs: one launch instead of hundreds.

One graph for each number of slots and of keys of :mod:`qwen2vl_trt.runtime.backends.decode_buckets`, captured when a
step first needs it. All run over the same buffers: inputs are copied in, the likeliest tokens are found inside, and
nothing waits for the GPU. What graphs use in between comes from one pool, for they run one after another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from qwen2vl_trt.decoder import Decoder, SlotMapping
from qwen2vl_trt.varlen import CuSeqlens

from ..sending import send
from .decode_buckets import graph_length, graph_rows, graph_size
from .kv_cache import KVCache
from .runners import Step
from .torch_caches import NewTokenCache, NewTokens

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
        fused: use :func:`qwen2vl_trt.varlen.decode_attention`.
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
        self._bounds = CuSeqlens.of(slots, cache.k[0]) if fused else None
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
        self._numbers[: 5 * size].copy_(send(numbers.view(-1), self._numbers.device))
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
        bounds = self._bounds and CuSeqlens(*(bound[: size + 1] for bound in self._bounds))
        slot_mapping = SlotMapping(
            self._rows[:size], numbers[3].clone()
        )  # compiled functions want it at the begin of its memory
        new = NewTokens.of(slot_mapping, numbers[4], longest, self._inputs_embeds.dtype, bounds)
        caches = [NewTokenCache(k, v, new) for k, v in zip(self._cache.k, self._cache.v)]
        hidden_states, _ = self._module.model(self._inputs_embeds[:size], numbers[:3, :, None], caches)
        self._hidden_states[:size].copy_(hidden_states)
        self._logits[:size].copy_(self._module.lm_head(hidden_states[:, 0]))
        torch.argmax(self._logits[:size], dim=-1, out=self._greedy[:size])
