"""Decoding under CUDA graphs, one for each number of slots of :mod:`qwen2vl_trt.runtime.backends.common`.

TensorRT: the state of a context is part of what is captured from it, so each graph has its own; they share their memory
(https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/best-practices.html, CUDA graphs).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.export.graphs import cache_names

from .common import KVCache, graph_rows, graph_size
from .tensorrt_context import ExecutionContext, Scratch
from .tensorrt_engine import Engine

logger = logging.getLogger(__name__)

_ALIGNED = 32  # int64 numbers in 256 bytes


@dataclass
class _Graph:
    """A graph's memory, which must not be let go of. ``replay`` is None until it is captured."""

    context: ExecutionContext
    inputs_embeds: Tensor  # [n, 1, C]
    position_ids: Tensor  # [3, n, 1]
    lengths: Tensor  # [2, n and more]: cache_start, kv_lengths, each at an aligned address
    last_token: Tensor  # [n]
    logits: Tensor  # [n, V]
    hidden_states: Tensor  # [n, 1, C]
    activations: Tensor | None = None
    replay: Callable[[], None] | None = None


class DecodeGraphs:
    """One new token a slot.

    Args:
        engine: the decoder.
        cache: of all slots, which never moves.
        profile: index of the generation profile.
    """

    def __init__(self, engine: Engine, cache: KVCache, profile: int) -> None:
        self._engine, self._cache, self._profile = engine, cache, profile
        self._graphs: dict[int, _Graph] = {}
        self._scratch = Scratch(engine.device.torch_device)

    def step(
        self, first: int, inputs_embeds: Tensor, position_ids: Tensor, starts: list[int], held: Sequence[int]
    ) -> tuple[Tensor, Tensor] | None:
        """Logits ``[B, V]`` and hidden states ``[B, 1, C]``, which the next step overwrites; None where it cannot.

        Args:
            first: the first of B neighbouring slots.
            inputs_embeds: ``[B, 1, C]``.
            position_ids: ``[3, B, 1]``.
            starts: tokens that they hold.
            held: tokens that each slot holds.

        Raises:
            EngineError: TensorRT's own reason.
        """
        last = first + len(starts)
        size = graph_size(last, self._cache.slots)
        rows = graph_rows(first, starts, held, size, self._cache.capacity)
        if rows is None:
            return None
        device = self._engine.device
        with device.stream() as stream:
            graph = self._graphs.get(size) or self._prepare(size, stream)
            graph.inputs_embeds[first:last].copy_(inputs_embeds)
            graph.position_ids[:, first:last].copy_(device.staged(position_ids), non_blocking=True)
            graph.lengths[:, :size].copy_(device.staged(torch.tensor(rows)), non_blocking=True)
            if graph.replay is not None:
                graph.replay()
            else:  # this step as it is, which TensorRT needs before a capture; the graph for the next one
                graph.context.enqueue(stream)
                self._capture(graph, stream)
        return graph.logits[first:last], graph.hidden_states[first:last]

    def _prepare(self, size: int, stream: int) -> _Graph:
        engine, device = self._engine, self._engine.device.torch_device
        # Of the profile's largest batch, so that it never moves under a graph.
        self._scratch.at_least(engine.handle.get_device_memory_size_for_profile_v2(self._profile))
        context = ExecutionContext(engine, self._profile, self._scratch, stream, specialise=True)
        tensors = engine.tensors
        width, vocab_size = tensors["inputs_embeds"].shape[2], tensors["logits"].shape[1]
        embeds = torch.zeros(size, 1, width, dtype=tensors["inputs_embeds"].dtype, device=device)
        graph = _Graph(
            context,
            inputs_embeds=embeds,
            position_ids=torch.zeros(3, size, 1, dtype=torch.int64, device=device),
            lengths=torch.zeros(2, -(-size // _ALIGNED) * _ALIGNED, dtype=torch.int64, device=device),
            last_token=torch.zeros(size, dtype=torch.int64, device=device),
            logits=torch.empty(size, vocab_size, dtype=tensors["logits"].dtype, device=device),
            hidden_states=torch.empty_like(embeds, dtype=tensors["hidden_states"].dtype),
        )
        inputs = {
            "inputs_embeds": graph.inputs_embeds,
            "position_ids": graph.position_ids,
            "cache_start": graph.lengths[0, :size],
            "kv_lengths": graph.lengths[1, :size],
            "last_token": graph.last_token,
        }
        caches = {
            name: cache
            for names, rows in zip(cache_names(len(self._cache.k)), self._cache.rows(0, size))
            for name, cache in zip(names, rows)
        }
        context.set_shapes({name: tuple(tensor.shape) for name, tensor in (inputs | caches).items()})
        graph.activations = self._scratch.at_least(0)
        outputs = {"logits": graph.logits, "hidden_states": graph.hidden_states}
        for name, tensor in (inputs | outputs | caches).items():
            context.bind(name, tensor)
        for name, cache in caches.items():
            context.bind(f"new_{name}", cache)
        self._graphs[size] = graph
        return graph

    def _capture(self, graph: _Graph, stream: int) -> None:
        try:
            if not graph.context.capturable(stream):
                raise RuntimeError("TensorRT cannot capture it")
            graph.replay = self._engine.device.capture(graph.context.enqueue)
        except (RuntimeError, EngineError) as error:
            logger.warning("decoding goes on without a CUDA graph, which costs time: %s", " ".join(str(error).split()))
            graph.replay = lambda: graph.context.enqueue(stream)
