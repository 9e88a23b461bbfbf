"""FP8 engines of TensorRT for RTX, the network that they are built from, and its meaning; the FP16 decoder."""

from dataclasses import replace

import onnx
import pytest
import torch

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.inspect import inspect_folder
from qwen2vl_trt.engines.lowering import find_faults
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.engines.options import TensorRTOptions
from qwen2vl_trt.engines.precision import FP8
from qwen2vl_trt.engines.tensorrt_build import parse
from qwen2vl_trt.errors import BuildError
from qwen2vl_trt.export import onnx_model
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.quantization import fp8_layers
from tests.engines.network_interpreter import run_network
from tests.engines.test_lowered_meaning import CAPACITY, CASES, decoder_feeds, vision_feeds, with_onnxruntime
from tests.engines.test_lowering import attentions, layers
from tests.support.bounds import E4M3_NOISE
from tests.support.engine_folders import PROFILE, build

GRAPHS = ("vision", "decoder")
STAYS = {"vision": {"patch_embed.proj", "merger.mlp.0", "merger.mlp.2"}, "decoder": {"lm_head", "graph"}}


@pytest.fixture(scope="module")
def fp8_engines(trt, fp8_checkpoint, tmp_path_factory):
    """For Ada and for Blackwell. Do not write into it."""
    backend, precision = find_backend("tensorrt-rtx", "fp8")
    backend = replace(backend, options=TensorRTOptions(compute_capabilities=("8.9", "12.0")))
    folder = tmp_path_factory.mktemp("fp8_engines")
    build_engines(resolve_model(fp8_checkpoint), backend, precision, PROFILE, folder)
    return folder


def made_by(network, kind):
    """The layer that makes each tensor, by the tensor's name."""
    found = [network.get_layer(i) for i in range(network.num_layers)]
    return {layer.get_output(0).name: layer for layer in found if kind is None or layer.type.name == kind}


def source(producers, tensor):
    """What a tensor comes from, apart from layers that only move it."""
    layer = producers.get(tensor.name)
    while layer is not None and layer.type.name in ("SHUFFLE", "UNSQUEEZE"):
        layer = producers.get(layer.get_input(0).name)
    return layer


@pytest.mark.parametrize("graph", GRAPHS)
def test_precision_of_every_layer(trt, fp8_engines, graph):
    network = parse(trt, fp8_engines / f"{graph}.onnx").network
    producers, checked = made_by(network, None), 0
    quantised = {name.removeprefix("visual.") for name in fp8_layers(Checkpoint(fp8_engines))}
    for product in layers(trt, network, "MATRIX_MULTIPLY"):
        assert {product.get_input(0).dtype, product.get_input(1).dtype, product.get_output(0).dtype} == {trt.bfloat16}
        layer = product.name.rpartition(".")[0]
        if layer not in quantised:
            assert layer in STAYS[graph] or "angles" in product.name, product.name
            continue
        checked += 1
        for index in (0, 1):
            dequantise = source(producers, product.get_input(index))
            assert dequantise.type.name == "DEQUANTIZE", product.name
            assert dequantise.get_input(0).dtype == trt.fp8
            assert dequantise.get_input(1).dtype == trt.float32
            expected = "QUANTIZE" if index == 0 else "CONSTANT"
            assert source(producers, dequantise.get_input(0)).type.name == expected
    config = Checkpoint(fp8_engines).config
    assert checked == (7 * config.text.num_hidden_layers if graph == "decoder" else 5 * config.vision.depth)
    for inside in (*layers(trt, network, "ROTARY_EMBEDDING"), *layers(trt, network, "REDUCE")):
        assert inside.get_input(0).dtype == trt.float32
    for attention in attentions(trt, network).values():
        assert {attention.get_input(i).dtype for i in range(3)} == {trt.bfloat16}
    outputs = {network.get_output(i).name: network.get_output(i).dtype for i in range(network.num_outputs)}
    assert outputs.pop("logits", trt.float32) == trt.float32
    assert set(outputs.values()) == {trt.bfloat16}
    assert find_faults(trt, network, fp8_engines / f"{graph}.onnx") == []  # plugins, corners, lengths, caches


