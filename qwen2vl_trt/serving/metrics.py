"""Prometheus metrics under vLLM's names (https://docs.vllm.ai/en/stable/usage/metrics.html), behind a prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from qwen2vl_trt.runtime.service import Answer

if TYPE_CHECKING:
    from qwen2vl_trt.runtime.scheduling.executor import Counters

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("from the request's arrival at the scheduler to its first token", _SECONDS),
    "inter_token_latency_seconds": ("between two tokens of an answer", _SECONDS),
    "e2e_request_latency_seconds": ("from arrival to the end", _SECONDS),
    "request_queue_time_seconds": ("until the decoder begins, less preprocessing and vision", _SECONDS),
    "request_prefill_time_seconds": ("from the first chunk of the prompt to the first token", _SECONDS),
    "request_decode_time_seconds": ("from the first token to the last", _SECONDS),
    "request_preprocess_time_seconds": ("loading, resizing and packing of images and videos", _SECONDS),
    "request_vision_time_seconds": ("vision engine", _SECONDS),
    "media_fetch_seconds": ("until the images and videos of a request are there as bytes", _SECONDS),
    "media_decode_seconds": ("of preprocessing, reading and decoding them", _SECONDS),
    "request_prompt_tokens": ("of a prompt, images included", _TOKENS),
    "request_generation_tokens": ("of an answer", _TOKENS),
}

_GAUGES = {
    "num_requests_running": ("requests whose prompt is read or whose answer grows", "running"),
    "num_requests_waiting": ("requests that wait for a slot", "queued"),
    "kv_cache_bytes": ("bytes of the key-value cache", "kv_cache_bytes"),
    "kv_cache_usage_perc": ("share of its rows or pages in use, 0 to 1", "kv_cache_usage"),
    "mm_cache_bytes": ("bytes of the embedding cache", "embedding_bytes"),
}
_COUNTERS = {
    "generation_tokens": ("tokens of answers", lambda found: found.generated_tokens),
    "prompt_tokens": ("tokens of prompts", lambda found: found.prompt_tokens_computed + found.prompt_tokens_reused),
    "prefix_cache_queries": (
        "tokens looked up in the prefix cache",
        lambda found: found.prompt_tokens_computed + found.prompt_tokens_reused,
    ),
    "prefix_cache_hits": ("of them found", lambda found: found.prompt_tokens_reused),
    "mm_cache_queries": (
        "images and videos looked up in the embedding cache",
        lambda found: found.embedding_hits + found.embedding_misses,
    ),
    "mm_cache_hits": ("of them found", lambda found: found.embedding_hits),
    "num_preemptions": ("requests whose pages were given up for others", lambda found: found.preemptions),
}


class Metrics:
    """The metrics of one server.

    Args:
        prefix: of all names, ``vllm:`` for dashboards that exist.
        counters: those of the pipeline; None while it is not there.
    """

    def __init__(self, prefix: str, counters: Callable[[], Counters | None]) -> None:
        self._prefix, self._counters = prefix, counters
        self._registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(prefix + name, text, buckets=buckets, registry=self._registry)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._success = Counter(
            f"{prefix}request_success", "answers that ended", ["finished_reason"], registry=self._registry
        )
        self._responses = Counter(
            f"{prefix}http_responses",
            "by status; those of 4xx and 5xx are refusals",
            ["status"],
            registry=self._registry,
        )
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """What the pipeline counts itself."""
        found = self._counters()
        if found is None:
            return
        for name, (text, attribute) in _GAUGES.items():
            yield GaugeMetricFamily(self._prefix + name, text, value=getattr(found, attribute))
        for name, (text, value) in _COUNTERS.items():
            yield CounterMetricFamily(self._prefix + name, text, value=value(found))

    def observe(self, name: str, value: float) -> None:
        """Add an observation to a histogram."""
        self._histograms[name].observe(value)

    def response(self, status: int) -> None:
        """Count a response."""
        self._responses.labels(status).inc()

    def answers(self, answers: Iterable[Answer]) -> None:
        """Count answers that have ended; any thread may."""
        for answer in answers:
            self._answer(answer)

    def _answer(self, answer: Answer) -> None:
        output = answer.output
        if output.finish_reason is None:
            return
        self._success.labels(output.finish_reason).inc()
        timings = output.timings
        for name, value in (
            ("e2e_request_latency_seconds", timings.total),
            ("request_queue_time_seconds", timings.queue),
            ("request_preprocess_time_seconds", timings.preprocess),
            ("media_decode_seconds", timings.load),
            ("request_vision_time_seconds", timings.vision),
            ("request_prompt_tokens", output.prompt_tokens),
            ("request_generation_tokens", len(output.token_ids)),
        ):
            self.observe(name, value)
        if output.token_ids:
            for earlier, later in pairwise(answer.token_times):
                self.observe("inter_token_latency_seconds", later - earlier)
            self.observe("time_to_first_token_seconds", timings.time_to_first_token)
            self.observe("request_prefill_time_seconds", timings.prefill)
            self.observe("request_decode_time_seconds", timings.decode)

    def families(self) -> list[Metric]:
        """All of them, as data."""
        return list(self._registry.collect())

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
