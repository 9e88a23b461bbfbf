"""Repair a network as TensorRT's ONNX parser leaves it, so that it means what the graph says.

The parser (seen in TensorRT-RTX 1.7.1) imports the operator ``Attention``

- without its lengths (``nonpad_kv_seqlen``), and causal in the upper-left corner: with a cache, wrong answers; here it
  gets a mask, or TensorRT's own lengths and the lower-right corner (``--attention-mask``);
- with queries and keys each multiplied by the root of the softmax scale *in the network's type*: in BF16 that scale
  is 0.3 % off for heads of 128, and both are rounded once more;
- without leave to decompose: no engine where there is no fused kernel, as in FP32. With it, one is used where
  there is.

Lengths say what a mask says in fewer bytes. But TensorRT 11.1 and 11.2 are reported to build attention with lengths
that sees what lies beyond them, in BF16 and on some GPUs alone, and not to build it in FP16 at all
(https://github.com/NVIDIA/TensorRT-Model-Connect/pull/1035 and 1048). TensorRT-RTX 1.7.1 makes a mask of the lengths
itself wherever a prompt is read, and runs the same kernels either way.

The parser says nothing of any of these. :func:`lower` sets all of them right from the ONNX file, and ends by asking
:func:`find_faults`, which tests ask too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qwen2vl_trt.errors import BuildError

from .onnx_file import read_onnx
from .options import ATTENTION_MASKS


@dataclass(frozen=True)
class AttentionNode:
    """What the ONNX file says of one ``Attention``.

    Attributes:
        lengths: the graph's input with the number of keys.
        starts: of a causal one, the graph's input with the position of the first query: where the cache is written to.
    """

    name: str
    lengths: str
    starts: str | None

    @property
    def causal(self) -> bool:
        return self.starts is not None


def attention_nodes(path: Path) -> dict[str, AttentionNode]:
    """The attention nodes of an ONNX file, by name.

    Raises:
        BuildError: one that this pass would not do justice to.
    """
    with read_onnx(path) as model:
        graph = model.graph
    inputs = {value.name for value in graph.input}
    written = {node.output[0]: node.input[2] for node in graph.node if node.op_type == "TensorScatter"}
    nodes = {}
    for node in graph.node:
        if node.op_type != "Attention":
            continue
        causal = {attribute.name: attribute.i for attribute in node.attribute}.get("is_causal", 0) == 1
        others = {
            attribute.name for attribute in node.attribute if attribute.name != "is_causal" and _is_set(attribute)
        }
        given = dict(enumerate(node.input))
        starts = written.get(node.input[1]) if causal else None
        if others or any(given.get(i) for i in (3, 4, 5)) or given.get(6) not in inputs:
            raise BuildError(f"{path.name}: {node.name} is not plain attention with lengths from a graph input")
        if causal and starts not in inputs:
            raise BuildError(f"{path.name}: {node.name} is causal, and its keys are no cache that is written to")
        nodes[node.name] = AttentionNode(node.name, given[6], starts)
    return nodes


def _is_set(attribute: onnx.AttributeProto) -> bool:
    return bool(onnx.helper.get_attribute_value(attribute))


_SCALED = "_scaled"  # ends the names of rotary angles with the softmax scale


def lower(trt: Any, network: Any, path: Path, attention_mask: str = ATTENTION_MASKS[0]) -> list[Any]:
    """Repair every attention of a network, as it was parsed from ``path``.

    Args:
        attention_mask: one of :data:`qwen2vl_trt.engines.options.ATTENTION_MASKS`.

    Returns:
        Arrays that the network points to; keep them until it is built.

    Raises:
        BuildError: the parser left something else than this pass knows how to repair.
    """
    nodes = attention_nodes(path)
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    producers = _producers(network)
    rotary, masks = _ScaledRotary(trt, network), _MaskMaker(trt, network)
    lengths: dict[str, Any] = {}
    for attention in list(_attentions(trt, network)):
        if attention.name not in nodes:
            raise BuildError(f"{path.name}: TensorRT made an attention {attention.name!r} that the graph does not have")
        node = nodes[attention.name]
        for index in (0, 1):
            attention.set_input(index, _unscaled(trt, producers, attention, index))
        attention.causal_kind = _causal_kind(trt, node, attention_mask)
        if attention_mask == "lengths":
            if node.lengths not in lengths:  # one cast each, shared by all layers
                lengths[node.lengths] = network.add_cast(inputs[node.lengths], trt.int32).get_output(0)
                lengths[node.lengths].name = f"{node.lengths}_int32"
            attention.key_value_lengths = lengths[node.lengths]
        else:
            queries, keys = attention.get_input(0), attention.get_input(1)
            starts = inputs[node.starts] if node.starts is not None else None
            attention.mask = masks.mask(queries, keys, inputs[node.lengths], starts)
        attention.decomposable = True
        rotary.scale(_rotary_of(trt, producers, attention, 0), int(attention.get_input(0).shape[-1]) ** -0.5)
    faults = find_faults(trt, network, path, attention_mask)
    if faults:
        raise BuildError(f"{path.name}: {faults[0]} ({trt.__name__} {trt.__version__}); no engine was built from it")
    return [*rotary.arrays, *masks.arrays]


def find_faults(trt: Any, network: Any, path: Path, attention_mask: str = ATTENTION_MASKS[0]) -> list[str]:
    """What in a lowered network would make an engine that answers wrongly, or that needs more than TensorRT itself."""
    nodes, producers = attention_nodes(path), _producers(network)
    attentions = {attention.name: attention for attention in _attentions(trt, network)}
    faults = [f"attention {name} is missing" for name in nodes.keys() - attentions.keys()]
    faults += [f"attention {name} is not in the graph" for name in attentions.keys() - nodes.keys()]
    for name in sorted(nodes.keys() & attentions.keys()):
        faults += [
            f"attention {name} {fault}"
            for fault in _attention_faults(trt, producers, attentions[name], nodes[name], attention_mask)
        ]
    faults += _cache_faults(trt, network, path)
    outputs = {network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)}
    if "logits" in outputs and outputs["logits"].dtype != trt.float32:
        faults.append(f"output logits is {outputs['logits'].dtype.name}, not FP32")
    faults += [f"layer {layer.name} is a plugin" for layer in _layers(network) if "PLUGIN" in layer.type.name]
    return faults


def _attention_faults(
    trt: Any, producers: dict[str, Any], attention: Any, node: AttentionNode, attention_mask: str
) -> Iterator[str]:
    wanted = _causal_kind(trt, node, attention_mask)
    if attention.causal_kind != wanted:
        yield f"is {attention.causal_kind.name}, not {wanted.name}"
    lengths, mask = attention.key_value_lengths, attention.mask
    if attention_mask == "lengths":
        source = producers.get(lengths.name) if lengths is not None else None
        if source is None or source.get_input(0).name != node.lengths or lengths.dtype != trt.int32:
            yield f"does not take its lengths from {node.lengths}"
        if mask is not None:
            yield "has a mask beside its lengths"
    else:
        if mask is None or mask.name != f"{node.lengths}_mask" or mask.dtype != trt.bool:
            yield f"has no mask made from {node.lengths}"
        if lengths is not None:
            yield "has lengths beside its mask"
    if not attention.decomposable:
        yield "may not be decomposed where there is no fused kernel"
    for index, what in enumerate(("queries", "keys")):
        if _made_by(trt, producers, attention.get_input(index), trt.LayerType.ELEMENTWISE):
            yield f"scales its {what} in the network's type"
    rotary = _rotary_of(trt, producers, attention, 0)
    if not rotary.get_input(1).name.endswith(_SCALED):  # a model's own factor is a multiplication, too
        yield "has no softmax scale"


def _cache_faults(trt: Any, network: Any, path: Path) -> Iterator[str]:
    """Every cache goes in as an input and comes out, updated, as the output of its name: so TensorRT aliases them."""
    inputs = {network.get_input(i).name for i in range(network.num_inputs)}
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    with read_onnx(path) as model:
        expected = {node.input[0] for node in model.graph.node if node.op_type == "TensorScatter"}
    found = set()
    for layer in _layers(network):
        if layer.type == trt.LayerType.KV_CACHE_UPDATE:
            cache = layer.get_input(0).name
            found.add(cache)
            if cache not in inputs or layer.get_output(0).name != f"new_{cache}" or f"new_{cache}" not in outputs:
                yield f"cache update {layer.name} is not aliased from an input to its output"
    if found != expected:
        yield f"cache {min(found ^ expected)} has no update of its own"


class _ScaledRotary:
    """Puts the softmax scale into the queries' rotary angles: in FP32, once for all layers, for nothing."""

    def __init__(self, trt: Any, network: Any) -> None:
        self._trt, self._network, self._scaled = trt, network, {}  # type: ignore[var-annotated]
        self.arrays: list[Any] = []

    def scale(self, rotary: Any, scale: float) -> None:
        for index in (1, 2):  # cos, sin
            angle = rotary.get_input(index)
            if (angle.name, scale) not in self._scaled:
                self._scaled[angle.name, scale] = self._multiply(angle, scale)
            rotary.set_input(index, self._scaled[angle.name, scale])

    def _multiply(self, angle: Any, scale: float) -> Any:
        if angle.dtype != self._trt.float32:
            raise BuildError(f"rotary angles {angle.name} are {angle.dtype.name}; this pass expects FP32")
        self.arrays.append(np.full((1,) * len(angle.shape), scale, dtype=np.float32))
        factor = self._network.add_constant(self.arrays[-1].shape, self._trt.Weights(self.arrays[-1])).get_output(0)
        scaled = self._network.add_elementwise(angle, factor, self._trt.ElementWiseOperation.PROD).get_output(0)
        scaled.name = f"{angle.name}{_SCALED}"
        return scaled