def test_engines_multiply_fp8_numbers(trt, fp8_engines):
    """In every profile the matrix products that TensorRT made take FP8 numbers and FP8 weights.

    It splits some of ours into several, so they are counted; those of the merger and lm_head are no layer of this type.
    """
    manifest = Manifest.read(fp8_engines)
    manifest.verify(fp8_engines)
    config = Checkpoint(fp8_engines).config
    assert (manifest.precision, manifest.options) == ("fp8", {"compute_capabilities": ["8.9", "12.0"]})
    expected = {"vision": 5 * config.vision.depth, "decoder": 2 * 7 * config.text.num_hidden_layers}
    for graph in GRAPHS:
        lines = (fp8_engines / f"{graph}.layers").read_text().splitlines()
        products = [line for line in lines if ", LayerType: gemm, " in line]
        quantised = [line for line in products if not any(f"Name: {name}." in line for name in STAYS[graph])]
        assert len(quantised) >= expected[graph]
        for line in quantised:
            inputs, _, rest = line.partition("Inputs: ")[2].partition("Constants: ")
            assert "Datatype: FP8" in inputs, line
            assert "Datatype: FP8" in rest.partition("Outputs: ")[0], line


def test_inspect_names_them(fp8_engines):
    for graph in inspect_folder(fp8_engines).graphs:
        types = {
            name.rpartition(".")[0]: kind for name, operator, kind in graph.layers if operator in ("MatMul", "Gemm")
        }
        quantised = {name.removeprefix("visual.") for name in fp8_layers(Checkpoint(fp8_engines))} & types.keys()
        assert {types[name] for name in quantised} == {"FP8"}
        assert {types[name] for name in types.keys() - quantised} == {"BF16"}


def test_weights_are_not_copied(fp8_engines, fp8_checkpoint):
    """An initialiser for every FP8 weight, pointing at its bytes in the checkpoint's own file."""
    checkpoint = Checkpoint(fp8_checkpoint)
    assert (fp8_engines / "model.safetensors").samefile(fp8_checkpoint / "model.safetensors")
    for graph, prefix in (("vision", "visual."), ("decoder", "")):
        found = onnx.load(fp8_engines / f"{graph}.onnx", load_external_data=False).graph.initializer
        weights = {value.name: value for value in found if value.data_type == onnx.TensorProto.FLOAT8E4M3FN}
        wanted = {name for name in fp8_layers(checkpoint) if name.startswith("visual.") == (graph == "vision")}
        assert {f"{prefix}{name}" for name in weights} == {f"{name}.weight" for name in wanted}
        for name, value in weights.items():
            where = {entry.key: entry.value for entry in value.external_data}
            location = checkpoint.locate(prefix + name)
            assert (int(where["offset"]), int(where["length"])) == (location.offset, location.length)
        assert (fp8_engines / f"{graph}.onnx").stat().st_size < 100_000


@pytest.fixture(scope="module")
def fp32_between(fp8_checkpoint, tmp_path_factory):
    """The FP8 graphs with FP32 between, which ONNX Runtime and the interpreter compute."""
    folder = tmp_path_factory.mktemp("fp8_meaning")
    onnx_model.export_onnx(Checkpoint(fp8_checkpoint), folder, torch.float32, CAPACITY)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_lowered_network_means_what_onnx_runtime_computes(trt, fp32_between, case):
    """The lowered FP8 network means what ONNX Runtime computes."""
    sequence, checkpoint = CASES[case], Checkpoint(fp32_between)
    graph, prefix = ("decoder", "") if sequence else ("vision", "visual.")
    path = fp32_between / f"{graph}.onnx"
    feeds = decoder_feeds(checkpoint.config, sequence) if sequence else vision_feeds(checkpoint.config)
    expected = with_onnxruntime(path, feeds)
    weights = {name.removeprefix(prefix): checkpoint.load(name) for name in checkpoint.names}
    weights["lm_head.weight"] = checkpoint.load("model.embed_tokens.weight")
    found = run_network(trt, parse(trt, path).network, feeds, weights)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).norm() / tensor.norm()
        assert error < E4M3_NOISE, (name, float(error))


