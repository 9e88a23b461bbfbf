"""Steps that nobody asked for, so that the first request finds kernels loaded, graphs captured and memory taken."""

from __future__ import annotations

from collections.abc import Collection

import torch

from .runners import DecoderRunner


def run_steps(decoder: DecoderRunner, chunk: int, rows: Collection[int], lengths: Collection[int] = (1,)) -> None:
    """A chunk of a prompt in the first slot, then one token in each number of rows at each length.

    Writes over the first slots' rows of the cache.

    Args:
        decoder: no slot of which is in use.
        chunk: tokens of the prompt.
        rows: numbers of slots that decode together.
        lengths: tokens that each of them then holds, the new one included.
    """
    shapes = [(1, chunk, 0), *((count, 1, length - 1) for count in rows for length in lengths)]
    for count, tokens, start in shapes:
        embeds = decoder.embed([0] * tokens)[None].repeat(count, 1, 1)
        decoder.step(0, embeds, torch.arange(start, start + tokens).expand(3, count, -1), [start] * count)
