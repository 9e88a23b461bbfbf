"""The steps between matrix products; ``torch.compile`` makes one kernel of each (docs/design/torch.md).

Compiled, a step keeps FP32 from its first number to its last. Run as it is, PyTorch rounds the sum before a norm, SiLU
before its product and a norm's result before FP8.

Letters: T tokens of all rows, C width, I intermediate width, H query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mrope import rotary_cos_sin
from .ops import quantize_fp8, rotate_eager

logger = logging.getLogger(__name__)


def rms_norm(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None) -> Tensor:
    """RMS norm of ``[T, C]``; in FP8 where the next layer has an input ``scale``."""
    return _quantized(F.rms_norm(x, weight.shape, weight, eps), scale)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x + y`` and its :func:`rms_norm`, both ``[T, C]``."""
    total = x + y
    return total, rms_norm(total, weight, eps, scale)


def silu_and_mul(gate_up: Tensor, scale: Tensor | None) -> Tensor:
    """``silu(gate) * up`` of ``[T, 2 I]``: ``[T, I]``, in FP8 where the next layer has an input ``scale``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _quantized(F.silu(gate) * up, scale)


def rotary_embedding(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """The first ``heads`` of ``[T, all heads * D]``, rotated: ``[T, heads, D]``."""
    return _rotate(qkv.view(qkv.shape[0], -1, 2 * cos.shape[1])[:, :heads], cos, sin)


def reshape_and_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    """Rotate q and k of ``qkv [T, (H + 2 Hkv) D]``, write k and v to the cache, return q ``[T, H, D]``.

    Args:
        cos: ``[T, D / 2]`` FP32, as ``sin``.
        k_cache: ``[pages, page size, Hkv, D]``, as ``v_cache``.
        slot_mapping: ``[T]`` int64, see :class:`~qwen2vl_trt.decoder.LayerCache`.
    """
    kv_heads, size = k_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], -1, size)
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if torch.compiler.is_compiling():  # apart, so that no kernel waits for another's result
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    else:  # together, in half as many kernels
        q, k = _rotate(heads[:, :-kv_heads], cos, sin).split([q.shape[1], kv_heads], dim=1)
    k_cache.flatten(0, 1)[slot_mapping] = k
    v_cache.flatten(0, 1)[slot_mapping] = v
    return q


class FusedOps:
    """The functions of this module for tensors of any shape, plain until :meth:`compile` has checked compiled ones.

    The functions are given contiguous ``[T, ...]`` with storage offset 0, because ``torch.compile`` recompiles for
    every new rank, stride and offset.
    """

    def __init__(self) -> None:
        self._functions: Mapping[str, Callable[..., Any]] = _PLAIN

    @property
    def compiled(self) -> bool:
        """Whether compiled functions are in use."""
        return self._functions is not _PLAIN

    def rms_norm(self, x: Tensor, norm: nn.RMSNorm, scale: Tensor | None) -> Tensor:
        """:func:`rms_norm` of ``[..., C]``."""
        return self._functions["rms_norm"](_tokens(x), norm.weight, norm.eps, scale).view(x.shape)

    def add_rms_norm(self, x: Tensor, y: Tensor, norm: nn.RMSNorm, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """:func:`add_rms_norm` of ``[..., C]``."""
        total, y = self._functions["add_rms_norm"](_tokens(x), _tokens(y), norm.weight, norm.eps, scale)
        return total.view(x.shape), y.view(x.shape)

    def silu_and_mul(self, gate_up: Tensor, scale: Tensor | None) -> Tensor:
        """:func:`silu_and_mul` of ``[..., 2 I]``."""
        return self._functions["silu_and_mul"](_tokens(gate_up), scale).view(*gate_up.shape[:-1], -1)

    def quantize_fp8(self, x: Tensor, scale: Tensor) -> Tensor:
        """:func:`qwen2vl_trt.ops.quantize_fp8` of ``[..., C]``."""
        return self._functions["quantize_fp8"](_tokens(x), scale).view(x.shape)

    def rotary_cos_sin(
        self, position_ids: Tensor, inv_freq: Tensor, sections: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        """:func:`qwen2vl_trt.mrope.rotary_cos_sin` of ``[3, B, S]``: ``[B, S, D / 2]`` each."""
        shape = position_ids.shape[1:]
        flat = _flat(position_ids).view(3, -1)
        cos, sin = self._functions["rotary_cos_sin"](flat, inv_freq, tuple(sections), scale)
        return cos.view(*shape, -1), sin.view(*shape, -1)

    def rotary_embedding(self, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        """:func:`rotary_embedding` of ``[..., all heads * D]``: ``[T, heads, D]``."""
        return self._functions["rotary_embedding"](_tokens(qkv), _tokens(cos), _tokens(sin), heads)

    def reshape_and_cache(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
    ) -> Tensor:
        """:func:`reshape_and_cache` of ``[B, S, (H + 2 Hkv) D]``: ``[B, H, S, D]``."""
        q = self._functions["reshape_and_cache"](
            _tokens(qkv), _tokens(cos), _tokens(sin), k_cache, v_cache, _flat(slot_mapping)
        )
        return q.view(*qkv.shape[:2], *q.shape[1:]).transpose(1, 2)

    @torch.no_grad()
    def compile(self, runs: Sequence[Callable[[], object]]) -> None:
        """Compile the functions, and use them from then on if they agree with the plain ones in all of ``runs``.

        If not, one line in the log says why, and the plain ones stay. What ``runs`` do not call compiles when it is
        first called.

        Args:
            runs: use this object on real modules and caches: once on one token, which compiles apart, if that happens,
                and once on more, which share one compiled function whatever their number.
        """
        began = time.perf_counter()
        compiled = {name: _compiled(function) for name, function in _PLAIN.items()}
        self._functions = {name: _Trial(name, plain, compiled[name]) for name, plain in _PLAIN.items()}
        try:
            for run in runs:
                run()
        except Exception as error:  # a compiler that is missing, broken or wrong shows itself in any way
            self._functions = _PLAIN
            said = " ".join(str(error).split())[:200]
            logger.warning(
                "the steps between matrix products are not compiled, which costs time: %s: %s",
                type(error).__name__,
                said,
            )
            return
        self._functions = compiled
        logger.info("compiled the steps between matrix products in %.1f s", time.perf_counter() - began)


class _Trial:
    """Calls the plain and the compiled function, compares results and cache, and returns the compiled one's."""

    def __init__(self, name: str, plain: Callable[..., Any], compiled: Callable[..., Any]) -> None:
        self._name, self._plain, self._compiled = name, plain, compiled

    def __call__(self, *args: Any) -> Any:
        for index, dimension in _TOKENS[self._name]:
            if args[index].shape[dimension] > 1:  # PyTorch compiles a size of 1 apart
                torch._dynamo.mark_dynamic(args[index], dimension)
        _, expected = self._outcome(self._plain, args)
        if self._name == "reshape_and_cache":  # what the plain one wrote must not hide what the compiled one does not
            _, _, _, k_cache, v_cache, slot_mapping = args
            for cache in (k_cache, v_cache):
                cache.flatten(0, 1)[slot_mapping] = 0
        given, found = self._outcome(self._compiled, args)
        for one, other in zip(found, expected):
            one, other = one.float(), other.float()
            difference = float((one - other).norm() / other.norm().clamp(min=torch.finfo(torch.float32).tiny))
            if not difference < _TOLERANCE:
                raise RuntimeError(f"the compiled function {self._name!r} is wrong by {difference:.3g}")
        return given

    def _outcome(self, function: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, tuple[Tensor, ...]]:
        given = function(*args)
        outcome = given if isinstance(given, tuple) else (given,)
        if self._name == "reshape_and_cache":
            _, _, _, k_cache, v_cache, slot_mapping = args
            outcome += (k_cache.flatten(0, 1)[slot_mapping], v_cache.flatten(0, 1)[slot_mapping])
        return given, outcome


