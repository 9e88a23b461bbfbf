"""What the pipeline asks of whoever runs the decoder's requests together, and what those have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from qwen2vl_trt.errors import DeadlineError, ExecutionError, Qwen2VLError

from ..backends.runners import Engines
from ..request import Output, TokenLogprobs
from .sequence import RunningSequence


@dataclass
class Counters:
    """What a pipeline has done since it was made; what is marked *now* is the present state.

    Sums come with the number of their terms, as in Prometheus: the difference of two readings gives the mean between.

    Attributes:
        queued: requests that wait for a slot, *now*.
        running: requests whose prompt is read or whose answer grows, *now*.
        submitted: requests that came; those that ended are ``finished`` + ``cancelled`` + ``expired`` + ``failed``.
        finished: answers that ended with a stop or at ``max_tokens``.
        cancelled: requests that were cancelled, at whatever stage.
        expired: requests that their deadline ended, with an answer begun or without.
        failed: requests that ended with another error.
        started: requests whose prompt the decoder has begun with.
        queue_seconds: sum of ``Timings.queue`` of those that started.
        first_tokens: answers that have a token.
        time_to_first_token_seconds: sum of ``Timings.time_to_first_token`` of those.
        prompt_tokens_computed: prompt tokens that went through the decoder.
        prompt_tokens_reused: prompt tokens whose keys and values were in the cache already.
        generated_tokens: tokens of all answers.
        steps: steps that had something to do.
        step_seconds: seconds in those steps, preprocessing and vision included.
        decode_retries: calls of the decoder that failed for several requests and were run again one by one.
        preemptions: requests whose pages were given up for others, and computed again; 0 in a cache of rows.
        embedding_hits: images and videos that needed no vision engine.
        embedding_misses: images and videos that needed it.
        embedding_evictions: embeddings dropped for others.
        embedding_bytes: bytes of the embeddings kept, *now*.
        kept_prefix_tokens: tokens of ended requests that the key-value cache still holds, *now*.
        kv_cache_bytes: bytes of the key-value cache, *now*.
        kv_cache_usage: share of its rows or pages that running requests have, 0 to 1, *now*.
    """

    queued: int = 0
    running: int = 0
    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    expired: int = 0
    failed: int = 0
    started: int = 0
    queue_seconds: float = 0.0
    first_tokens: int = 0
    time_to_first_token_seconds: float = 0.0
    prompt_tokens_computed: int = 0
    prompt_tokens_reused: int = 0
    generated_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    decode_retries: int = 0
    preemptions: int = 0
    embedding_hits: int = 0
    embedding_misses: int = 0
    embedding_evictions: int = 0
    embedding_bytes: int = 0
    kept_prefix_tokens: int = 0
    kv_cache_bytes: int = 0
    kv_cache_usage: float = 0.0

    @property
    def mean_queue_seconds(self) -> float:
        """Mean of ``Timings.queue``; 0 before any request started."""
        return self.queue_seconds / max(1, self.started)

    @property
    def mean_time_to_first_token_seconds(self) -> float:
        """Mean of ``Timings.time_to_first_token``; 0 before any token."""
        return self.time_to_first_token_seconds / max(1, self.first_tokens)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second of the steps; idle time does not count."""
        return self.generated_tokens / self.step_seconds if self.step_seconds else 0.0

    def record_end(self, output: Output) -> None:
        """Count a request that has ended, under what ended it."""
        if output.finish_reason == "cancelled":
            self.cancelled += 1
        elif output.finish_reason == "deadline" or isinstance(output.error, DeadlineError):
            self.expired += 1
        elif output.error is not None:
            self.failed += 1
        else:
            self.finished += 1


@dataclass(slots=True)
class NewToken:
    """A token that a step added to an answer."""

    sequence: RunningSequence = field(repr=False)
    token: int
    text: str
    logprobs: TokenLogprobs | None = None


def take_token(
    sequence: RunningSequence, token: int, counters: Counters, now: float, logprobs: TokenLogprobs | None = None
) -> NewToken:
    """Add a token to a running answer and count it, at the time ``now``; the answer may end with it."""
    output, stream = sequence.output, sequence.stream
    text = stream.push(token, "deadline" if now >= output.expires else None)
    output.append(token, text, stream.finish_reason, now, logprobs)
    counters.generated_tokens += 1
    if len(stream.token_ids) == 1:
        counters.first_tokens += 1
        counters.time_to_first_token_seconds += output.timings.time_to_first_token
    return NewToken(sequence, token, text, logprobs)


def named(error: Exception, what: str) -> Qwen2VLError:
    """An error that a user can meet, one line, with the original as its cause."""
    if isinstance(error, Qwen2VLError):
        return error
    message = " ".join(str(error).split())
    found = ExecutionError(f"{what} failed: {type(error).__name__}{': ' * bool(message)}{message}")
    found.__cause__ = error
    return found


class Executor:
    """In-flight batching: :mod:`qwen2vl_trt.runtime.scheduling.scheduler`, or an engine that schedules its requests.

    A request that fails ends with the error in its output and leaves the others alone. One thread at a time.

    Attributes:
        slots: most requests that run together.
        takes_pixels: it has a vision tower of its own; nothing is embedded for it.
    """

    slots: int
    takes_pixels = False

    @property
    def kept_tokens(self) -> int:
        """Tokens of ended requests in the cache, 0 where that is not known."""
        return 0

    @property
    def cache_bytes(self) -> int:
        """Of the key-value cache, 0 where that is not known."""
        return 0

    @property
    def cache_usage(self) -> float:
        """Share of that cache in use, 0 where that is not known."""
        return 0.0

    @property
    def running(self) -> int:
        """Requests that were added and have not ended."""
        raise NotImplementedError

    @property
    def free_slots(self) -> int:
        return self.slots - self.running

    @property
    def busy(self) -> bool:
        return self.running > 0

    def inputs_embeds(self, sequence: RunningSequence, embeds: Sequence[Tensor]) -> Tensor:
        """What it takes as ``inputs_embeds`` of a sequence whose media have these embeddings ``[tokens, C]``."""
        raise NotImplementedError

    def add(self, sequence: RunningSequence) -> None:
        """Take in a sequence, and drop its media; raises ValueError where there is no free slot."""
        raise NotImplementedError

    def cancel(self, output: Output) -> None:
        """End an answer, if it is running here."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what ended requests left in the cache."""

    def hidden_states(self, sequences: Sequence[RunningSequence]) -> list[Tensor]:
        """Decoder hidden states ``[S, C]`` of each prompt, at most ``slots``; while no request runs."""
        raise NotImplementedError

    def warm_up(self, chunk: int, longest: int) -> None:
        """Make ready for requests, see ``DecoderRunner.warm_up``; while none runs."""

    def step(self) -> list[NewToken]:
        """Go on with every running answer; returns the tokens that they got."""
        raise NotImplementedError


@runtime_checkable
class SelfScheduling(Protocol):
    """A backend whose engine schedules its requests itself, without :mod:`qwen2vl_trt.runtime.scheduling.scheduler`."""

    def load_executor(self, engines: Engines, reuse_prefixes: bool, counters: Counters) -> Executor:
        """Raises EngineError where the engine does not load."""
        ...
