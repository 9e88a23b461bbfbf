"""Where the pipeline's time goes, seen from outside: each stage's call is wrapped while somebody observes it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from runtime.backends.runners import Engines, VisionRunner
from runtime.media.embedder import MediaEmbedder
from runtime.preprocessing.preprocessor import Preprocessor
from runtime.scheduling import scheduler

from ..floors.rates import synchronize

STAGES_OF_A_REQUEST = ("preprocess", "vision", "prefill", "decode", "sampling", "host")
"""Where a request's time goes; ``host`` is all the rest: chat template, tokens to text, scheduling, embeddings."""


@dataclass(frozen=True)
class Stage:
    """One call of a stage.

    Attributes:
        name: ``load``, ``preprocess``, ``vision``, ``prefill``, ``decode`` or ``sampling``.
        slots: that it works on, of the decoder's; none where it is no decoder's call.
        details: numbers about it.
    """

    name: str
    slots: range = range(0)
    details: dict[str, int] | None = None


Observer = Callable[[Stage], AbstractContextManager[None]]
"""What surrounds a stage's call."""


class StageClock:
    """Adds up the seconds of each stage, waiting for the device at the end of each.

    Not at the end of ``load``: it is the host's, and threads that wait would break a capture that another one makes.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device

    @contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if stage.name != "load":
            synchronize(self._device)
        self.seconds["preprocess" if stage.name == "load" else stage.name] += time.perf_counter() - began


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
    targets: tuple[tuple[str, Any, str], ...] = (
        ("load", MediaEmbedder, "load_image"),
        ("preprocess", Preprocessor, "preprocess"),
        ("sampling", scheduler, "sample"),
    )
    with ExitStack() as stack:
        for stage, owner, name in targets:
            call = _wrapped(getattr(owner, name), observe, partial(_of_name, stage))
            stack.enter_context(mock.patch.object(owner, name, call))
        yield


def _wrapped(call: Callable[..., Any], observe: Observer, stage: Callable[..., Stage]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        with observe(stage(*arguments)):
            return call(*arguments, **options)

    return run


def _of_name(name: str, *_: Any) -> Stage:
    return Stage(name)


def _decoder_stage(first_slot: int, inputs_embeds: Tensor, position_ids: Tensor, starts: list[int], *_: Any) -> Stage:
    """A prompt's last chunk may be one token as well; it is then taken for decoding."""
    batch, tokens = inputs_embeds.shape[:2]
    slots = range(first_slot, first_slot + batch)
    if tokens == 1:
        return Stage("decode", slots, {"slots": batch})
    return Stage("prefill", slots, {"tokens": tokens, "after": starts[0]})
