"""Where the pipeline's time goes: each stage's call is made inside what an observer returns for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from .backends.steps import Chunk
from .request import Output


@dataclass(slots=True)
class Stage:
    """One call of a stage.

    Attributes:
        name: ``load`` of a request's media, ``wait`` for threads that load, ``embed`` (``preprocess`` and ``vision``
            are within it), ``prefill``, ``decode`` or ``sampling``.
        outputs: of the requests that it works on: one a medium of ``embed``, one a chunk of ``prefill`` and ``decode``.
            No other stage says them: ``load`` goes by its media, ``preprocess`` and ``vision`` by the ``embed`` around
            them.
        chunks: what the decoder reads or writes of each; a call with prompts is ``prefill``, with answers or without.
        media: keys of the images and videos that are loaded or embedded; of a load, once it has returned.
    """

    name: str
    outputs: Sequence[Output] = ()
    chunks: Sequence[Chunk] = ()
    media: list[bytes] = field(default_factory=list)


Observer = Callable[[Stage], AbstractContextManager[object]]
"""Called before every stage, on the thread that runs it: media are loaded on threads of their own."""

_NOTHING = nullcontext()


def unobserved(stage: Stage) -> AbstractContextManager[object]:
    """Nobody looks."""
    return _NOTHING
