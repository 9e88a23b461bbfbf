"""What the pipeline asks of whoever runs the decoder's requests together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..backends.runners import Engines
from ..request import Output
from .counters import Counters
from .preparation import Prepared
from .sequence import NewToken, RunningSequence


class Executor(Protocol):
    """In-flight batching of requests: :mod:`qwen2vl_trt.runtime.scheduling.scheduler`, or an engine that schedules
    itself.

    A request that fails ends with the error in its output and leaves the others alone. One thread at a time.
    """

    @property
    def slots(self) -> int:
        """Most requests that run together."""
        ...

    @property
    def running(self) -> int:
        """Requests that were added and have not ended."""
        ...

    @property
    def free_slots(self) -> int:
        """How many requests can be added."""
        ...

    @property
    def busy(self) -> bool: ...

    @property
    def kept_tokens(self) -> int:
        """Tokens of ended requests that are still in the cache, where that is known."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Of the key-value cache, where that is known."""
        ...

    @property
    def takes_pixels(self) -> bool:
        """Whether it has a vision tower of its own: nothing is embedded for it."""
        ...

    def inputs_embeds(self, prepared: Prepared, embeds: Sequence[Tensor]) -> Tensor:
        """What it takes as ``inputs_embeds`` of a request whose media have these embeddings."""
        ...

    def add(self, sequence: RunningSequence) -> None:
        """Take in a sequence; raises ValueError where there is no free slot."""
        ...

    def cancel(self, output: Output) -> None:
        """End an answer that nobody waits for."""
        ...

    def forget(self) -> None:
        """Let go of what ended requests left in the cache."""
        ...

    def warm_up(self, chunk: int, longest: int) -> None:
        """Make ready for requests, see ``DecoderRunner.warm_up``; while none runs."""
        ...

    def step(self) -> list[NewToken]:
        """Go on with every running answer; returns the tokens that they got."""
        ...


@runtime_checkable
class SelfScheduling(Protocol):
    """A backend whose engine schedules its requests itself, without :mod:`qwen2vl_trt.runtime.scheduling.scheduler`."""

    def load_executor(self, engines: Engines, reuse_prefixes: bool, counters: Counters) -> Executor:
        """Raises EngineError where the engine does not load."""
        ...
