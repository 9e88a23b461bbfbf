"""When two prompts begin alike: the same tokens, standing for the same pixels, at the same positions.

Image tokens all have one id, so the id alone would take any image for any other; keys and values in the cache also
have their rotary positions inside, which an image's size shifts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NO_KEYS = np.empty((0, 6), np.int64)

_BLOCK = 256  # rows compared at a time: most prompts differ early


def token_keys(
    token_ids: Sequence[int],
    position_ids: np.ndarray,
    media: Sequence[tuple[int, Sequence[bytes], Sequence[int]]] = (),
) -> np.ndarray:
    """What each token of a prompt is, in a form that can be compared.

    Args:
        token_ids: S of them.
        position_ids: ``[3, S]``, see :func:`qwen2vl_trt.mrope.rope_index`.
        media: of images and of videos: their token id, each one's 16-byte content key
            (:mod:`qwen2vl_trt.runtime.media.content_keys`) and number of tokens, in the order of the prompt.

    Returns:
        ``[S, 6]`` int64: token id, content key in two halves (0 of text), three positions.
    """
    keys = np.zeros((len(token_ids), 6), np.int64)
    keys[:, 0] = token_ids
    keys[:, 3:] = np.asarray(position_ids).T
    for token_id, contents, lengths in media:
        if contents:
            halves = np.frombuffer(b"".join(contents), np.int64).reshape(-1, 2)
            keys[keys[:, 0] == token_id, 1:3] = halves.repeat(lengths, axis=0)
    return keys


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """Number of tokens with which both ``[S, 6]`` begin."""
    length = min(len(one), len(other))
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        differs = (one[start:end] != other[start:end]).any(1)
        if differs.any():
            return start + int(differs.argmax())
    return length
