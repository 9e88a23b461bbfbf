"""What the decoder's graph takes for a step besides the caches, from what a runner is told."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def step_inputs(inputs_embeds: Tensor, position_ids: Tensor, starts: Sequence[int]) -> dict[str, Tensor]:
    """By the names of :mod:`qwen2vl_trt.export.graphs`; what is made here lies on the host. No row is padded.

    Args:
        inputs_embeds: ``[B, S, C]``.
        position_ids: ``[3, B, S]`` int64.
        starts: B numbers of tokens that the slots hold so far.
    """
    batch, length, _ = inputs_embeds.shape
    start = torch.tensor(starts)
    return {
        "inputs_embeds": inputs_embeds,
        "position_ids": position_ids,
        "cache_start": start,
        "kv_lengths": start + length,
        "last_token": torch.full((batch,), length - 1),
    }
