"""How much may be decoded before its turn."""

from __future__ import annotations

import weakref
from threading import Condition

DEFAULT_AHEAD_BYTES = 1 << 30
"""Of decoded pixels that wait for the engine and of what decoding others takes meanwhile: about 170 frames of 1080p
that wait, or 12 photos of 12 megapixels that are being decoded."""


def fits(held: int, wanted: int, most: int) -> bool:
    """Whether one more may be decoded; always where nothing is held, however large it is.

    Args:
        held: bytes of those that wait or are being decoded.
        wanted: bytes that decoding this one takes.
        most: bytes that may be held.
    """
    return not held or held + wanted <= most


class Admission:
    """Lets threads decode in the order of their numbers, 0, 1, 2 and so on, each as soon as there is room for it.

    In that order, the one that is waited for next finds nothing held but those before it. What has been handed over
    counts while somebody holds it, and keeps nobody out where nothing else does: its holder may wait for the next.

    Args:
        most: bytes that may be held.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: dict[int, int] = {}
        self._handed: dict[int, int] = {}
        self._next = 0
        self._closed = False
        self._changed = Condition()

    def admit(self, number: int, nbytes: int) -> None:
        """Wait for a number's turn and for room; a number that has been let in keeps its bytes."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or number < self._next or (number == self._next and self._has_room(nbytes))
            )
            if number >= self._next:
                self._next = number + 1
                self._hold(number, nbytes)

    def hold(self, number: int, nbytes: int) -> None:
        """From now on it is so much; 0 where it is gone."""
        with self._changed:
            self._hold(number, nbytes)

    def hand_over(self, number: int, medium: object) -> None:
        """It has left, and counts as long as it lives."""
        with self._changed:
            self._handed[number] = self._held.pop(number, 0)
            self._changed.notify_all()
        weakref.finalize(medium, self._let_go, number)

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _has_room(self, nbytes: int) -> bool:
        held = sum(self._held.values())
        return fits(held, sum(self._handed.values()) + nbytes, self._most)

    def _let_go(self, number: int) -> None:
        with self._changed:
            del self._handed[number]
            self._changed.notify_all()

    def _hold(self, number: int, nbytes: int) -> None:
        if nbytes:
            self._held[number] = nbytes
        else:
            self._held.pop(number, None)
        self._changed.notify_all()
