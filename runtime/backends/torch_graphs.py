"""The torch backend's steps over the paged cache on a GPU, under CUDA graphs.

A graph is captured for fixed shapes and addresses. Decode steps have one for 1, 2, 4, ... sequences; steps with prompts
one for 64, 128, 256, ... tokens, of up to 8, up to 64 or any number of sequences. The sequences that fill a graph's
shape up read and write page 0. A graph is captured after the first step of its shape, which runs eagerly, or by
``warm_up``. All share input and output buffers and one memory pool; the host never waits.

Letters: T tokens of all sequences, B sequences, N pages of a sequence, C width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qwen2vl_trt.decoder import Decoder
from qwen2vl_trt.transfer import to_device

from .common import graph_batches, padded_batch, power_of_two
from .paged_cache import PAGE, PagedKVCache, pages_of
from .steps import Chunk, Step
from .torch_attention import PageCache, PageStep

logger = logging.getLogger(__name__)

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Captures what a function enqueues and returns its replay. Raises RuntimeError where that is not possible."""

MOST_CAPTURED = 2048
"""Tokens of the largest captured step with prompts: larger ones take the GPU longer than the host takes to enqueue."""

_LEAST_TOKENS = 64
_SEQUENCES = (8, 64)
"""Of the smaller graphs for prompts: attention launches blocks for each sequence that there may be."""

_capture_lock = Lock()  # PyTorch captures one graph at a time in a process


class GraphCapture:
    """Captures CUDA graphs that share one memory pool, on a stream of the decoder's priority."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device, priority=-1)

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with (
            _capture_lock,
            torch.cuda.device(self._device),
            torch.cuda.stream(torch.cuda.current_stream(self._device)),  # current again where a capture fails
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            body()
        return graph.replay


class Shape(NamedTuple):
    """What a graph is captured for: T, B and N, and the most new tokens of a sequence, 1 or T."""

    tokens: int
    sequences: int
    pages: int
    longest: int

    @property
    def parts(self) -> list[int]:
        """Sizes of the host's part of the input: positions, slot mapping, ``cu_seqlens``, lengths, block table."""
        sequences = self.sequences
        return [3 * self.tokens, self.tokens, sequences + 1, sequences, sequences * self.pages]


