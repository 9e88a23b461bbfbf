"""What goes into a call of the decoder and what comes out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Chunk(NamedTuple):
    """What one request appends in a step: ``length`` tokens behind the ``start`` that its slot holds.

    ``adapter`` is ``Request.adapter``.
    """

    slot: int
    start: int
    length: int
    adapter: str | None = None

    @property
    def end(self) -> int:
        """Tokens of the slot after the step."""
        return self.start + self.length


class Step(NamedTuple):
    """``logits [B, V]`` FP32 of each chunk's last token, and ``hidden_states [T, C]`` of all tokens if requested.

    ``greedy [B]`` int64 is their argmax where the backend computes it within the step. The next step may overwrite all.
    """

    logits: Tensor
    hidden_states: Tensor | None
    greedy: Tensor | None = None
