"""Floating-point operations and bytes that a graph cannot do without, counted from its nodes.

Operations are two a multiply-add, of matrix products and attention; norms, activations and rotary angles are left out
(under 1% of both towers). Attention counts the pairs of query and key that it may see, so a causal mask and a row's
length make it less. Bytes are each weight once, the valid part of the key-value cache, and what is written to it;
activations may stay on the chip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import onnx_ir as ir
import sympy

_LENGTHS = 6  # input of Attention: nonpad_kv_seqlen


@dataclass(frozen=True)
class Work:
    """Of one call of a graph, or of several added up; ``fp8_flops`` are those of ``flops`` between FP8 numbers."""

    flops: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0
    fp8_flops: int = 0

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.cache_bytes + other.cache_bytes,
            self.fp8_flops + other.fp8_flops,
        )


@dataclass(frozen=True)
class Call:
    """The inputs of one call, as far as its work depends on them.

    Attributes:
        sizes: of the graph's dynamic dimensions, by name.
        lengths: of the inputs that hold the keys that each row of an attention may see, by name.
    """

    sizes: Mapping[str, int]
    lengths: Mapping[str, Sequence[int]]


def vision_call(window_lengths: Sequence[int], sequence_lengths: Sequence[int], merge_unit: int) -> Call:
    """Of a :class:`~qwen2vl_trt.windows.WindowLayout`; a window's empty slots are no work, so they count nothing."""
    patches = sum(window_lengths)
    return Call(
        sizes={
            "windows": patches,
            "slots": 1,
            "sequences": len(sequence_lengths),
            "longest": max(sequence_lengths),
            "tokens": patches // merge_unit,
        },
        lengths={"window_lengths": window_lengths, "sequence_lengths": sequence_lengths},
    )


def decoder_call(starts: Sequence[int], tokens: int) -> Call:
    """Of a step that appends ``tokens`` to rows that hold ``starts``."""
    return Call(
        sizes={"batch": len(starts), "sequence": tokens, "max_seq_len": max(starts) + tokens},
        lengths={"kv_lengths": [start + tokens for start in starts]},
    )


def count_work(graph: ir.Graph, call: Call) -> Work:
    """Work of one call.

    Args:
        graph: of :mod:`qwen2vl_trt.export.graphs`, traced (its weights may be open) or read from an engine folder.
        call: its inputs.

    Raises:
        KeyError: a dimension or a length that ``call`` does not give.
    """
    flops, fp8_flops, cache_bytes = 0, 0, 0.0
    for node in graph:
        if node.op_type in ("MatMul", "Gemm"):
            product = 2 * math.prod(_shape(node.outputs[0], call)) * _summed_over(node, call)
            flops += product
            fp8_flops += product * all(_dequantised(_input(node, side)) for side in (0, 1))
        elif node.op_type == "Attention":
            flops += _attention_flops(node, call)
            cache_bytes += _read_from_cache(node, call)
        elif node.op_type == "TensorScatter":
            cache_bytes += math.prod(_shape(_input(node, 1), call)) * _itemsize(_input(node, 1))  # written
    return Work(flops, sum(_weight_bytes(graph)), int(cache_bytes), fp8_flops)


def _dequantised(value: ir.Value) -> bool:
    """Whether it is FP8 numbers and their scale, perhaps transposed: an engine multiplies those as they are."""
    producer = value.producer()
    while producer is not None and producer.op_type == "Transpose":
        producer = _input(producer, 0).producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return False
    return _input(producer, 0).dtype == ir.DataType.FLOAT8E4M3FN


def _summed_over(node: ir.Node, call: Call) -> int:
    left = _shape(_input(node, 0), call)
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transA")
    return left[0] if transposed else left[-1]


def _attention_flops(node: ir.Node, call: Call) -> int:
    _, heads, queries, size = _shape(_input(node, 0), call)
    if node.attributes.get_int("is_causal"):
        # Lower-right: the last query sees all keys of its row, the one before it one less.
        pairs = sum(queries * keys - queries * (queries - 1) // 2 for keys in _lengths(node, call))
    else:
        pairs = sum(keys * keys for keys in _lengths(node, call))  # a row's queries are as many as its keys
    return 4 * heads * size * pairs  # scores, and values weighted by them


def _read_from_cache(node: ir.Node, call: Call) -> float:
    size = 0.0
    for cache in (_input(node, 1), _input(node, 2)):
        producer = cache.producer()
        if producer is not None and producer.op_type == "TensorScatter":
            assert cache.shape is not None
            _, heads, _, width = cache.shape  # a fixed number of heads and head size
            size += sum(_lengths(node, call)) * int(heads) * int(width) * _itemsize(cache)  # type: ignore[arg-type]
    return size


def _lengths(node: ir.Node, call: Call) -> Sequence[int]:
    name = _input(node, _LENGTHS).name
    assert name is not None
    return call.lengths[name]


def _weight_bytes(graph: ir.Graph) -> Iterator[int]:
    """Of every initialiser, in the type in which it is read.

    A weight that is only cast is cast once, when the engine is loaded; one that is dequantised is read as it is stored.
    """
    for value in graph.initializers.values():
        users = value.uses()
        casts = [use.node for use in users if use.node.op_type == "Cast"]
        read = casts[0].outputs[0] if casts and len(casts) == len(users) else value
        assert value.shape is not None
        elements = math.prod(dim for dim in value.shape if isinstance(dim, int))  # a weight has no other dimension
        yield math.ceil(elements * _itemsize(read))


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _itemsize(value: ir.Value) -> float:
    assert value.dtype is not None
    return value.dtype.itemsize


def _shape(value: ir.Value, call: Call) -> list[int]:
    assert value.shape is not None, f"{value.name} has no shape"
    return [
        dim if isinstance(dim, int) else _evaluate(str(dim.value), tuple(call.sizes.items())) for dim in value.shape
    ]


@lru_cache(maxsize=4096)
def _evaluate(expression: str, sizes: tuple[tuple[str, int], ...]) -> int:
    """A dimension as the exporter writes it: ``windows``, ``((slots*windows)//4)``."""
    found = sympy.sympify(expression, locals={name: sympy.Integer(size) for name, size in sizes})
    if not isinstance(found, sympy.Integer):
        raise KeyError(expression)
    return int(found)