_PLAIN: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "silu_and_mul": silu_and_mul,
    "quantize_fp8": quantize_fp8,
    "rotary_cos_sin": rotary_cos_sin,
    "rotary_embedding": rotary_embedding,
    "reshape_and_cache": reshape_and_cache,
}

_TOKENS = {
    "rms_norm": ((0, 0),),
    "add_rms_norm": ((0, 0), (1, 0)),
    "silu_and_mul": ((0, 0),),
    "quantize_fp8": ((0, 0),),
    "rotary_cos_sin": ((0, 1),),
    "rotary_embedding": ((0, 0), (1, 0), (2, 0)),
    "reshape_and_cache": ((0, 0), (1, 0), (2, 0), (5, 0)),
}
"""(argument, dimension) that count tokens; all other sizes are the model's, and compiled as constants."""

_TOLERANCE = 0.05
"""Relative, of norms: what fewer roundings to BF16 or FP8 may change."""

_OPTIONS: dict[str, Any] = {
    "combo_kernels": True,  # queries and keys differ in number; one launch for both all the same
    "triton.autotune_pointwise": False,  # it would copy the cache to write to, and time what a few tokens take
}

_compilations = count()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function, to be compiled when it is called.

    PyTorch compiles one code object eight times at most, so models of one process would use up each other's.
    """
    assert isinstance(function, FunctionType)
    name = f"{function.__name__}_{next(_compilations)}"
    own = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    return torch.compile(own, dynamic=False, options=_OPTIONS)


def _tokens(x: Tensor) -> Tensor:
    """``[..., C]`` as contiguous ``[T, C]``."""
    return _flat(x).view(-1, x.shape[-1])


def _flat(x: Tensor) -> Tensor:
    """Contiguous, one-dimensional, storage offset 0; tensors of inference mode, which would recompile, are copied."""
    x = x.contiguous().view(-1)
    return x.clone() if x.storage_offset() or x.is_inference() else x


def _quantized(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else quantize_fp8(x, scale)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """:func:`qwen2vl_trt.ops.rotate` of ``[T, heads, D]``."""
    return rotate_eager(x[None].transpose(1, 2), cos[None], sin[None]).transpose(1, 2)[0]
