"""Where the pipeline's time goes, seen from outside: each stage's call is wrapped while somebody observes it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from qwen2vl_trt.runtime.backends.runners import Engines, VisionRunner
from qwen2vl_trt.runtime.media.cached_media import CachedMedia
from qwen2vl_trt.runtime.preprocessing.medium import Medium
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor
from qwen2vl_trt.runtime.request import Output
from qwen2vl_trt.runtime.scheduling import scheduler
from qwen2vl_trt.runtime.scheduling.media_ahead import Loading
from qwen2vl_trt.runtime.scheduling.sequence import RunningSequence
from qwen2vl_trt.runtime.scheduling.slots import Slots

from ..floors.rates import synchronize

STAGES_OF_A_REQUEST = ("preprocess", "vision", "prefill", "decode", "sampling", "host")
"""Where a request's time goes; ``preprocess`` is what the step does or waits for of it, ``host`` all the rest: chat
template, tokens to text, scheduling, embeddings."""


@dataclass(frozen=True)
class Stage:
    """One call of a stage.

    Attributes:
        name: ``load``, ``wait`` for what threads load, ``embed`` (``preprocess`` and ``vision`` are within it),
            ``prefill``, ``decode`` or ``sampling``;
            ``add`` where a request goes to the scheduler, ``occupy`` where it gets its slot.
        slots: that it works on, of the decoder's; none where it is no decoder's call.
        details: numbers about it.
        media: keys of the images that it loads or embeds, or of the request that is added. What is loaded is known when
            the call has returned.
        output: of the request that is added or gets a slot.
    """

    name: str
    slots: range = range(0)
    details: dict[str, int] = field(default_factory=dict)
    media: list[bytes] = field(default_factory=list)
    output: Output | None = None


Observer = Callable[[Stage], AbstractContextManager[None]]
"""What surrounds a stage's call."""


class StageClock:
    """Adds up the seconds of each stage, waiting for the device at the end of each.

    Only those of the thread that it was made on: what others load meanwhile costs what that one waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._thread = threading.get_ident()

    @contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        if threading.get_ident() != self._thread:
            yield
            return
        began = time.perf_counter()
        yield
        synchronize(self._device)
        name = "preprocess" if stage.name in ("load", "wait") else stage.name
        self.seconds[name] += time.perf_counter() - began


def watched(engines: Engines, observe: Observer) -> Engines:
    """The engines, their calls observed."""

    class Watched(Engines):
        @cached_property
        def vision(self) -> VisionRunner:
            return _wrapped(engines.vision, observe, lambda *_: Stage("vision"))

        @cached_property
        def decoder(self) -> Any:
            decoder = engines.decoder
            step = _wrapped(decoder.step, observe, _decoder_stage)
            return SimpleNamespace(
                slots=decoder.slots, cache=decoder.cache, embed=decoder.embed, step=step, reset=decoder.reset
            )

    return Watched(**{name: getattr(engines, name) for name in Engines.__dataclass_fields__})


@contextmanager
def probes(observe: Observer) -> Iterator[None]:
    """Meanwhile observe what is no engine's call, too."""
    targets: tuple[tuple[Any, str, Callable[..., Stage]], ...] = (
        (CachedMedia, "embed", _embed_stage),
        (Preprocessor, "pack", partial(_of_name, "preprocess")),
        (scheduler, "sample", partial(_of_name, "sampling")),
        (scheduler.Scheduler, "add", _add_stage),
        (Slots, "occupy", _occupy_stage),
    )
    with ExitStack() as stack:
        for owner, name, stage in targets:
            call = _wrapped(getattr(owner, name), observe, stage)
            stack.enter_context(mock.patch.object(owner, name, call))
        load = _wrapped_load(CachedMedia.load_image, observe)
        stack.enter_context(mock.patch.object(CachedMedia, "load_image", load))
        wait = staticmethod(_wrapped(Loading.wait_for_any, observe, partial(_of_name, "wait")))
        stack.enter_context(mock.patch.object(Loading, "wait_for_any", wait))
        yield


def _wrapped(call: Callable[..., Any], observe: Observer, stage: Callable[..., Stage]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        with observe(stage(*arguments)):
            return call(*arguments, **options)

    return run


def _wrapped_load(call: Callable[..., Medium], observe: Observer) -> Callable[..., Medium]:
    def load(*arguments: Any) -> Medium:
        stage = Stage("load")
        with observe(stage):
            medium = call(*arguments)
            stage.media.append(medium.key)
        return medium

    return load


def _embed_stage(_: CachedMedia, media: Sequence[Medium]) -> Stage:
    return Stage("embed", media=[medium.key for medium in media])


def _add_stage(_: scheduler.Scheduler, sequence: RunningSequence) -> Stage:
    prepared = sequence.prepared
    media = [medium.key for medium in prepared.media] if prepared is not None else []
    return Stage("add", media=media, output=sequence.output)


def _occupy_stage(_: Slots, slot: int, sequence: RunningSequence) -> Stage:
    return Stage("occupy", range(slot, slot + 1), output=sequence.output)


def _of_name(name: str, *_: Any) -> Stage:
    return Stage(name)


def _decoder_stage(first_slot: int, inputs_embeds: Tensor, position_ids: Tensor, starts: list[int], *_: Any) -> Stage:
    """A prompt's last chunk may be one token as well; it is then taken for decoding."""
    batch, tokens = inputs_embeds.shape[:2]
    slots = range(first_slot, first_slot + batch)
    if tokens == 1:
        return Stage("decode", slots, {"slots": batch})
    return Stage("prefill", slots, {"tokens": tokens, "after": starts[0]})
