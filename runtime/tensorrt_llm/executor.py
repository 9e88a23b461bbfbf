"""Requests that TensorRT-LLM schedules: it batches them in flight over its paged key-value cache."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines import tensorrt_llm_api as api
from qwen2vl_trt.errors import ExecutionError, LimitError, SamplingError
from qwen2vl_trt.mrope import mrope_config
from qwen2vl_trt.transfer import to_device

from ..generation_config import GenerationConfig
from ..preprocessing.sizes import Medium
from ..request import Output
from ..sampling_params import Sampling
from ..scheduling.executor import Counters, Executor, NewToken, named, take_token
from ..scheduling.sequence import RunningSequence

_WAIT = 0.02
"""Seconds that a step waits for a token; new requests and deadlines are looked at in between."""


@dataclass(eq=False)
class _Running:
    """A request under way: when it ``began`` (output's clock), its ``task`` in the event loop, tokens ``taken``."""

    sequence: RunningSequence
    began: float
    task: Any = None
    taken: int = 0


class TensorRTLLMExecutor(Executor):
    """Hands requests to TensorRT-LLM's asynchronous interface.

    They live in an event loop on a thread of its own, which puts what they get into a queue that :meth:`step` empties.

    ``embeds_dtype`` is that of the vision embeddings to hand over; None where TensorRT-LLM runs its own tower.
    """

    def __init__(
        self,
        llm: Any,
        config: Qwen2VLConfig,
        ends: GenerationConfig,
        slots: int,
        embeds_dtype: torch.dtype | None,
        counters: Counters,
    ) -> None:
        self._llm, self._config, self._ends, self._embeds_dtype = llm, config, ends, embeds_dtype
        self._counters = counters
        self.slots, self.takes_pixels = slots, embeds_dtype is None
        self._running: dict[Output, _Running] = {}
        self._events: SimpleQueue[tuple[_Running, api.Progress | Exception]] = SimpleQueue()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="tensorrt-llm", daemon=True).start()

    @property
    def running(self) -> int:
        return len(self._running)

    def inputs_embeds(self, sequence: RunningSequence, embeds: Sequence[Tensor]) -> Tensor:
        """``[T, C]`` of the T vision tokens, in their order; empty with its own tower."""
        if not embeds:
            return torch.empty(0)
        rows = torch.cat(list(embeds)).to(self._embeds_dtype)
        return rows[to_device(np.argsort(sequence.places), rows.device)]

    def add(self, sequence: RunningSequence) -> None:
        """Hand a sequence over; one whose sampling TensorRT-LLM does not have fails."""
        if not self.free_slots:
            raise ValueError(f"all {self.slots} slots are taken")
        output, params = sequence.output, sequence.params
        try:
            check_sampling(params)
            inputs, salt = self._inputs(sequence)
            chosen = api.sampling_params(
                params.max_tokens,
                params.temperature,
                params.top_k,
                params.top_p,
                params.ignore_eos,
                self._ends.eos_token_ids,
                self._ends.pad_token_id,
                params.stop_token_ids,
            )
        except Exception as error:
            output.fail(named(error, "preparing the request for TensorRT-LLM"))
            return
        running = self._running[output] = _Running(sequence, output.clock())
        sequence.media = []  # their pixels: TensorRT-LLM has what it needs of them
        output.start()
        self._counters.started += 1
        self._counters.queue_seconds += output.timings.queue
        follow = _follow(self._llm, inputs, chosen, salt, lambda event: self._events.put((running, event)))
        running.task = asyncio.run_coroutine_threadsafe(follow, self._loop)

    def cancel(self, output: Output) -> None:
        running = self._running.get(output)
        if running is not None:
            output.cancel()
            self._end(running)

    def step(self) -> list[NewToken]:
        """Tokens that came since the last step; waits a moment for the first."""
        for running in [running for running in self._running.values() if running.sequence.output.expired]:
            if not running.taken:
                running.sequence.output.expire("before the answer's first token")
                self._end(running)
        new: list[NewToken] = []
        timeout = _WAIT
        while self._running:
            try:
                running, event = self._events.get(timeout=timeout) if timeout else self._events.get_nowait()
            except Empty:
                break
            timeout = 0
            if running.sequence.output not in self._running:
                continue  # it has ended here; what was under way no longer counts
            try:
                if isinstance(event, Exception):
                    raise event
                self._take(running, event, new)
            except Exception as error:
                running.sequence.output.fail(named(error, "TensorRT-LLM"))
            if running.sequence.output.finished:
                self._end(running)
        return new

    def _take(self, running: _Running, progress: api.Progress, new: list[NewToken]) -> None:
        sequence, output = running.sequence, running.sequence.output
        if not running.taken:
            if progress.prompt_token_ids != sequence.token_ids:
                why = (
                    "its processor resizes images otherwise. Leave --min-pixels and --max-pixels at the checkpoint's"
                    if len(sequence.places)
                    else "it takes special tokens that a text spells for such, and token ids as their text. Leave them"
                    " out, or install a release with PreprocessedInputs and build again"
                )
                raise ExecutionError(
                    f"TensorRT-LLM read another prompt ({len(progress.prompt_token_ids):,} tokens instead of"
                    f" {sequence.prompt_length:,}): {why}"
                )
            if progress.token_ids:
                output.timings.prefill = output.clock() - running.began
                self._counters.prompt_tokens_computed += len(progress.prompt_token_ids)
        tokens, now = progress.token_ids[running.taken :], output.clock()
        for token in tokens:
            running.taken += 1
            new.append(take_token(sequence, token, self._counters, now))
            if output.finished:
                return
        if progress.finish_reason == "stop":  # a release that leaves the end-of-sequence token out
            end = progress.stop_reason if isinstance(progress.stop_reason, int) else self._ends.eos_token_ids[0]
            new.append(take_token(sequence, end, self._counters, now))
        if progress.finish_reason is not None and not output.finished:
            raise ExecutionError(
                f"TensorRT-LLM ended the answer after {running.taken:,} tokens ({progress.finish_reason})"
            )

    def _end(self, running: _Running) -> None:
        del self._running[running.sequence.output]
        running.task.cancel()

    def _inputs(self, sequence: RunningSequence) -> tuple[Any, str | None]:
        """The prompt as TensorRT-LLM takes it, and the salt of its blocks."""
        media = sequence.media
        # Blocks are found again by token ids, and every image has the same: the salt says which images they are, and
        # has the request's own.
        contents = sequence.keys[:, 1:3]
        contents = contents[contents.any(axis=1)]
        salt = hashlib.sha256(contents.tobytes()).hexdigest() if len(contents) else None
        if self._embeds_dtype is None:
            if any(medium.is_video for medium in media):
                # It would sample the frames again and guess their rate, on which M-RoPE depends.
                raise LimitError(
                    "this release of TensorRT-LLM runs its own vision tower, and gets images alone from here; give a"
                    " video's frames as images, or install a release with PreprocessedInputs and build again"
                )
            return api.pixel_inputs(sequence.text, [self._picture(image) for image in media]), salt
        seen = torch.zeros(sequence.prompt_length, dtype=torch.int64)
        seen[sequence.places] = 1
        mrope = mrope_config(sequence.position_ids, sequence.delta)
        sequence.ready.wait(sequence.inputs_embeds)
        embeds, sequence.inputs_embeds = sequence.inputs_embeds, sequence.inputs_embeds.new_empty(0)
        return api.embedding_inputs(sequence.token_ids, embeds, seen.cumsum(0), mrope), salt

    def _picture(self, image: Medium) -> Image.Image:
        """In the size that the vision tower sees, so that its processor has nothing left to resize."""
        (pixels,) = image.frames  # nothing was embedded here, so nothing is cached
        _, rows, columns = image.size.grid
        patch = self._config.vision.patch_size
        picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))
        return picture.resize((columns * patch, rows * patch), Image.Resampling.BICUBIC)


def check_sampling(params: Sampling) -> None:
    """Raise SamplingError for settings that TensorRT-LLM does not follow as they are meant here."""
    for name, off in (("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0), ("min_p", 0)):
        value = getattr(params, name)
        if value != off:
            # Its sampler has them in some releases alone, and leaves them out without a word in the others.
            raise SamplingError(
                f"{name} {value:g} is not for backend tensorrt-llm; leave it out, or run the model with another backend"
            )
    for name in ("logit_bias", "logprobs", "structured_outputs"):
        if getattr(params, name) is not None:
            raise SamplingError(
                f"{name} is not for backend tensorrt-llm; leave it out, or run the model with another backend"
            )
    if params.seed is not None and not params.greedy:
        # One generator draws for the whole batch: an answer depends on what runs beside it.
        raise SamplingError(
            f"seed {params.seed} is not for backend tensorrt-llm, which draws for all requests together; leave it out,"
            " set temperature to 0, or run the model with another backend"
        )


async def _follow(
    llm: Any, inputs: Any, params: Any, salt: str | None, put: Callable[[api.Progress | Exception], None]
) -> None:
    try:
        async for progress in api.generate(llm, inputs, params, salt):
            put(progress)
    except Exception as error:
        put(error)
