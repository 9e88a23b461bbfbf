"""How much may be decoded before its turn."""

from __future__ import annotations

from collections.abc import Sequence

DEFAULT_AHEAD_BYTES = 1 << 30
"""Of decoded pixels that wait for the engine: about 170 frames of 1080p, or 7 photos of 50 megapixels."""


def room_for_another(waiting: Sequence[int], loading: int, last: int, threads: int, most: int) -> bool:
    """Whether one more may be decoded; always where nothing waits, however large it is.

    Nobody knows the size of what is not decoded yet, so it counts as much as the largest of late. Until the first is
    known there is one a thread.

    Args:
        waiting: bytes of each that is decoded.
        loading: how many are being decoded.
        last: bytes of the last that went to the engine; 0 where there was none.
        threads: that decode.
        most: bytes that may wait.
    """
    size = max([*waiting, last])
    if not size:
        return loading < threads
    return not (sum(waiting) or loading) or sum(waiting) + (loading + 1) * size <= most
