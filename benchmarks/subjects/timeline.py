"""A timeline of the pipeline that Perfetto and chrome://tracing open (``bench pipeline --trace FILE``).

The format is Chrome's Trace Event Format, its JSON object form: complete events (``ph`` X) with ``ts`` and ``dur`` in
microseconds, on tracks (``tid``) of groups (``pid``), and metadata events (``ph`` M) that name both. On one track
slices nest or follow each other, they never overlap in part.

Nothing is waited for while it is recorded. On a GPU a slice of the host is the time that its call took to return, and
CUDA events around the same call give the slice of the caller's stream on the GPU. Loading is the host's alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from runtime.request import Output

from .stages import Stage

HOST, SLOTS, REQUESTS, GPU = 1, 2, 3, 4
_GROUPS = {HOST: "host", SLOTS: "decoder slots", REQUESTS: "requests", GPU: "GPU"}
_TRACKS = {HOST: ("thread", 1), SLOTS: ("slot", 0), REQUESTS: ("request", 1), GPU: ("stream", 1)}  # counted from
_TITLES = {"prefill": "prefill chunk", "decode": "decode step", "sampling": "sample"}


@dataclass(frozen=True)
class _Span:
    stage: Stage
    began: float
    ended: float
    thread: int
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None
    stream: int


class Timeline:
    """Records stages; an :data:`~benchmarks.subjects.stages.Observer`.

    Attributes:
        requests: those that ran meanwhile, in the order in which they ended.
    """

    def __init__(self, device: torch.device) -> None:
        self.requests: Sequence[Output] = ()
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded; time begins here."""
        self._spans: list[_Span] = []
        self._zero_event: torch.cuda.Event | None = None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # so that both clocks have the same zero
            self._zero_event = self._event(torch.cuda.current_stream(self._device))
            torch.cuda.synchronize(self._device)
        self._zero = time.perf_counter()

    @contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        on_gpu = self._zero_event is not None and stage.name != "load"
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        first = self._event(stream) if stream is not None else None
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        events = None if first is None or stream is None else (first, self._event(stream))
        number = 0 if stream is None else stream.cuda_stream
        self._spans.append(_Span(stage, began, ended, threading.get_ident(), events, number))

    def _event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def as_dict(self) -> dict[str, Any]:
        """The trace, for JSON."""
        if self._zero_event is not None:
            torch.cuda.synchronize(self._device)
        slices = [*self._host_slices(), *self._slot_slices(), *self._gpu_slices(), *self._request_slices()]
        slices.sort(key=lambda event: (event["pid"], event["tid"], event["ts"], -event["dur"]))
        return {"traceEvents": [*_names(slices), *slices], "displayTimeUnit": "ms"}

    def _host_slices(self) -> Iterator[dict[str, Any]]:
        threads = list(dict.fromkeys(span.thread for span in self._spans))
        for span in self._spans:
            yield _slice(HOST, 1 + threads.index(span.thread), span.stage, *self._times(span))

    def _slot_slices(self) -> Iterator[dict[str, Any]]:
        for span in self._spans:
            for slot in span.stage.slots:
                yield _slice(SLOTS, 1 + slot, span.stage, *self._times(span))

    def _gpu_slices(self) -> Iterator[dict[str, Any]]:
        """A stage within another, as the pixels' copies within preprocessing, begins after it and ends before it."""
        streams = list(dict.fromkeys(span.stream for span in self._spans if span.events is not None))
        for span in self._spans:
            if span.events is not None:
                assert self._zero_event is not None
                began, ended = (self._zero_event.elapsed_time(event) * 1e3 for event in span.events)
                yield _slice(GPU, 1 + streams.index(span.stream), span.stage, began, ended)

    def _request_slices(self) -> Iterator[dict[str, Any]]:
        """A request from its arrival to its end, and in it the time to its first token and that of its answer."""
        for number, output in enumerate(sorted(self.requests, key=lambda output: output.arrival), start=1):
            arrival, timings = self._microseconds(output.arrival), output.timings
            first, end = (arrival + seconds * 1e6 for seconds in (timings.time_to_first_token, timings.total))
            yield _event(REQUESTS, number, f"request {number}", arrival, end, {"tokens": len(output.token_ids)})
            yield _event(
                REQUESTS, number, "to the first token", arrival, first, {"prompt tokens": output.prompt_tokens}
            )
            yield _event(REQUESTS, number, "answer", first, end, {})

    def _times(self, span: _Span) -> tuple[float, float]:
        return self._microseconds(span.began), self._microseconds(span.ended)

    def _microseconds(self, seconds: float) -> float:
        return (seconds - self._zero) * 1e6


def _slice(group: int, track: int, stage: Stage, began: float, ended: float) -> dict[str, Any]:
    return _event(group, track, _TITLES.get(stage.name, stage.name), began, ended, stage.details or {})


def _event(group: int, track: int, name: str, began: float, ended: float, details: dict[str, int]) -> dict[str, Any]:
    start, end = round(began * 1e3), round(ended * 1e3)  # whole nanoseconds, so that rounding moves no slice's end
    return {
        "name": name,
        "ph": "X",
        "pid": group,
        "tid": track,
        "ts": start / 1e3,
        "dur": (end - start) / 1e3,
        "args": details,
    }


def _names(slices: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for group in sorted({event["pid"] for event in slices}):
        yield _name("process_name", group, 0, _GROUPS[group])
    for group, track in sorted({(event["pid"], event["tid"]) for event in slices}):
        title, first = _TRACKS[group]
        yield _name("thread_name", group, track, f"{title} {track - 1 + first}")


def _name(kind: str, group: int, track: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": group, "tid": track, "args": {"name": name}}
