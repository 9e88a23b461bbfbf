"""A CPU on which oneDNN packs no weights: in BF16 one without AVX-512, in FP32 one that oneDNN does not know."""

from typing import Any

import torch
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackingWithout:
    """What takes the place of ``torch.ops.mkldnn._reorder_linear_weight``: raises for these types, as torch does."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        self._operator, self._dtypes = torch.ops.mkldnn._reorder_linear_weight, dtypes

    def __call__(self, weight: Tensor, batch_size: int | None = None) -> Tensor:
        if weight.dtype in self._dtypes:
            raise RuntimeError(f"mkldnn_reorder_linear_weight: {weight.dtype} path needs the cpu support avx512bw")
        return self._operator(weight, batch_size)

    def __getattr__(self, name: str) -> Any:
        """``torch.export`` asks every operator for its overloads."""
        return getattr(self._operator, name)
