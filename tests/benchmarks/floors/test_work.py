"""The counter against counts by hand. Real depths are reached by adding blocks: tracing 36 layers takes a minute."""

from dataclasses import replace
from functools import cache

import onnx_ir as ir
import pytest
import torch

from qwen2vl_trt.benchmarks.floors.rates import Floor, Rates
from qwen2vl_trt.benchmarks.floors.work import Call, Work, count_work, decoder_call, vision_call
from qwen2vl_trt.benchmarks.random_model import config_of
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.export.graphs import decoder_graph, vision_graph
from qwen2vl_trt.export.trace import trace


@cache
def vision(blocks, full):
    """7B's tower, cut."""
    raw = config_of("Qwen2.5-VL-7B", 1, blocks)
    raw["vision_config"]["fullatt_block_indexes"] = list(full)
    graph = vision_graph(Qwen2VLConfig.from_dict(raw), torch.bfloat16)
    return trace(graph, torch.bfloat16).graph


@cache
def decoder(layers):
    graph = decoder_graph(Qwen2VLConfig.from_dict(config_of("Qwen2.5-VL-7B", layers, 1)), torch.bfloat16)
    return trace(graph, torch.bfloat16).graph


def times(count, work):
    return Work(count * work.flops, count * work.weight_bytes, count * work.cache_bytes)


def minus(one, other):
    return one + times(-1, other)


def whole_tower(call):
    """32 blocks, 4 of them with full attention."""
    window, full, both = (count_work(vision(*cut), call) for cut in ((1, ()), (1, (0,)), (2, (1,))))
    return window + times(27, minus(both, full)) + times(4, minus(both, window))


def test_an_image_of_448x448_through_the_real_tower():
    found = whole_tower(vision_call([64] * 16, [1024], 4))
    width, inner, patches = 1280, 3420, 1024
    linear = patches * 32 * (4 * width * width + 3 * width * inner)
    patch_embedding = patches * 1176 * width
    merger = patches // 4 * (5120 * 5120 + 5120 * 3584)
    attention = 2 * width * (28 * 16 * 64 * 64 + 4 * patches * patches)
    assert found.flops == 2 * (linear + patch_embedding + merger + attention)
    assert found.flops == pytest.approx(1.34e12, rel=0.01)
    assert found.cache_bytes == 0


def test_empty_slots_of_border_windows_are_no_work():
    # 6 x 10 patches: 3 x 5 merge groups, so a window of 48 and one of 12 in a layout of 2 x 64 slots.
    graph = vision(1, ())
    found = count_work(graph, vision_call([48, 12], [60], 4))
    linear = 60 * (4 * 1280 * 1280 + 3 * 1280 * 3420 + 1176 * 1280) + 15 * (5120 * 5120 + 5120 * 3584)
    assert found.flops == 2 * linear + 4 * 1280 * (48 * 48 + 12 * 12)


def test_a_token_of_7b():
    one, two = (count_work(decoder(layers), decoder_call([100], 1)) for layers in (1, 2))
    found = one + times(27, minus(two, one))
    hidden, inner, kv, vocabulary = 3584, 18944, 512, 152064
    matrices = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    small = 2 * hidden + hidden + 2 * kv  # norms, biases of q, k and v
    weights = 28 * (matrices + small) + hidden + vocabulary * hidden
    assert found.weight_bytes == pytest.approx(2 * weights, rel=1e-6)  # the rest: rotary frequencies
    assert found.bytes == pytest.approx(14.1e9, rel=0.01)
    assert found.cache_bytes == 28 * 2 * 2 * kv * (101 + 1)  # 101 read, one written
    assert found.flops == 2 * (28 * matrices + vocabulary * hidden) + 28 * 4 * hidden * 101


def test_a_batch_reads_its_weights_once_and_its_caches_each():
    one = count_work(decoder(1), decoder_call([100], 1))
    rows = count_work(decoder(1), decoder_call([100, 50, 7], 1))
    assert rows.weight_bytes == one.weight_bytes
    assert rows.cache_bytes == 2 * 2 * 512 * (101 + 51 + 8 + 3)


def test_a_prompt_sees_what_came_before_it():
    """Causal: token i of a chunk sees i + 1 keys of it and all before; only the last one gets logits."""
    whole = count_work(decoder(1), decoder_call([0], 96))
    first, second = (count_work(decoder(1), decoder_call([start], 48)) for start in (0, 48))
    logits = 2 * 152064 * 3584
    assert whole.flops == first.flops + second.flops - logits
    pairs = sum(range(1, 97))
    matrices = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    assert whole.flops == 2 * 96 * matrices + logits + 4 * 3584 * pairs


