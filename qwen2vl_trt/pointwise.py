"""The steps between matrix products, each one function, which ``torch.compile`` makes one kernel of.

As PyTorch runs them each is several kernels, and each kernel reads and writes all of the step's numbers. On a GPU that
is memory traffic in the vision tower and launches in a decoder's step of one token. Inductor writes the kernels: in
Triton for a GPU, in C++ for a CPU, so that tests on a CPU run what a GPU runs up to the last compiler.

Compiled steps keep FP32 from their first number to their last: the sum before a norm, SiLU before its product and a
norm's result before FP8 are not rounded on the way, as they are when the functions run as they are.

Letters: T tokens of all rows, C width, I intermediate width, H query heads, Hkv key-value heads, D head size, M cache
capacity.
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
from .ops import quantize_fp8, rotate_unexported

logger = logging.getLogger(__name__)


def normalized(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None) -> Tensor:
    """RMS norm of ``[T, C]``; in FP8 where the layer that takes it has a ``scale``."""
    return _for_product(F.rms_norm(x, weight.shape, weight, eps), scale)


def add_normalized(x: Tensor, y: Tensor, weight: Tensor, eps: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x + y`` and its RMS norm, both ``[T, C]``; the norm in FP8 where the layer that takes it has a ``scale``."""
    total = x + y
    return total, normalized(total, weight, eps, scale)


def gated(gate_up: Tensor, scale: Tensor | None) -> Tensor:
    """``silu(gate) * up`` of ``[T, 2 I]``: ``[T, I]``, in FP8 where the layer that takes it has a ``scale``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _for_product(F.silu(gate) * up, scale)


def quantized(x: Tensor, scale: Tensor) -> Tensor:
    """See :func:`qwen2vl_trt.ops.quantize_fp8`; of ``[T, C]``."""
    return quantize_fp8(x, scale)


def angles(position_ids: Tensor, inv_freq: Tensor, sections: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, D / 2]`` FP32 of M-RoPE positions ``[3, T]``."""
    return rotary_cos_sin(position_ids, inv_freq, sections, scale)


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """The first heads of ``[T, all heads * D]``, rotated: ``[T, heads, D]``."""
    return _rotate(qkv.view(qkv.shape[0], -1, 2 * cos.shape[1])[:, :heads], cos, sin)


def stored(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor, positions: Tensor
) -> Tensor:
    """Rotate queries and keys, and write keys and values into the cache.

    Args:
        qkv: ``[T, (H + 2 Hkv) D]``.
        cos: ``[T, D / 2]`` FP32.
        sin: as ``cos``.
        k_cache: ``[rows, Hkv, M, D]``.
        v_cache: as ``k_cache``.
        rows: ``[T]`` int64, each token's row of the cache.
        positions: ``[T]`` int64, its place in the row.

    Returns:
        Rotated queries ``[T, H, D]``.
    """
    kv_heads, size = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.view(qkv.shape[0], -1, size)
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if torch.compiler.is_compiling():  # apart, so that no kernel waits for another's result
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    else:  # together, in half as many kernels
        q, k = _rotate(heads[:, :-kv_heads], cos, sin).split([q.shape[1], kv_heads], dim=1)
    k_cache[rows, :, positions] = k
    v_cache[rows, :, positions] = v
    return q