class _MaskMaker:
    """Makes masks in a network, one for all attentions that see alike."""

    def __init__(self, trt: Any, network: Any) -> None:
        self._trt, self._network = trt, network
        self._made: dict[tuple[str, str | None], Any] = {}
        self.arrays: list[np.ndarray] = []

    def mask(self, queries: Any, keys: Any, lengths: Any, starts: Any | None) -> Any:
        """``[B, 1, S, M]``, true where a query sees a key.

        Args:
            queries: ``[B, H, S, D]``.
            keys: ``[B, Hkv, M, D]``.
            lengths: ``[B]`` int64 number of keys.
            starts: ``[B]`` int64 position of a row's first query, where attention is causal.
        """
        known = lengths.name, starts.name if starts is not None else None
        if known not in self._made:
            mask = self._make(queries, keys, lengths, starts)
            mask.name = f"{lengths.name}_mask"
            self._made[known] = mask
        return self._made[known]

    def _make(self, queries: Any, keys: Any, lengths: Any, starts: Any | None) -> Any:
        operation = self._trt.ElementWiseOperation
        key = self._shaped(self._count(keys, 1), (1, 1, 1, -1))
        there = self._combine(key, self._shaped(lengths, (-1, 1, 1, 1)), operation.LESS)
        # The sizes only shape what is counted here: as numbers on the GPU they would have to be copied there first.
        if starts is None:  # TensorRT broadcasts a mask over rows and heads, not over queries
            row = self._shaped(self._count(queries, 0), (1, 1, -1, 1))
            every = self._combine(row, self._constant(1, (1, 1, 1, 1)), operation.LESS)
            return self._combine(there, every, operation.AND)
        query = self._shaped(self._count(queries, 1), (1, 1, -1, 1))
        first = self._shaped(starts, (-1, 1, 1, 1))
        ahead = self._combine(self._combine(key, query, operation.SUB), first, operation.SUB)
        before = self._combine(ahead, self._constant(1, (1, 1, 1, 1)), operation.LESS)
        return self._combine(there, before, operation.AND)

    def _count(self, tensor: Any, step: int) -> Any:
        """``[n]`` 0, step, 2 step, ...: one for each position of a tensor ``[B, H, n, D]``."""
        shape = self._network.add_shape(tensor).get_output(0)
        size = self._network.add_gather(shape, self._constant(2, (1,)), 0).get_output(0)
        fill = self._network.add_fill((1,), self._trt.FillOperation.LINSPACE, self._trt.int64)
        for index, value in enumerate((size, self._constant(0, ()), self._constant(step, (1,)))):
            fill.set_input(index, value)
        return fill.get_output(0)

    def _constant(self, value: int, shape: tuple[int, ...]) -> Any:
        self.arrays.append(np.full(shape, value, dtype=np.int64))
        return self._network.add_constant(shape, self._trt.Weights(self.arrays[-1])).get_output(0)

    def _shaped(self, tensor: Any, shape: tuple[int, ...]) -> Any:
        layer = self._network.add_shuffle(tensor)
        layer.reshape_dims = shape
        return layer.get_output(0)

    def _combine(self, left: Any, right: Any, operation: Any) -> Any:
        return self._network.add_elementwise(left, right, operation).get_output(0)


