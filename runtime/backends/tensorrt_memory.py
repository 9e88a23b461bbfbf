"""GPU memory of a decoder, counted before it is taken."""

from __future__ import annotations

import torch

from qwen2vl_trt.config import TextConfig
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import EngineError

ALIGNMENT = 256
"""Bytes; TensorRT asks it of every address."""


def token_bytes(config: TextConfig, dtype: torch.dtype) -> int:
    """Bytes that the key-value cache needs for one token of one request, all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def check_cache(config: TextConfig, profile: BuildProfile, dtype: torch.dtype, free: int) -> None:
    """Refuse limits whose key-value cache does not fit, before any of it is allocated.

    Args:
        config: the decoder.
        profile: the engine's limits.
        dtype: of the cache.
        free: bytes of GPU memory that the cache may take.

    Raises:
        EngineError: what is needed for which batch and length, and what would fit.
    """
    batch, length, token = profile.max_batch_size, profile.max_seq_len, token_bytes(config, dtype)
    if batch * length * token <= free:
        return
    fits = []
    if free >= length * token:
        fits.append(f"--max-batch-size {free // (length * token):,} at this length")
    shorter = free // (batch * token)
    shorter -= shorter % ALIGNMENT if shorter > ALIGNMENT else 0  # rows of such a length are aligned, see check_rows
    if shorter > 1:  # a prompt of one token and an answer of one
        prompt = "" if profile.max_input_len < shorter else f" (--max-input-len below {shorter:,})"
        fits.append(f"--max-seq-len {shorter:,}{prompt} at this batch")
    raise EngineError(
        f"the key-value cache needs {in_words(batch * length * token)} for --max-batch-size {batch:,} x --max-seq-len"
        f" {length:,}, and {in_words(free)} of GPU memory is left for it; what fits:"
        f" {' or '.join(fits) or 'nothing, not one request'}. Rebuild, or free GPU memory."
    )


def check_rows(config: TextConfig, profile: BuildProfile, dtype: torch.dtype) -> None:
    """Refuse a cache whose rows, a request each, do not begin where TensorRT can take an address.

    Raises:
        EngineError: a row of one layer is no multiple of :data:`ALIGNMENT` bytes.
    """
    position = config.num_key_value_heads * config.head_dim * dtype.itemsize
    if profile.max_batch_size > 1 and position * profile.max_seq_len % ALIGNMENT:
        step = next(step for step in (2, 4, 8, 16, 32, 64, 128, 256) if position * step % ALIGNMENT == 0)
        raise EngineError(
            f"--max-seq-len {profile.max_seq_len:,} gives cache rows of {position * profile.max_seq_len:,} bytes;"
            f" TensorRT takes addresses at multiples of {ALIGNMENT}. Rebuild with a multiple of {step}."
        )


def streaming_budget(streamable: int, free: int, needed: int) -> int:
    """Bytes of weights to keep on the GPU: all that fit beside what else the engine needs, the rest is streamed.

    Args:
        streamable: bytes of weights that may stay in host memory.
        free: bytes of GPU memory with none of them there.
        needed: bytes for caches and activations.
    """
    return min(streamable, max(free - needed, 0))


def in_words(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
