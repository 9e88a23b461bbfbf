"""Which request has which slot of the key-value cache, and what ended requests left in the free ones.

A slot is one row of the cache. A new prompt that begins like what a slot holds goes on from there, or copies it;
llama.cpp's server chooses among its slots in much the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .sequence import NO_KEYS, RunningSequence, common_prefix

_WORTH_SHARING = 16
"""Fewest tokens for which a copy, or waiting for another prompt, beats reading them."""


@dataclass(eq=False)
class _Slot:
    """A row of the cache.

    Attributes:
        sequence: whose it is; None of a free slot.
        kept: of a free slot, what its first tokens are, ``[n, 6]``.
        left: when it became free, as a count of releases.
    """

    sequence: RunningSequence | None = None
    kept: np.ndarray = field(default_factory=lambda: NO_KEYS)
    left: int = 0

    @property
    def held(self) -> int:
        """Tokens in the row that must stay as they are."""
        return len(self.kept) if self.sequence is None else self.sequence.cached

    @property
    def keys(self) -> np.ndarray:
        """What the row holds, or will once the prompt is read."""
        return self.kept if self.sequence is None else self.sequence.keys


class Placement(NamedTuple):
    """Where a prompt goes: its slot, and the slot that has its first ``shared`` tokens (often the same)."""

    slot: int
    source: int
    shared: int


class Wait(NamedTuple):
    """A prompt that is being read will soon hold ``shared`` tokens of this one: cheaper than to read them twice."""

    leader: RunningSequence
    shared: int

    @property
    def over(self) -> bool:
        return self.leader.token is not None or self.leader.cached >= self.shared or self.leader.output.finished


class Slots:
    """The rows of one cache, so many."""

    def __init__(self, count: int) -> None:
        self._slots = [_Slot() for _ in range(count)]
        self._releases = 0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def occupied(self) -> list[RunningSequence]:
        """The requests that have a slot, by slot."""
        return [slot.sequence for slot in self._slots if slot.sequence is not None]

    @property
    def kept_lengths(self) -> list[int]:
        """Tokens that each free slot keeps."""
        return [len(slot.kept) for slot in self._slots if slot.sequence is None]

    def held(self, slot: int) -> int:
        """Tokens in a slot that must stay as they are."""
        return self._slots[slot].held

    def place(self, sequence: RunningSequence) -> Placement | Wait:
        """Choose a slot for a prompt; there must be a free one. Nothing is changed.

        In place where a free slot's best match is at least half of what it keeps: little is lost. Otherwise the prompt
        copies what it shares into a slot that keeps nothing, or the one left longest ago. Among equals the slot next
        to those in use is taken, since a decode step runs all rows from the first in use to the last.
        """
        most = sequence.prompt_length - 1  # the last token's logits are wanted
        alike = [min(common_prefix(sequence.keys, slot.keys), most) for slot in self._slots]
        shared = [min(length, slot.held) for length, slot in zip(alike, self._slots)]
        best = max(shared)
        for length, row in sorted(zip(alike, self._slots), key=lambda pair: -pair[0]):
            other = row.sequence
            if other is not None and other.token is None and length >= max(best, other.cached) + _WORTH_SHARING:
                return Wait(other, length)
        free = [number for number, row in enumerate(self._slots) if row.sequence is None]
        used = [number for number, row in enumerate(self._slots) if row.sequence is not None]

        def cost(number: int) -> tuple[int, int]:
            return max([number, *used]) - min([number, *used]), self._slots[number].left

        in_place = [n for n in free if shared[n] == best > 0 and 2 * best >= len(self._slots[n].kept)]
        if in_place:
            slot = min(in_place, key=cost)
            return Placement(slot, slot, best)
        source = shared.index(best)
        others = [number for number in free if number != source or best < _WORTH_SHARING] or free
        slot = min(others, key=lambda number: (len(self._slots[number].kept) > 0, *cost(number)))
        if best - shared[slot] < _WORTH_SHARING:
            return Placement(slot, slot, shared[slot])
        return Placement(slot, source, best)

    def occupy(self, slot: int, sequence: RunningSequence) -> None:
        """Give a free slot to a request; what it kept is no longer anybody's."""
        sequence.slot = slot
        self._slots[slot].sequence = sequence
        self._slots[slot].kept = NO_KEYS

    def release(self, sequence: RunningSequence, keep: bool = True) -> None:
        """Free a request's slot, if it has one.

        Args:
            sequence: the request.
            keep: its keys and values are sound and may be used again.
        """
        if sequence.slot is None:
            return
        self._releases += 1
        kept = sequence.cached_keys() if keep else NO_KEYS
        self._slots[sequence.slot] = _Slot(None, kept, self._releases)
        sequence.slot = None

    def forget(self) -> None:
        """Keep nothing of ended requests any longer."""
        for slot in self._slots:
            slot.kept = NO_KEYS