class TestGpusWithoutFp8:
    @pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6"])
    def test_named(self, trt, fp8_checkpoint, tmp_path, capability):
        backend, precision = find_backend("tensorrt-rtx", "fp8")
        backend = replace(backend, options=TensorRTOptions(compute_capabilities=("8.9", capability)))
        with pytest.raises(
            BuildError, match=rf"FP8 needs a GPU of compute capability 8\.9 .* not {capability}; --prec"
        ):
            build_engines(resolve_model(fp8_checkpoint), backend, precision, PROFILE, tmp_path)


@pytest.fixture(scope="module")
def fp16_engines(rtx_engines):
    return rtx_engines.folder("fp16-decoder")


class TestFp16Decoder:
    def test_types(self, trt, fp16_engines):
        folder = fp16_engines
        assert Manifest.read(folder).precision == "fp16-decoder"
        for graph, dtype in (("vision", trt.bfloat16), ("decoder", trt.float16)):
            network = parse(trt, folder / f"{graph}.onnx").network
            for product in layers(trt, network, "MATRIX_MULTIPLY"):
                assert {product.get_input(0).dtype, product.get_input(1).dtype} == {dtype}, product.name
            for inside in (*layers(trt, network, "ROTARY_EMBEDDING"), *layers(trt, network, "REDUCE")):
                assert inside.get_input(0).dtype == trt.float32
            outputs = {network.get_output(i).name: network.get_output(i).dtype for i in range(network.num_outputs)}
            assert outputs.pop("logits", trt.float32) == trt.float32
            assert set(outputs.values()) == {dtype}

    def test_no_second_copy_of_the_weights(self, fp16_engines):
        folder = fp16_engines
        found = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
        weights = {value.name for value in found.initializer if value.data_type == onnx.TensorProto.BFLOAT16}
        transposed = {node.output[0]: node.input[0] for node in found.node if node.op_type == "Transpose"}
        casts = {node.input[0] for node in found.node if node.op_type == "Cast"}
        casts = {transposed.get(name, name) for name in casts}
        assert len(weights) > 20
        assert weights <= casts
        assert all(value.external_data for value in found.initializer if value.name in weights)
        assert (folder / "decoder.onnx").stat().st_size < 100_000


class TestWhatDoesNotFit:
    def test_an_unquantised_model(self, tmp_path):
        with pytest.raises(BuildError, match=r"is not quantised; \S.*build\S* --precision fp8 does that first"):
            build(resolve_model("tiny").folder, tmp_path / "engines", "torch", FP8.name)

    def test_a_quantised_one_in_another_precision(self, tmp_path, fp8_checkpoint):
        with pytest.raises(BuildError, match="is quantised to FP8 and cannot be built in bf16: --precision fp8"):
            build(fp8_checkpoint, tmp_path / "engines", "torch", "bf16")


def test_a_wrong_scale_would_be_seen(fp32_between):
    """One of 96 scales, three times too large, is further off than the tolerance of the lowered network above."""
    path = fp32_between / "decoder.onnx"
    feeds = decoder_feeds(Checkpoint(fp32_between).config, 7)
    expected = with_onnxruntime(path, feeds)["logits"]
    model = onnx.load(path, load_external_data=False)
    (scale,) = (v for v in model.graph.initializer if v.name == "model.layers.0.mlp.down_proj.weight_scale")
    value = onnx.numpy_helper.to_array(scale) * 3
    scale.CopyFrom(onnx.numpy_helper.from_array(value, scale.name))
    (fp32_between / "wrong.onnx").write_bytes(model.SerializeToString())
    found = with_onnxruntime(fp32_between / "wrong.onnx", feeds)["logits"]
    assert (found - expected).norm() / expected.norm() > E4M3_NOISE
