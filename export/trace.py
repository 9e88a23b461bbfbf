"""Trace a graph on the meta device: no weight is touched, whatever the model's size."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer
import torch
from torch import nn

from qwen2vl_trt.weights import keeps_type

from .graphs import Graph
from .operators import OPSET, translations

# Sizes to trace with: different, none 0 or 1, so that no dimension is mistaken for another or for a constant.
_EXAMPLE = {
    "windows": 3,
    "slots": 8,
    "sequences": 2,
    "longest": 12,
    "tokens": 5,
    "batch": 2,
    "sequence": 7,
    "max_seq_len": 32,
}


_NOISY = ("torch.onnx._internal.exporter._registration", "onnx_ir.passes.common.initializer_deduplication")


def trace(graph: Graph, dtype: torch.dtype) -> ir.Model:
    """Export a graph to ONNX; ``dtype`` is of weights and activations, FP8 apart.

    Its weight initialisers carry the module's parameter names, a type and a shape, and no value;
    :func:`qwen2vl_trt.export.weights.point_to_checkpoint` fills them in.
    """
    module, constants = _meta_module(graph, dtype)
    tensors = [
        torch.empty(
            [_EXAMPLE[dim] if isinstance(dim, str) else dim for dim in spec.shape], dtype=spec.dtype, device="meta"
        )
        for spec in graph.inputs.values()
    ]
    dynamic = [
        {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
        for spec in graph.inputs.values()
    ]
    with torch.no_grad(), _quiet():
        program = torch.export.export(
            module,
            (),
            kwargs=graph.arguments(tensors),
            dynamic_shapes=graph.arguments(dynamic),  # type: ignore[arg-type]
            strict=False,
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=translations(),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            verbose=False,
            optimize=False,
        )
    assert exported is not None
    model = exported.model
    for name, value in model.graph.initializers.items():
        if name in constants:
            value.const_value = ir.tensor(constants[name].numpy(), name=name)
        elif value.const_value is not None and value.const_value.raw.is_meta:
            value.const_value = None
    with _quiet():
        onnxscript.optimizer.optimize_ir(model)
    _name_dimensions(model, graph)
    _name_nodes(model)
    passes.ClearMetadataAndDocStringPass()(model)
    for value in (*_values(model), *model.graph.initializers.values()):  # the pass leaves theirs
        value.metadata_props.clear()
    return model


def _meta_module(graph: Graph, dtype: torch.dtype) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The module without storage, and the real values of its buffers, which no checkpoint holds."""
    with torch.device("meta"):
        module = graph.module().eval()
    constants = dict(module.named_buffers())
    module.to("meta")
    for name, parameter in module.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if not keeps_type(module.get_submodule(owner), leaf):
            parameter.data = parameter.data.to(dtype)
    return module, constants


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what torch and onnxscript warn of and no user can change.

    torch.onnx misses torchvision's operators, which no graph here has; torch.export deprecates a call of its own;
    constant folding misses the values of the weights, which come later.
    """
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _name_dimensions(model: ir.Model, graph: Graph) -> None:
    """Give the dynamic dimensions the names of the specification instead of the tracer's s12, s22."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, graph.inputs.values()):
        assert value.shape is not None
        names |= {str(dim): name for dim, name in zip(value.shape, spec.shape) if isinstance(name, str)}
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape(
                dim if isinstance(dim, int) else symbol.sub(lambda m: names[m[0]], str(dim.value))
                for dim in value.shape
            )


def _name_nodes(model: ir.Model) -> None:
    """Name every node after the module that made it, so that an engine's layers can be read."""
    seen: dict[str, int] = {}
    for node in model.graph:
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))[:-1]
        module = next((scope for scope in reversed(scopes) if scope and not scope.startswith("_")), "graph")
        name = f"{module}.{node.op_type}"
        seen[name] = seen.get(name, 0) + 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _values(model: ir.Model) -> list[ir.Value]:
    produced = [output for node in model.graph for output in node.outputs]
    return [*model.graph.inputs, *produced]