def _causal_kind(trt: Any, node: AttentionNode, attention_mask: str) -> Any:
    implied = node.causal and attention_mask == "lengths"  # TensorRT takes it beside lengths, not beside a mask
    return trt.CausalMaskKind.LOWER_RIGHT if implied else trt.CausalMaskKind.NONE


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(i) for i in range(network.num_layers))


def _attentions(trt: Any, network: Any) -> Iterator[Any]:
    for layer in _layers(network):
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer  # the bindings hand out every layer as its base class
            yield layer.attention


def _producers(network: Any) -> dict[str, Any]:
    """The layer that makes each tensor, by the tensor's name."""
    return {layer.get_output(i).name: layer for layer in _layers(network) for i in range(layer.num_outputs)}


def _made_by(trt: Any, producers: dict[str, Any], tensor: Any, kind: Any) -> bool:
    return tensor.name in producers and producers[tensor.name].type == kind


def _unscaled(trt: Any, producers: dict[str, Any], attention: Any, index: int) -> Any:
    """The queries or keys before the parser multiplied them by the root of the scale."""
    tensor = attention.get_input(index)
    if _made_by(trt, producers, tensor, trt.LayerType.ELEMENTWISE):
        layer = producers[tensor.name]
        layer.__class__ = trt.IElementWiseLayer
        if layer.op == trt.ElementWiseOperation.PROD and tuple(layer.get_input(1).shape) == (1, 1, 1, 1):
            return layer.get_input(0)
    raise BuildError(f"attention {attention.name}: {trt.__name__} {trt.__version__} scales it in a way not known here")


def _rotary_of(trt: Any, producers: dict[str, Any], attention: Any, index: int) -> Any:
    """The rotary embedding that the queries come from; what lies between only moves them."""
    tensor = attention.get_input(index)
    while tensor.name in producers:
        if producers[tensor.name].type == trt.LayerType.ROTARY_EMBEDDING:
            return producers[tensor.name]
        tensor = producers[tensor.name].get_input(0)
    raise BuildError(f"attention {attention.name} has no rotary embedding in front of its queries")
