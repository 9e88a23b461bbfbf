"""Linear layers with weights prepacked in oneDNN's blocked layout, for the torch backend on a CPU.

``torch.nn.functional.linear`` reorders its weight in every call, which triples the memory traffic of decoding. The
operators here are those of torch's compiler for frozen CPU graphs (``torch/_inductor/fx_passes/mkldnn_fusion.py``).
They are private, and without AVX-512 exist in FP32 alone, so :func:`available` tries them first.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor, nn

from qwen2vl_trt.layers import FP8Linear, SwiGLU
from qwen2vl_trt.ops import quantize_fp8, rescale

logger = logging.getLogger(__name__)

_TEST_WIDTH = 32
_TOLERANCE = 0.05  # of the largest result: several roundings to BF16


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
            found, expected = PackedSwiGLU(mlp)(x), mlp(x)
    except (AttributeError, RuntimeError, TypeError) as error:
        # Every CPU has them in FP32; in BF16 and FP16 only newer ones do.
        level = logging.INFO if isinstance(error, RuntimeError) and dtype != torch.float32 else logging.WARNING
        reason = " ".join(str(error).split())[:200]
        logger.log(level, "no packed linear layers of %s here; weights are reordered in every call: %s", dtype, reason)
        return False
    if not (found - expected).abs().max() <= _TOLERANCE * expected.abs().max():
        logger.warning("packed linear layers of %s are wrong here; they are left out, which costs time", dtype)
        return False
    return True


class PackedLinear(nn.Module):
    """A linear layer with a fused ``activation``."""

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        super().__init__()
        # Opaque to torch: neither a parameter nor a buffer can hold this layout.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.activation, [], "")

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """The result times ``factor``, fused."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, factor, self.weight, self.bias, "mul")


class PackedFP8Linear(nn.Module):
    """:class:`~qwen2vl_trt.layers.FP8Linear`, computed in its input's type; the weight is converted once."""

    def __init__(self, linear: FP8Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), None)
        self.input_scale = linear.input_scale.detach()
        self.scale = self.input_scale * linear.weight_scale.detach()
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        x = quantize_fp8(x, self.input_scale).to(x.dtype)
        return rescale(torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], ""), self.scale, self.bias)


class PackedSwiGLU(nn.Module):
    """:class:`~qwen2vl_trt.layers.SwiGLU` in three passes over its activations instead of five."""

    def __init__(self, mlp: SwiGLU) -> None:
        super().__init__()
        self.gate_proj = PackedLinear(mlp.gate_proj, "swish")
        self.up_proj = PackedLinear(mlp.up_proj)
        self.down_proj = PackedLinear(mlp.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj.times(x, self.gate_proj(x)))


def pack(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every linear layer of a module in place, one at a time to save memory; FP8 weights become ``dtype``."""
    for name, child in list(module.named_children()):
        if isinstance(child, SwiGLU) and all(isinstance(part, nn.Linear) for part in child.children()):
            setattr(module, name, PackedSwiGLU(child))
        elif isinstance(child, FP8Linear):
            setattr(module, name, PackedFP8Linear(child, dtype))
        elif isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        else:
            pack(child, dtype)
