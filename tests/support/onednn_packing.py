"""A CPU on which oneDNN packs no weights: in BF16 one without AVX-512, in FP32 one that oneDNN does not know."""

from collections.abc import Callable

import torch
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def packing_without(*dtypes: torch.dtype) -> Callable[..., Tensor]:
    """What takes the place of ``torch.ops.mkldnn._reorder_linear_weight``: raises for these types, as torch does."""
    operator = torch.ops.mkldnn._reorder_linear_weight

    def reorder(weight: Tensor, batch_size: int | None = None) -> Tensor:
        if weight.dtype in dtypes:
            raise RuntimeError(f"mkldnn_reorder_linear_weight: {weight.dtype} path needs the cpu support avx512bw")
        return operator(weight, batch_size)

    return reorder
