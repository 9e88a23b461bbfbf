"""Where the pipeline's time goes: each stage's call is made inside what an observer returns for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from .request import Output


@dataclass(slots=True)
class Stage:
    """One call of a stage.

    Attributes:
        name: ``load`` of a request's media, ``wait`` for threads that load, ``embed`` (``preprocess`` and ``vision``
            are within it), ``prefill``, ``decode`` or ``sampling``.
        outputs: of the requests that it works on: one a medium of ``embed``, one a slot of ``prefill`` and ``decode``,
            None for a slot between two others. No other stage says them: ``load`` goes by its media, ``preprocess`` and
            ``vision`` by the ``embed`` around them.
        first_slot: of the decoder's.
        media: keys of the images and videos that are loaded or embedded; of a load, once it has returned.
        details: numbers about it.
    """

    name: str
    outputs: Sequence[Output | None] = ()
    first_slot: int = 0
    media: list[bytes] = field(default_factory=list)
    details: dict[str, int] = field(default_factory=dict)


Observer = Callable[[Stage], AbstractContextManager[object]]
"""Called before every stage, on the thread that runs it: media are loaded on threads of their own."""

_NOTHING = nullcontext()


def unobserved(stage: Stage) -> AbstractContextManager[object]:
    """Nobody looks."""
    return _NOTHING
