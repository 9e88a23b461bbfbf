"""What the torch backend computes in on a CPU unless told: BF16, or FP32 where the CPU emulates BF16.

BF16 halves the memory and what decoding reads. A CPU without AVX-512 emulates it: a matrix product takes several times
as long as in FP32, and decoding gains nothing. So the CPU is asked by multiplying in both.
"""

from __future__ import annotations

import logging
import time
from functools import cache

import torch
import torch.nn.functional as F

from .precision import BF16, FP32, Precision

logger = logging.getLogger(__name__)

_ROWS, _WIDTH = 64, 512
_REPETITIONS = 3
_EMULATED = 4.0
"""Between the 6 to 9 times that AVX2 takes and the 2 that AVX-512 without BF16 instructions should take at most (two
products of FP32 for each): a busy moment must not change the precision, and with it the name of an engine folder."""


def cpu_precision() -> Precision:
    """FP32 where this CPU emulates BF16, else BF16."""
    slowdown = bf16_slowdown()
    chosen = FP32 if slowdown >= _EMULATED else BF16
    logger.log(
        logging.INFO if chosen is BF16 else logging.WARNING,
        "precision %s: a product in bf16 takes %.1f times as long as in fp32 on this CPU; --precision chooses",
        chosen.name,
        slowdown,
    )
    return chosen


@cache
@torch.no_grad()
def bf16_slowdown() -> float:
    """How many times as long a matrix product in BF16 takes as one in FP32; some milliseconds, once a process."""
    operands = {
        dtype: (torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32)
    }
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in operands}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for one another where other processes run, longer than they compute
    try:
        for repetition in range(1 + _REPETITIONS):
            for dtype, (x, weight) in operands.items():
                began = time.perf_counter()
                F.linear(x, weight)
                if repetition:  # the first prepares its kernel
                    seconds[dtype].append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return min(seconds[torch.bfloat16]) / min(seconds[torch.float32])
