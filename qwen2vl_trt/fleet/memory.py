"""Telling that memory has run out, whichever library says so."""

from __future__ import annotations

import torch

_PHRASES = ("out of memory", "can't allocate memory", "failed to allocate memory", "bad allocation", "bad_alloc")
"""PyTorch on the CPU and ONNX Runtime have no exception of their own for it."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on the host or on the device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if any(phrase in str(error).lower() for phrase in _PHRASES):
        return True
    return error.__cause__ is not None and out_of_memory(error.__cause__)
