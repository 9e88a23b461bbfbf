"""Layers of 4 and 8 bits as graphs: what they mean in ONNX Runtime, its operators, and how far its rounding goes."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from qwen2vl_trt.export.blocked_weights import BLOCKED, HEAD_BLOCK, BlockedFile, use_blocked
from qwen2vl_trt.export.graphs import Graph, TensorSpec
from qwen2vl_trt.export.trace import trace
from qwen2vl_trt.export.weights import point_to_checkpoint
from qwen2vl_trt.layers import BlockedLinear
from qwen2vl_trt.quantized.linear import QuantizedLinear
from qwen2vl_trt.quantized.rounding import round_to_nearest
from tests.qwen2vl_trt.quantized.test_blocks import IN, OUT, weight
from tests.support.bounds import FP32
from tests.support.models import relative_error

KINDS = {
    "int4": {"numbers": "int4", "group_size": 128},
    "int4 blocks of 32, zero points": {"numbers": "int4", "group_size": 32, "zeros": True},
    "int4 all that there is": {"numbers": "int4", "group_size": 64, "zeros": True, "index": True, "smoothing": True},
    "int8": {"numbers": "int8", "group_size": 128},
    "int8 a scale a channel, zero points": {"numbers": "int8", "group_size": IN, "zeros": True},
    "nvfp4": {"numbers": "nvfp4", "group_size": 16},
}


class Two(nn.Module):
    """Two layers of one input, as q, k and v are."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(IN, OUT, bias=False), nn.Linear(IN, OUT, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.other(x)


@pytest.fixture
def exported(tmp_path):
    """Writes a graph of two layers with the same weight."""

    def export(given: QuantizedLinear, bits: int, tensorrt: bool = False) -> Path:
        with (tmp_path / BLOCKED).open("wb") as file:
            writer = BlockedFile(file, tmp_path, torch.float32)
            layers = {name: writer.layer(given, bits, tensorrt) for name in ("one", "other")}
        graph = Graph(
            "decoder",
            "",
            lambda: use_blocked(Two(), layers),
            {"x": TensorSpec(("batch", "sequence", IN), torch.float32)},
            ("y", "z"),
            lambda tensors: {"x": tensors[0]},
        )
        model = trace(graph, torch.float32)
        point_to_checkpoint(model, graph, _NoCheckpoint(tmp_path), tmp_path, layers)
        ir.save(model, tmp_path / "decoder.onnx")
        onnx.checker.check_model(tmp_path / "decoder.onnx", full_check=True)
        return tmp_path / "decoder.onnx"

    return export


class _NoCheckpoint:
    """What :func:`point_to_checkpoint` reads of a checkpoint; every weight here is in the other file."""

    names: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = type("Config", (), {"text": type("Text", (), {"tie_word_embeddings": False})})


