"""A timeline of the pipeline that Perfetto and chrome://tracing open (``bench pipeline --trace FILE``).

The format is Chrome's Trace Event Format: complete events (``ph`` X) with ``ts`` and ``dur`` in microseconds, on tracks
(``tid``) of groups (``pid``), and metadata events (``ph`` M) that name both. On one track slices nest or follow each
other. Nothing is waited for while it is recorded: on a GPU a slice of the host is the time that its call took to
return, and CUDA events around the same call, on the stream that it queues on, give the GPU's slice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qwen2vl_trt.runtime.observer import Stage
from qwen2vl_trt.runtime.request import Output

HOST, SLOTS, REQUESTS, GPU = 1, 2, 3, 4
_GROUPS = {HOST: "host", SLOTS: "decoder slots", REQUESTS: "requests", GPU: "GPU"}
STEP, CALLERS_STREAM, SIDE_STREAM = "step()", "caller's stream", "side stream"
TITLES = {"wait": "wait for media", "prefill": "prefill chunk", "decode": "decode step", "sampling": "sample"}
"""Of the slices of a stage, where it is not the stage's name."""


@dataclass(frozen=True)
class _Span:
    stage: Stage
    began: float
    ended: float
    thread: str
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None
    stream: torch.cuda.Stream | None


class _Owners:
    """Whose the work of a span was; ``outputs`` are the requests, numbered from 1 in the order of their arrival."""

    def __init__(self, spans: Sequence[_Span], outputs: Sequence[Output]) -> None:
        self.outputs = dict(enumerate(sorted(outputs, key=lambda output: output.arrival), start=1))
        self._numbers = {id(output): number for number, output in self.outputs.items()}
        self._embedded = [span for span in spans if span.stage.name == "embed"]
        self._of_media = {
            key: number
            for span in self._embedded
            for key, number in zip(span.stage.media, self.each(span), strict=True)
        }

    def each(self, span: _Span) -> list[int | None]:
        """Numbers of the requests that the stage names; None for one that is not among them."""
        return [self._numbers.get(id(output)) for output in span.stage.outputs]

    def of(self, span: _Span) -> list[int]:
        """Numbers of the requests of a call."""
        found = {*self.each(span), *(self._of_media.get(key) for key in span.stage.media)}
        if span.stage.name in ("preprocess", "vision"):
            for around in self._embedded:
                if around.began <= span.began and span.ended <= around.ended:
                    found |= {*self.each(around)}
        return sorted(number for number in found if number is not None)


class Timeline:
    """Records stages; an :data:`~qwen2vl_trt.runtime.observer.Observer`.

    Attributes:
        requests: those that ran meanwhile, in the order in which they ended.
    """

    def __init__(self, device: torch.device) -> None:
        self.requests: Sequence[Output] = ()
        self._device = device
        self._stepping = threading.current_thread().name
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded; time begins here."""
        self._spans: list[_Span] = []
        self._zero_event: torch.cuda.Event | None = None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # so that both clocks have the same zero
            self._zero_event = self._event()
            torch.cuda.synchronize(self._device)
        self._stream = self._current()
        self._zero = time.perf_counter()

    @contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        thread = threading.current_thread().name
        on_gpu = self._zero_event is not None and thread == self._stepping  # threads that load queue nothing there
        first = self._event() if on_gpu else None
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        events = None if first is None else (first, self._event())
        self._spans.append(_Span(stage, began, ended, thread, events, self._current() if on_gpu else None))

    def _current(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._zero_event is not None else None

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def as_dict(self) -> dict[str, Any]:
        """The trace, for JSON; ``requests`` among a slice's ``args`` are the numbers of those that it worked on."""
        if self._zero_event is not None:
            torch.cuda.synchronize(self._device)
        spans = list(self._spans)
        threads = list(dict.fromkeys([self._stepping, *(span.thread for span in spans)]))
        slices = [*self._slices(spans, threads)]
        slices.sort(key=lambda event: (event["pid"], event["tid"], event["ts"], -event["dur"]))
        tracks = {(HOST, number): name for number, name in enumerate(threads, start=1)}
        tracks |= {(HOST, 1): STEP, (GPU, 1): CALLERS_STREAM, (GPU, 2): SIDE_STREAM}
        names = [_name("process_name", group, 0, _GROUPS[group]) for group in sorted({e["pid"] for e in slices})]
        for group, track in sorted({(event["pid"], event["tid"]) for event in slices}):
            numbered = f"slot {track - 1}" if group == SLOTS else f"request {track}"
            names.append(_name("thread_name", group, track, tracks.get((group, track), numbered)))
        return {"traceEvents": [*names, *slices], "displayTimeUnit": "ms"}

    def _slices(self, spans: list[_Span], threads: list[str]) -> Iterator[dict[str, Any]]:
        owners = _Owners(spans, self.requests)
        for span in spans:
            stage, requests = span.stage, owners.of(span)
            title = TITLES.get(stage.name, stage.name)
            times = self._microseconds(span.began), self._microseconds(span.ended)
            details: dict[str, Any] = {"requests": requests} if requests else {}
            if stage.chunks:
                details["tokens"] = sum(chunk.length for chunk in stage.chunks)
            yield _event(HOST, 1 + threads.index(span.thread), title, *times, details)
            for chunk, number in zip(stage.chunks, owners.each(span)):
                own = {"tokens": chunk.length, "after": chunk.start, "requests": [number]}
                kind = TITLES["decode" if chunk.length == 1 else "prefill"]
                yield _event(SLOTS, 1 + chunk.slot, kind, *times, own)
            if span.events is not None and self._zero_event is not None:
                began, ended = (self._zero_event.elapsed_time(event) * 1e3 for event in span.events)
                yield _event(GPU, 1 if span.stream == self._stream else 2, title, began, ended, details)
        for number, output in owners.outputs.items():
            arrival, timings = self._microseconds(output.arrival), output.timings
            first, end = (arrival + seconds * 1e6 for seconds in (timings.time_to_first_token, timings.total))
            prompt = {"prompt tokens": output.prompt_tokens}
            yield _event(REQUESTS, number, f"request {number}", arrival, end, {"tokens": len(output.token_ids)})
            yield _event(REQUESTS, number, "to the first token", arrival, first, prompt)
            yield _event(REQUESTS, number, "answer", first, end, {})

    def _microseconds(self, seconds: float) -> float:
        return (seconds - self._zero) * 1e6


def _event(group: int, track: int, name: str, began: float, ended: float, details: dict[str, Any]) -> dict[str, Any]:
    start, end = round(began * 1e3), round(ended * 1e3)  # whole nanoseconds, so that rounding moves no slice's end
    times = {"ts": start / 1e3, "dur": (end - start) / 1e3}
    return {"name": name, "ph": "X", "pid": group, "tid": track, **times, "args": details}


def _name(kind: str, group: int, track: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": group, "tid": track, "args": {"name": name}}
