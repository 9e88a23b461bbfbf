"""Launches :mod:`~qwen2vl_trt.runtime.sampling_kernel` for a :class:`~qwen2vl_trt.runtime.sampler.Sampler` on CUDA."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from qwen2vl_trt.errors import reason

from .preprocessing.triton_writer import triton_is_installed
from .sampler import Kernel, Plan, Sampler
from .sampling_params import Sampling

_log = logging.getLogger(__name__)

BLOCK = 2048
"""Scores that a program reads at a time."""

_WARPS = 16

_CHECKED = [
    Sampling(repetition_penalty=1.2, frequency_penalty=0.5),
    Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, presence_penalty=0.5, seed=1),
    Sampling(temperature=1.2, top_p=0.95, seed=2),
    Sampling(temperature=0.5, top_k=2, logit_bias={0: 5.0}, seed=3),
    Sampling(temperature=1.0, min_p=0.1, seed=4),
]


def sample(
    logits: Tensor, plan: Plan, table: Tensor, seen: Tensor, counts: Tensor, allowed: Tensor | None, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """One launch; see :data:`~qwen2vl_trt.runtime.sampler.Kernel`. ``block`` is a power of two."""
    from . import sampling_kernel

    rows, vocab_size = logits.shape
    logits, scores = logits.contiguous(), torch.empty_like(logits)
    tokens = torch.empty(rows, 1, dtype=torch.long, device=logits.device)
    totals = torch.empty(rows, 1, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches on the current one
        sampling_kernel.sample[(rows,)](
            logits,
            scores if plan.width else logits,
            scores,
            table,
            table.view(torch.float64),
            table.view(torch.float32),
            seen,
            counts,
            table.view(torch.int32) if allowed is None else allowed,
            tokens,
            totals,
            seen.shape[1],
            plan.candidates,
            int(plan.width > 0),
            vocab_size if plan.counts else 0,
            0 if allowed is None else vocab_size,
            VOCAB=vocab_size,
            BLOCK=block,
            num_warps=_WARPS,
        )
    return tokens, totals


def checked_kernel(vocab_size: int, device: torch.device, kernel: Kernel = sample) -> Kernel | None:
    """The kernel where it runs and draws what PyTorch's operators draw, which compiles it; else None, and a WARNING."""
    if not triton_is_installed():
        why = "Triton is not installed"
    else:
        try:
            if _draws(vocab_size, device, kernel) == _draws(vocab_size, device, None):
                return kernel
            why = "Triton's kernel draws other tokens here than PyTorch"
        except Exception as error:
            why = f"Triton cannot sample here ({reason(error)})"
    _log.warning("%s; PyTorch samples instead, in many kernels", why)
    return None


def _draws(vocab_size: int, device: torch.device, kernel: Kernel | None) -> list[list[int | None]]:
    """Of some steps of a small batch, whose last row is broken."""
    rows = len(_CHECKED) + 1
    sampler = Sampler(rows, vocab_size, device, kernel)
    for slot, params in enumerate([*_CHECKED, _CHECKED[1]]):
        sampler.start(slot, params, range(min(vocab_size, 50)))
    # So far apart that a draw hangs on no rounding.
    logits = 8 * torch.randn(3, rows, vocab_size, generator=torch.Generator().manual_seed(0)).to(device)
    logits[:, -1, 0] = torch.nan
    allowed = np.random.default_rng(0).integers(-(2**31), 2**31, (rows, -(-vocab_size // 32)), np.int32)
    return [sampler(step, range(rows), None, mask).tolist() for step, mask in zip(logits, (None, allowed, allowed))]
