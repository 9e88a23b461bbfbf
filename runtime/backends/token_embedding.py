"""Text embeddings, looked up outside the engines: the decoder takes embeddings, so that images can stand among them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.weights import EMBEDDING, checkpoint_names

from ..sending import send


class TokenEmbedding:
    """The embedding table. On a CPU it stays mapped to its file, in its own type: a lookup reads a few rows of it.

    Args:
        table: ``[V, C]`` on the device, where a decoder has it there already.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, table: Tensor | None = None
    ) -> None:
        self._table = checkpoint.load(checkpoint_names(checkpoint)[EMBEDDING]) if table is None else table
        self._dtype, self._device = dtype, device
        if device.type != "cpu":
            self._table = self._table.to(device, dtype)

    def __call__(self, token_ids: list[int]) -> Tensor:
        """n token ids to ``[n, C]``."""
        return F.embedding(send(token_ids, self._table.device), self._table).to(self._dtype)
