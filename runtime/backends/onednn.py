"""Linear layers with weights prepacked in oneDNN's blocked layouts, for the torch backend on a CPU.

``torch.nn.functional.linear`` reorders its weight in every call of more than one row, which triples the memory traffic
of decoding. The operators here are those of torch's compiler for frozen CPU graphs
(``torch/_inductor/fx_passes/mkldnn_fusion.py``). They are private, and without AVX-512 exist in FP32 alone, so
:func:`available` tries them first.

oneDNN chooses a layout for a number of rows. Which is best for the rows that a module sees, or whether plain weights
are, depends on the CPU and the type: :func:`fastest` times them. A weight is held in one layout.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2vl_trt.layers import FP8Linear, SwiGLU
from qwen2vl_trt.ops import quantize_fp8, rescale

from .common import shortest_seconds

logger = logging.getLogger(__name__)

Layout = Literal["plain", "one row", "many rows"]
"""Of a weight: as PyTorch has it, or packed as oneDNN prefers it for so many rows."""
PACKED: tuple[Layout, ...] = ("one row", "many rows")

VISION_ROWS = (256,)
"""Of what a vision tower's layers see: many rows."""

_WIDTH = 2048
_BYTES = 2**24
"""Of the weight that is timed at few rows: more than most caches have for one core."""
_MANY, _MANY_OUTPUTS = 64, 256
_CLEARLY_LESS = 0.9

_PART = 80 * 2**20
"""Numbers of a weight that are converted at a time: no layer of 7B but ``lm_head`` has more."""

_TEST_WIDTH = 32
_TOLERANCE = 0.05  # of the largest result: several roundings to BF16


def decoder_rows(max_num_seqs: int) -> tuple[int, ...]:
    """What a decoder's layers see: a step of one request, a step of as many as there may be, and prompts."""
    return tuple(sorted({1, max_num_seqs, 256}))


@cache
def available(dtype: torch.dtype) -> bool:
    """Whether packed layers of a type run correctly here: computes one small layer both ways, once a process."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):  # its own initialisation would draw from the caller's generator
        mlp = SwiGLU(_TEST_WIDTH, _TEST_WIDTH, bias=True)
    mlp, x = mlp.to_empty(device="cpu").to(dtype), torch.empty(3, _TEST_WIDTH, dtype=dtype)
    try:
        with torch.no_grad():
            for tensor in (x, *mlp.parameters()):
                tensor.normal_(generator=generator)
            expected = mlp(x)
            errors = [(PackedSwiGLU(mlp, layout)(x) - expected).abs().max() for layout in PACKED]
    except (AttributeError, RuntimeError, TypeError) as error:
        # Every CPU has them in FP32; in BF16 and FP16 only newer ones do.
        level = logging.INFO if isinstance(error, RuntimeError) and dtype != torch.float32 else logging.WARNING
        reason = " ".join(str(error).split())[:200]
        logger.log(level, "no packed linear layers of %s here; weights are reordered in every call: %s", dtype, reason)
        return False
    if not all(error <= _TOLERANCE * expected.abs().max() for error in errors):
        logger.warning("packed linear layers of %s are wrong here; they are left out, which costs time", dtype)
        return False
    return True


def fastest(dtype: torch.dtype, rows: tuple[int, ...]) -> Layout:
    """The layout with the least geometric mean of its times over some numbers of rows; plain where nothing packs.

    The one that oneDNN means for the fewest of them, unless another takes clearly less: two layouts add in different
    orders, and a busy moment must not change an answer's last bits.
    """
    if not available(dtype):
        return "plain"
    means: dict[Layout, float] = {
        layout: math.prod(_seconds(layout, dtype, each) for each in rows) ** (1 / len(rows))
        for layout in ("plain", *PACKED)
    }
    usual: Layout = "one row" if 1 in rows else "many rows"
    best = min(means, key=lambda layout: means[layout])
    chosen = best if means[best] < _CLEARLY_LESS * means[usual] else usual
    shown = ", ".join(f"{layout} {mean * 1e3:.2f} ms" for layout, mean in means.items())
    logger.debug("weights of %s for %s rows: %s (%s)", dtype, rows, chosen, shown)
    return chosen


@cache
def _seconds(layout: Layout, dtype: torch.dtype, rows: int) -> float:
    """What a product takes, once a process."""
    outputs = _BYTES // (_WIDTH * dtype.itemsize) if rows < _MANY else _MANY_OUTPUTS
    x, weight = torch.ones(rows, _WIDTH, dtype=dtype), torch.ones(outputs, _WIDTH, dtype=dtype)
    if layout == "plain":
        return shortest_seconds(lambda: F.linear(x, weight))
    packed = _packed(weight, layout)
    return shortest_seconds(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))


class _Converter:
    """Weights in a type, one at a time in the same memory: for new memory the system takes as long again."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self._memory = dtype, torch.empty(0, dtype=dtype)

    def __call__(self, weight: Tensor) -> Tensor:
        """It is valid until the next call; the weight itself where it has the type."""
        if weight.dtype == self.dtype:
            return weight
        if self._memory.numel() < weight.numel():
            self._memory = self._memory.new_empty(weight.numel())
        return self._memory[: weight.numel()].view(weight.shape).copy_(weight)