class Pointwise:
    """The functions of this module, as they are until :meth:`compile` finds that compiled ones run here, and right.

    Whatever the shape of a batch, they are given ``[T, ...]``, strides that follow from it and the begin of a tensor's
    memory: a compiled function looks at all three, and is compiled again where they are new to it.
    """

    def __init__(self) -> None:
        self._functions: Mapping[str, Callable[..., Any]] = _PLAIN

    @property
    def compiled(self) -> bool:
        """Whether compiled functions are in use."""
        return self._functions is not _PLAIN

    def norm(self, x: Tensor, norm: nn.RMSNorm, scale: Tensor | None) -> Tensor:
        """:func:`normalized` of ``[..., C]``."""
        return self._functions["normalized"](_tokens(x), norm.weight, norm.eps, scale).view(x.shape)

    def add_norm(self, x: Tensor, y: Tensor, norm: nn.RMSNorm, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """:func:`add_normalized` of ``[..., C]``."""
        total, y = self._functions["add_normalized"](_tokens(x), _tokens(y), norm.weight, norm.eps, scale)
        return total.view(x.shape), y.view(x.shape)

    def gate(self, gate_up: Tensor, scale: Tensor | None) -> Tensor:
        """:func:`gated` of ``[..., 2 I]``."""
        return self._functions["gated"](_tokens(gate_up), scale).view(*gate_up.shape[:-1], -1)

    def quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        """:func:`quantized` of ``[..., C]``."""
        return self._functions["quantized"](_tokens(x), scale).view(x.shape)

    def angles(
        self, position_ids: Tensor, inv_freq: Tensor, sections: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        """:func:`angles` of ``[3, B, S]``: ``[B, S, D / 2]`` each."""
        shape = position_ids.shape[1:]
        flat = _flat(position_ids).view(3, -1)
        cos, sin = self._functions["angles"](flat, inv_freq, tuple(sections), scale)
        return cos.view(*shape, -1), sin.view(*shape, -1)

    def rotate(self, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        """:func:`rotated` of ``[..., all heads * D]``: ``[T, heads, D]``."""
        return self._functions["rotated"](_tokens(qkv), _tokens(cos), _tokens(sin), heads)

    def store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor, positions: Tensor
    ) -> Tensor:
        """:func:`stored` of ``[B, S, (H + 2 Hkv) D]``: ``[B, H, S, D]``."""
        places = _flat(rows), _flat(positions)
        q = self._functions["stored"](_tokens(qkv), _tokens(cos), _tokens(sin), k_cache, v_cache, *places)
        return q.view(*qkv.shape[:2], *q.shape[1:]).transpose(1, 2)

    @torch.no_grad()
    def compile(self, runs: Sequence[Callable[[], object]]) -> None:
        """Compile the functions and use them from then on, if they agree with the plain ones wherever ``runs`` call.

        If not, one line in the log says why, and the plain ones stay.

        What is not called here compiles when it is first called. One token is compiled apart from several, which share
        one compiled function whatever their number.

        Args:
            runs: what uses this object, on real modules and caches: once on one token, if that happens, once on more.
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
    """Calls both functions, compares what they give and write to a cache, and passes on the compiled one's."""

    def __init__(self, name: str, plain: Callable[..., Any], compiled: Callable[..., Any]) -> None:
        self._name, self._plain, self._compiled = name, plain, compiled

    def __call__(self, *args: Any) -> Any:
        for index, dimension in _TOKENS[self._name]:
            if args[index].shape[dimension] > 1:  # PyTorch compiles a size of 1 apart
                torch._dynamo.mark_dynamic(args[index], dimension)
        _, expected = self._outcome(self._plain, args)
        if self._name == "stored":  # what the plain one wrote must not stand in for what the compiled one does not
            _, _, _, k_cache, v_cache, rows, positions = args
            k_cache[rows, :, positions] = 0
            v_cache[rows, :, positions] = 0
        given, found = self._outcome(self._compiled, args)
        for one, other in zip(found, expected):
            difference = _relative_difference(one, other)
            if not difference < _TOLERANCE:
                raise RuntimeError(f"the compiled function {self._name!r} is wrong by {difference:.3g}")
        return given

    def _outcome(self, function: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, tuple[Tensor, ...]]:
        given = function(*args)
        outcome = given if isinstance(given, tuple) else (given,)
        if self._name == "stored":
            _, _, _, k_cache, v_cache, rows, positions = args
            outcome += (k_cache[rows, :, positions], v_cache[rows, :, positions])
        return given, outcome


_PLAIN: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (normalized, add_normalized, gated, quantized, angles, rotated, stored)
}

_TOKENS = {
    "normalized": ((0, 0),),
    "add_normalized": ((0, 0), (1, 0)),
    "gated": ((0, 0),),
    "quantized": ((0, 0),),
    "angles": ((0, 1),),
    "rotated": ((0, 0), (1, 0), (2, 0)),
    "stored": ((0, 0), (1, 0), (2, 0), (5, 0), (6, 0)),
}
"""Which dimension of which argument counts tokens; all others are the model's, and compiled as numbers."""

_TOLERANCE = 0.05
"""Of the length of the difference to that of the result: what roundings to BF16 or FP8 fewer may make."""

_OPTIONS: dict[str, Any] = {
    "combo_kernels": True,  # queries and keys differ in number; one launch for both all the same
    "triton.autotune_pointwise": False,  # it would copy the cache to write to, and time what a few tokens take
}

_compilations = count()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function to be compiled when it is called.

    PyTorch keeps what it compiles with a function's code, and gives up on code compiled for the ninth time: models of
    one process would use up each other's. So each compiles code of its own.
    """
    assert isinstance(function, FunctionType)
    name = f"{function.__name__}_{next(_compilations)}"
    own = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    return torch.compile(own, dynamic=False, options=_OPTIONS)


def _tokens(x: Tensor) -> Tensor:
    """``[..., C]`` as ``[T, C]``, with C from one token to the next also where there is only one."""
    return _flat(x).view(-1, x.shape[-1])


def _flat(x: Tensor) -> Tensor:
    """All numbers in a row from the begin of their memory: copied where they lie further on, as a part of a prompt.

    Tensors of inference mode are copied too: to compiled functions they are another kind.
    """
    x = x.contiguous().view(-1)
    return x.clone() if x.storage_offset() or x.is_inference() else x


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _for_product(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else quantize_fp8(x, scale)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """:func:`qwen2vl_trt.ops.rotate` of ``[T, heads, D]``."""
    return rotate_unexported(x[None].transpose(1, 2), cos[None], sin[None]).transpose(1, 2)[0]
