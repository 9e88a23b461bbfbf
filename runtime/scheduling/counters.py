"""What a pipeline has done so far, for a dashboard or a log."""

from __future__ import annotations

from dataclasses import dataclass

from qwen2vl_trt.errors import DeadlineError

from ..request import Output


@dataclass
class Counters:
    """Numbers since the pipeline was made; those marked *now* are the present state.

    Plain additions per step and per request: they cost nothing to keep. Sums come with the number of their terms, as
    Prometheus wants them, so that a difference of two readings gives the mean between them.

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
        decode_retries: decode steps that failed together and were run again row by row.
        embedding_hits: images and videos that needed no vision engine.
        embedding_misses: images and videos that needed it.
        embedding_evictions: embeddings dropped for room.
        embedding_bytes: bytes of the embeddings kept, *now*.
        kept_prefix_tokens: tokens of ended requests that the key-value cache still holds, *now*.
        kv_cache_bytes: bytes of the key-value cache, *now*.
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
    embedding_hits: int = 0
    embedding_misses: int = 0
    embedding_evictions: int = 0
    embedding_bytes: int = 0
    kept_prefix_tokens: int = 0
    kv_cache_bytes: int = 0

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