def _packed(weight: Tensor, layout: Layout) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1 if layout == "one row" else None)


class PackedLinear(nn.Module):
    """A linear layer with a fused ``activation``.

    Args:
        linear: has the weight.
        layout: of the packed one.
        activation: ``none`` or ``swish``.
        convert: to the type that is computed in. A weight of another type that is large (``lm_head``) is converted
            and packed in several parts, or the plain one would be in memory beside the packed one.
    """

    def __init__(
        self, linear: nn.Linear, layout: Layout, activation: str = "none", convert: _Converter | None = None
    ) -> None:
        super().__init__()
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        convert = convert or _Converter(weight.dtype)
        rows = len(weight) if weight.dtype == convert.dtype else max(1, _PART // weight.shape[1])
        # Opaque to torch: neither a parameter nor a buffer can hold this layout.
        self.weights = [_packed(convert(part), layout) for part in weight.split(rows)]
        self.biases = [None] * len(self.weights) if bias is None else list(bias.split(rows))
        self.activation, self._rows = activation, rows

    def forward(self, x: Tensor) -> Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        return _joined(
            [linear(x, weight, bias, self.activation, [], "") for weight, bias in zip(self.weights, self.biases)]
        )

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """The result times ``factor``, fused."""
        linear, factors = torch.ops.mkldnn._linear_pointwise.binary, factor.split(self._rows, -1)
        return _joined(
            [linear(x, part, weight, bias, "mul") for part, weight, bias in zip(factors, self.weights, self.biases)]
        )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class PackedFP8Linear(nn.Module):
    """:class:`~qwen2vl_trt.layers.FP8Linear`, computed in its input's type; the weight is converted once."""

    def __init__(self, linear: FP8Linear, layout: Layout, convert: _Converter) -> None:
        super().__init__()
        self.weight = _packed(convert(linear.weight.detach()), layout)
        self.input_scale = linear.input_scale.detach()
        self.scale = self.input_scale * linear.weight_scale.detach()
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        x = quantize_fp8(x, self.input_scale).to(x.dtype)
        return rescale(torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], ""), self.scale, self.bias)


class PackedSwiGLU(nn.Module):
    """:class:`~qwen2vl_trt.layers.SwiGLU` in three passes over its activations instead of five."""

    def __init__(self, mlp: SwiGLU, layout: Layout, convert: _Converter | None = None) -> None:
        super().__init__()
        self.gate_proj = PackedLinear(mlp.gate_proj, layout, "swish", convert)
        self.up_proj = PackedLinear(mlp.up_proj, layout, convert=convert)
        self.down_proj = PackedLinear(mlp.down_proj, layout, convert=convert)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj.times(x, self.gate_proj(x)))


def pack(module: nn.Module, dtype: torch.dtype, layout: Layout) -> None:
    """Replace every linear layer of a module in place, one at a time to save memory.

    Weights of another type than ``dtype``, FP8 ones among them, become it on the way: they may be memory maps of a
    checkpoint (:func:`~qwen2vl_trt.weights.load_weights`).
    """
    _pack(module, layout, _Converter(dtype))


def _pack(module: nn.Module, layout: Layout, convert: _Converter) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, SwiGLU) and all(isinstance(part, nn.Linear) for part in child.children()):
            setattr(module, name, PackedSwiGLU(child, layout, convert))
        elif isinstance(child, FP8Linear):
            setattr(module, name, PackedFP8Linear(child, layout, convert))
        elif isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child, layout, convert=convert))
        else:
            _pack(child, layout, convert)