class PackedSteps:
    """Runs steps of packed tokens.

    Args:
        module: the decoder.
        cache: its keys and values.
        dtype: of activations and cache.
        device: of both.
        capture: None runs every step without a graph.
        fused: use :func:`qwen2vl_trt.varlen.paged_attention`. Without it steps with prompts have no graph.
    """

    def __init__(
        self,
        module: Decoder,
        cache: PagedKVCache,
        dtype: torch.dtype,
        device: torch.device,
        capture: Capture | None,
        fused: bool,
    ) -> None:
        self._module, self._cache, self._capture, self._fused = module, cache, capture, fused
        self._sequences, self._pages = cache.block_table.shape
        self._replays: dict[Shape, Callable[[], None]] = {}
        config = module.config
        most = max(MOST_CAPTURED if fused else 0, self._sequences)
        largest = Shape(most, max(self._sequences, _SEQUENCES[-1]) + 1, self._pages, most)
        self._numbers = torch.zeros(sum(largest.parts), dtype=torch.int32, device=device)
        self._inputs_embeds = torch.zeros(most, config.hidden_size, dtype=dtype, device=device)
        self._hidden_states = torch.empty_like(self._inputs_embeds)
        self._logits = torch.empty(self._sequences, config.vocab_size, dtype=torch.float32, device=device)
        self._greedy = torch.empty(self._sequences, dtype=torch.int64, device=device)

    def step(
        self, chunks: Sequence[Chunk], inputs_embeds: Tensor, position_ids: Tensor, wanted: Sequence[int] | None
    ) -> Step:
        """See :meth:`qwen2vl_trt.runtime.backends.runners.DecoderRunner.step`; returns buffers of the graph."""
        tokens, sequences = len(inputs_embeds), len(chunks)
        if tokens > len(self._inputs_embeds):  # too large to be captured
            return self._head(self.run_eagerly(chunks, inputs_embeds, position_ids), chunks, wanted)
        shape = self._shape(chunks, tokens)
        self._numbers[: sum(shape.parts)].copy_(self._host_numbers(chunks, position_ids, shape))
        self._inputs_embeds[:tokens].copy_(inputs_embeds)
        replay = self._replays.get(shape)
        if replay is not None:
            replay()
        else:  # run this step eagerly, which also warms up for the capture; the next one replays
            self._run(shape, chunks)
            self._record(shape)
        if shape.longest > 1:
            return self._head(self._hidden_states[:tokens], chunks, wanted)
        step = Step(self._logits[:sequences], self._hidden_states[:tokens], self._greedy[:sequences])
        if wanted is None:
            return step
        rows = to_device(wanted, step.logits.device, torch.long)
        return step._replace(logits=step.logits[rows], greedy=self._greedy[rows])

    def run_eagerly(self, chunks: Sequence[Chunk], inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states ``[T, C]`` of a step in the shape of a prompt, without buffers and graphs."""
        tokens = len(inputs_embeds)
        shape = Shape(tokens, len(chunks), self._pages, max(tokens, 2))
        return self._forward(self._host_numbers(chunks, position_ids, shape), inputs_embeds, shape, chunks)

    def shapes(self, longest: int, most_tokens: int) -> list[list[Chunk]]:
        """A step of each shape that sequences of up to ``longest`` tokens need, in the order of need."""
        most_pages = pages_of(longest)
        reach = [most_pages] if self._fused else graph_batches(most_pages)  # see _shape
        decode = [
            [Chunk(slot, min(pages * PAGE, longest) - 1, 1) for slot in range(count)]
            for pages in reach
            for count in graph_batches(self._sequences)
        ]
        if not self._fused:
            return decode
        most, prompts = min(self._sequences * most_tokens, MOST_CAPTURED), []
        for size in (_LEAST_TOKENS << power for power in range(6)):
            tokens = min(size, most)
            for count in {min(count, self._sequences, tokens - 1) for count in (*_SEQUENCES, self._sequences)} - {0}:
                total = min(tokens, count * longest)
                lengths = [total // count + (number < total % count) for number in range(count)]
                prompts.append([Chunk(slot, 0, length) for slot, length in enumerate(lengths)])
            if size >= most:
                break
        return [*decode, *prompts]

    def _shape(self, chunks: Sequence[Chunk], tokens: int) -> Shape:
        sequences = len(chunks)
        if tokens == sequences:
            count, pages = padded_batch(sequences, self._sequences), self._pages
            if not self._fused:  # attention reads all of the block table
                pages = padded_batch(pages_of(max(chunk.end for chunk in chunks)), pages)
            return Shape(count, count, pages, 1)
        if not self._fused or tokens > MOST_CAPTURED:
            return Shape(tokens, sequences, self._pages, tokens)
        size = power_of_two(max(tokens, _LEAST_TOKENS))
        count = next((count for count in _SEQUENCES if sequences <= count), self._sequences)
        return Shape(size, count + 1, self._pages, size)  # one more, for the tokens that pad

    def _host_numbers(self, chunks: Sequence[Chunk], position_ids: Tensor, shape: Shape) -> Tensor:
        """Of :attr:`Shape.parts`, on the device."""
        tokens, count = position_ids.shape[1], len(chunks)
        numbers = np.zeros(sum(shape.parts), np.int32)
        positions, mapping, cu_seqlens, lengths, table = np.split(numbers, np.cumsum(shape.parts)[:-1])
        positions.reshape(3, -1)[:, :tokens] = position_ids.numpy()
        mapping[:tokens] = self._cache.slot_mapping(chunks)
        # Whatever pads is one sequence, or several of one token, with page 0.
        cu_seqlens[:] = shape.tokens
        if shape.longest == 1:
            cu_seqlens[:] = np.arange(shape.sequences + 1)
        cu_seqlens[: count + 1] = np.cumsum([0, *(chunk.length for chunk in chunks)])
        lengths[:] = 1
        lengths[:count] = [chunk.end for chunk in chunks]
        slots = [chunk.slot for chunk in chunks]
        table.reshape(shape.sequences, -1)[:count] = self._cache.block_table[slots, : shape.pages]
        return to_device(torch.from_numpy(numbers), self._numbers.device)

    def _record(self, shape: Shape) -> None:
        if self._capture is None or not (self._fused or shape.longest == 1):
            return
        try:
            self._replays[shape] = self._capture(partial(self._run, shape, ()))
        except torch.OutOfMemoryError:
            self._replays[shape] = partial(self._run, shape, ())  # smaller ones may fit
        except RuntimeError as error:
            self._capture = None  # what fails for one shape fails for all
            logger.warning(
                "the decoder goes on without CUDA graphs, which costs time: %s", " ".join(str(error).split())
            )

    def _run(self, shape: Shape, chunks: Sequence[Chunk]) -> None:
        """A step from buffers to buffers, its logits too where each sequence has one token."""
        embeds = self._inputs_embeds[: shape.tokens]
        hidden_states = self._forward(self._numbers[: sum(shape.parts)], embeds, shape, chunks)
        self._hidden_states[: shape.tokens].copy_(hidden_states)
        if shape.longest == 1:
            self._logits[: shape.tokens].copy_(self._module.lm_head(hidden_states))
            torch.argmax(self._logits[: shape.tokens], dim=-1, out=self._greedy[: shape.tokens])

    def _forward(self, numbers: Tensor, inputs_embeds: Tensor, shape: Shape, chunks: Sequence[Chunk]) -> Tensor:
        positions, mapping, cu_seqlens, lengths, table = numbers.split(shape.parts)
        step = PageStep(
            mapping.long(),
            cu_seqlens,
            lengths,
            table.view(shape.sequences, shape.pages),
            shape.longest,
            self._fused,
            chunks,
        )
        caches = [PageCache(k, v, step) for k, v in zip(self._cache.k, self._cache.v)]
        return self._module.model(inputs_embeds[None], positions.long().view(3, 1, -1), caches)[0][0]

    def _head(self, hidden_states: Tensor, chunks: Sequence[Chunk], wanted: Sequence[int] | None) -> Step:
        logits = head(self._module, hidden_states, chunks, wanted)
        return Step(logits, hidden_states, logits.argmax(-1))


def head(module: Decoder, hidden_states: Tensor, chunks: Sequence[Chunk], wanted: Sequence[int] | None) -> Tensor:
    """Logits ``[B, V]`` FP32 of the last token of each chunk that is wanted, of hidden states ``[T, C]``."""
    last = [end - 1 for end in accumulate(chunk.length for chunk in chunks)]
    if wanted is not None:
        last = [last[number] for number in wanted]
    if not last:
        return hidden_states.new_empty(0, module.config.vocab_size, dtype=torch.float32)
    return module.lm_head(hidden_states[to_device(last, hidden_states.device)]).float()