def run(path: Path, x: Tensor, level: int) -> tuple[list[Tensor], list[str]]:
    """Outputs, and the operators that ONNX Runtime makes of the graph."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    options.optimized_model_filepath = str(path.with_name("optimised.onnx"))
    options.log_severity_level = 3  # a file with what it optimised for this CPU is no fault
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x.numpy()})
    nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    return [torch.from_numpy(y) for y in found], [node.op_type for node in nodes]


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_multiplies_packed_numbers(exported, kind, level):
    """With activations in FP32 (level 0) up to the order of sums; in 8 bits (level 4) up to a step of each."""
    given, bits = weight(**KINDS[kind]), 4 if KINDS[kind]["numbers"] == "int4" else 8
    path = exported(given, bits)
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(1))
    found, operators = run(path, x, level)
    assert operators.count("MatMulNBits") == 2
    assert "DequantizeLinear" not in operators
    if given.group_index is not None:
        assert operators.count("Gather") == 1, "layers of one input share its order"
    if given.zero_points is not None:
        assert operators.count("ReduceSum") == 1, "and its sums"
    meant = given.dequantize().double()
    products = x.double().abs() @ meant.abs().T
    step = torch.zeros(())
    if given.zero_points is not None:  # two products that cancel: as large as the numbers without zero points
        whole = (given.values.double() - 2 ** (bits - 1)).abs() * _of_channels(given, given.scales)
        scale = 1 if given.input_scale is None else given.input_scale.double()
        products = products + 2 * x.double().abs() @ (whole * scale).T
    if level == 4:
        step = _rounding(given, bits, x)
    for y in found:
        assert ((y - x.double() @ meant.T).abs() <= 2**-20 * products + step).all()


def _of_channels(given: QuantizedLinear, values: Tensor) -> Tensor:
    """Of groups to input channels: ``[out, G]`` to ``[out, in]``."""
    index = torch.arange(IN) // given.group_size if given.group_index is None else given.group_index
    return values.double()[:, index]


def _rounding(given: QuantizedLinear, bits: int, x: Tensor) -> Tensor:
    """How far a product is off whose activations are a step off: 1/127 of the largest of a block, ``[.., out]``."""
    if given.input_scale is not None:
        x = x * given.input_scale
    order = torch.arange(IN) if given.group_index is None else given.group_index.argsort(stable=True)
    block = min(given.group_size, 128)
    steps = x[..., order].double().abs().unflatten(-1, (-1, block)).amax(-1) / 127
    values = given.values.double()
    if given.values.dtype == torch.uint8:
        values = values - 2 ** (bits - 1)
    weights = (values.abs() * _of_channels(given, given.scales))[:, order].unflatten(1, (-1, block)).sum(-1)
    return steps @ weights.T


def test_two_numbers_a_byte(exported):
    path = exported(weight("int4", 128), 4)
    (tensor,) = (value for value in onnx.load(path).graph.initializer if value.name == "one.weight")
    assert (tensor.data_type, list(tensor.dims)) == (onnx.TensorProto.INT4, [IN, OUT])
    assert torch.equal(
        torch.from_numpy(onnx.numpy_helper.to_array(tensor).astype("int8")), weight("int4", 128).values.T
    )
    assert path.with_name(BLOCKED).stat().st_size < 2 * (IN * OUT // 2 + 4 * IN // 128 * OUT + 2 * 64)


def test_e2m1_as_it_is(exported):
    """The numbers, their E4M3 scales and the FP32 scale of those, as ONNX's own reader has them."""
    given = weight("nvfp4", 16)
    overall = torch.tensor(0.37)
    stored = (given.scales * 100).to(torch.float8_e4m3fn)
    given = QuantizedLinear(given.values, stored.float() * overall, None, 16, global_scale=overall)
    graph = onnx.load(exported(given, 8, tensorrt=True)).graph
    found = {value.name.removeprefix("one."): value for value in graph.initializer if value.name.startswith("one.")}
    assert {name: value.data_type for name, value in found.items()} == {
        "weight": onnx.TensorProto.FLOAT4E2M1,
        "block_scales": onnx.TensorProto.FLOAT8E4M3FN,
        "global_scale": onnx.TensorProto.FLOAT,
    }
    arrays = {name: torch.from_numpy(onnx.numpy_helper.to_array(value).astype("f4")) for name, value in found.items()}
    assert torch.equal(arrays["weight"], given.values.float().T)
    assert torch.equal(arrays["block_scales"], stored.float().T)
    assert torch.equal(arrays["global_scale"], overall)


@pytest.mark.parametrize("zeros", [False, True])
def test_a_scale_a_channel_stays_one(exported, zeros):
    """For TensorRT, which fuses that with the product, and no blocks of 8 bits."""
    given = weight("int8", IN, zeros)
    path = exported(given, 8, tensorrt=True)
    (node, _) = (node for node in onnx.load(path).graph.node if node.op_type == "DequantizeLinear")
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    assert (attributes["axis"], attributes.get("block_size", 0)) == (1, 0)
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(1))
    meant = given.dequantize().double()
    for y in run(path, x, 0)[0]:
        assert relative_error(y, x.double() @ meant.T) < FP32


def test_the_module_computes_what_its_graph_says():
    """Eagerly, on the numbers that a graph would hold."""
    given = weight("int4", 64, zeros=True, index=True, smoothing=True)
    linear = nn.Linear(IN, OUT)
    layer = BlockedLinear(linear, 64, ("weight", "scales", "offsets", "permutation", "input_scale"))
    order = given.group_index.argsort(stable=True)
    layer.weight.copy_((given.values.int() - 8).char()[:, order].T)
    layer.scales.data = given.scales.T.contiguous()
    layer.offsets.data = ((8 - given.zero_points.float()) * given.scales).T.contiguous()
    layer.permutation.copy_(order)
    layer.input_scale.data = given.input_scale[order]
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.linear(x, given.dequantize(), linear.bias)
    assert (layer(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_lm_head_in_8_bits(tmp_path):
    """More rows than are rounded at a time."""
    head = torch.randn(5000, 2 * HEAD_BLOCK, generator=torch.Generator().manual_seed(0)).bfloat16()
    with (tmp_path / BLOCKED).open("wb") as file:
        layer = BlockedFile(file, tmp_path, torch.float32).layer(round_to_nearest(head, 8, HEAD_BLOCK), 8, False)
    parts = [round_to_nearest(rows, 8, HEAD_BLOCK) for rows in head.split(100)]
    values, scales = torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts])
    assert layer.block_size == HEAD_BLOCK
    assert torch.equal(torch.from_numpy(layer.parts["weight"].numpy()), values.T)
    assert torch.equal(torch.from_numpy(layer.parts["scales"].numpy()), scales.T)