def linear(stored, between):
    """x @ W, with nodes between the stored weight ``[8, 4]`` and the product."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", 8]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(name="w", shape=ir.Shape([8, 4]), type=ir.TensorType(stored))
    nodes, value, initializers = [], weight, [weight]
    for kind in between:
        inputs = [value]
        if kind == "DequantizeLinear":
            scale = ir.Value(name="scale", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT))
            initializers.append(scale)
            inputs.append(scale)
        nodes.append(ir.node(kind, inputs))
        value = nodes[-1].outputs[0]
        value.shape, value.dtype = ir.Shape([8, 4]), ir.DataType.FLOAT
    nodes.append(ir.node("MatMul", [x, value]))
    nodes[-1].outputs[0].shape = ir.Shape(["batch", 4])
    return ir.Graph([x], nodes[-1].outputs, nodes=nodes, initializers=initializers)


@pytest.mark.parametrize(
    ("stored", "between", "size"),
    [
        (ir.DataType.BFLOAT16, (), 2 * 32),
        (ir.DataType.BFLOAT16, ("Cast",), 4 * 32),  # cast to FP32 once, at load
        (ir.DataType.BFLOAT16, ("Transpose",), 2 * 32),
        (ir.DataType.FLOAT8E4M3FN, ("DequantizeLinear",), 32 + 4),  # read as it is stored, and its scale
    ],
)
def test_weights_count_in_the_type_in_which_they_are_read(stored, between, size):
    found = count_work(linear(stored, between), Call({"batch": 3}, {}))
    assert found == Work(flops=2 * 3 * 8 * 4, weight_bytes=size)


def test_an_unknown_dimension_is_an_error():
    with pytest.raises(KeyError, match="batch"):
        count_work(linear(ir.DataType.FLOAT, ()), Call({}, {}))


@pytest.mark.parametrize(
    ("left", "right", "fp8"),
    [
        (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FN, True),
        (None, ir.DataType.FLOAT8E4M3FN, False),  # weights alone: the product is in the type of the other side
        (ir.DataType.INT8, ir.DataType.INT8, False),
    ],
)
def test_products_of_fp8_numbers_are_counted_apart(left, right, fp8):
    def dequantised(stored, shape, transposed=False):
        value = ir.Value(shape=ir.Shape(shape[::-1] if transposed else shape), type=ir.TensorType(stored))
        nodes = [ir.node("DequantizeLinear", [value])]
        if transposed:
            nodes.append(ir.node("Transpose", nodes[-1].outputs))
        nodes[-1].outputs[0].shape = ir.Shape(shape)
        return nodes

    x = [] if left is None else dequantised(left, ["batch", 8])
    plain = ir.Value(name="x", shape=ir.Shape(["batch", 8]), type=ir.TensorType(ir.DataType.BFLOAT16))
    weight = dequantised(right, [8, 4], transposed=True)
    product = ir.node("MatMul", [x[-1].outputs[0] if x else plain, weight[-1].outputs[0]])
    product.outputs[0].shape = ir.Shape(["batch", 4])
    found = count_work(ir.Graph([plain], product.outputs, nodes=[*x, *weight, product]), Call({"batch": 3}, {}))
    assert (found.flops, found.fp8_flops) == (192, 192 * fp8)


def test_the_floor_of_fp8():
    rates = Rates(copy=100.0, read={1000: 50.0}, gemm=1000.0, fp8_gemm=2000.0)
    work = Work(flops=20_000, fp8_flops=16_000)
    assert Floor.of(work, rates).seconds == 4_000 / 1000 + 16_000 / 2000
    unknown = replace(rates, fp8_gemm=None)
    assert Floor.of(work, unknown) is None  # not BF16's
    assert Floor.of(Work(flops=20_000), unknown).seconds == 20.0
    assert rates.best(replace(rates, fp8_gemm=3000.0)).fp8_gemm == 3000.0
    assert unknown.best(unknown).fp8_gemm is None


def test_the_floor_is_the_slower_of_both():
    rates = Rates(copy=100.0, read={1000: 50.0}, gemm=1000.0, fp8_gemm=None)
    memory = Floor.of(Work(flops=1000, weight_bytes=900, cache_bytes=100), rates)
    assert (memory.seconds, memory.bound) == (10.0, "memory")
    arithmetic = Floor.of(Work(flops=20_000, weight_bytes=1000), rates)
    assert (arithmetic.seconds, arithmetic.bound) == (20.0, "arithmetic")


def test_what_fits_a_cache_is_read_at_its_rate():
    rates = Rates(copy=10.0, read={10: 40.0, 100: 60.0, 1000: 20.0}, gemm=1.0, fp8_gemm=None)
    assert rates.memory(5) == 60.0  # the larger one shows what the cache can do
    assert rates.memory(150) == 60.0
    assert rates.memory(5000) == 20.0
    assert Rates(30.0, {1000: 20.0}, 1.0, None).memory(5000) == 30.0
    better = rates.best(Rates(5.0, {10: 80.0, 100: 1.0, 1000: 1.0}, 2.0, None))
    assert better == Rates(10.0, {10: 80.0, 100: 60.0, 1000: 20.0}, 2.0, None)
