"""Decoders of 4 and 8 bits for TensorRT for RTX: what the parsed network means, its types, and the engines' sizes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.decoder import Decoder
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.inspect import inspect_folder
from qwen2vl_trt.engines.lowering import find_faults
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.engines.options import TensorRTOptions
from qwen2vl_trt.engines.tensorrt_build import parse
from qwen2vl_trt.errors import BuildError
from qwen2vl_trt.export import onnx_model
from qwen2vl_trt.export.blocked_weights import BLOCKED, WeightOnly
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.weights import checkpoint_names, load_weights
from tests.engines.network_interpreter import run_network
from tests.engines.test_fp8 import made_by, source
from tests.engines.test_lowered_meaning import CAPACITY, decoder_feeds
from tests.engines.test_lowering import layers
from tests.runtime.test_weight_only import FORMATS_OF, PROFILE, checkpoint_of
from tests.support.bounds import FP32
from tests.support.models import relative_error
from tests.support.shared import shared

ONE_OF_EACH = {"int4": "awq", "int8": "int8", "nvfp4": "nvfp4"}


@pytest.fixture(params=["awq", "gptq", "int4-awq", "int8", "nvfp4"])
def graph(request):
    """A decoder graph with FP32 between, as TensorRT gets it."""
    checkpoint, numbers = checkpoint_of(request.param), FORMATS_OF[request.param]

    def make(folder):
        folder.mkdir()
        chosen = WeightOnly(numbers, head=False, tensorrt=True)
        onnx_model.export_onnx(Checkpoint(checkpoint), folder, torch.float32, CAPACITY, weight_only=chosen)

    return checkpoint, shared(f"tiny-{request.param}-for-tensorrt", make) / "decoder.onnx"


@torch.no_grad()
def meant(folder, feeds):
    """By PyTorch in FP32, from the weights that the checkpoint means, unrounded."""
    checkpoint = Checkpoint(folder)
    with torch.device("meta"):
        module = Decoder(checkpoint.config.text).eval()
    load_weights(module, checkpoint, dtype=torch.float32)
    for ours, theirs in checkpoint_names(checkpoint).items():
        if theirs in checkpoint.packed:
            weight = checkpoint.packed[theirs].read().dequantize()
            module.get_submodule(ours.removesuffix(".weight")).weight = nn.Parameter(weight)
    caches = {f"{kind}_caches": [] for kind in "kv"}
    for name, tensor in feeds.items():
        if name[1:].startswith("_cache_"):
            caches[f"{name[0]}_caches"].append(tensor.clone())
    tokens = {name: tensor for name, tensor in feeds.items() if "_cache_" not in name}
    found = module(**tokens, **caches)
    return {"logits": found.logits, "hidden_states": found.hidden_states}


def stored_values(path: Path) -> dict[str, torch.Tensor]:
    """What NumPy lacks, by the names of the graph's initialisers."""
    found = {}
    for value in onnx.load(path, load_external_data=False).graph.initializer:
        if value.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.FLOAT4E2M1, onnx.TensorProto.FLOAT8E4M3FN):
            onnx.external_data_helper.load_external_data_for_tensor(value, str(path.parent))
            numbers = torch.from_numpy(onnx.numpy_helper.to_array(value).astype(np.float32))
            int4 = value.data_type == onnx.TensorProto.INT4
            found[value.name] = numbers.to(torch.int8 if int4 else torch.float8_e4m3fn)
    return found


@pytest.mark.parametrize("sequence", [7, 1], ids=["prefill", "decode"])
def test_the_lowered_network_means_what_the_checkpoint_does(trt, graph, sequence):
    checkpoint, path = graph
    feeds = decoder_feeds(Checkpoint(checkpoint).config, sequence)
    found = run_network(trt, parse(trt, path).network, feeds, stored_values(path))
    for name, tensor in meant(checkpoint, feeds).items():
        assert relative_error(found[name], tensor) < FP32, name


def test_the_tolerance_tells_formats_apart():
    """The same model in 8 bits is further off than the network above may be."""
    checkpoint = checkpoint_of("int8")
    feeds = decoder_feeds(Checkpoint(checkpoint).config, 7)
    right = meant(checkpoint, feeds)["logits"]
    wrong = meant(checkpoint_of("awq"), feeds)["logits"]
    assert relative_error(wrong, right) > 100 * FP32


@pytest.fixture(scope="module", params=ONE_OF_EACH)
def engines(trt, request):
    """Engines of one precision; do not write into them."""
    precision = request.param

    def make(folder):
        backend, _ = find_backend("tensorrt-rtx", precision)
        build_engines(resolve_model(checkpoint_of(ONE_OF_EACH[precision])), backend, precision, PROFILE, folder)

    return precision, shared(f"tiny-rtx-{precision}", make)


def test_types_of_every_layer(trt, engines):
    """Packed numbers, scales of the network's type, as TensorRT wants them, and BF16 products."""
    precision, folder = engines
    network = parse(trt, folder / "decoder.onnx").network
    packed = {"int4": trt.int4, "int8": trt.int8, "nvfp4": trt.fp4}[precision]
    producers, checked = made_by(network, None), 0
    for product in layers(trt, network, "MATRIX_MULTIPLY"):
        assert {product.get_input(0).dtype, product.get_input(1).dtype} == {trt.bfloat16}, product.name
        dequantise = source(producers, product.get_input(1))
        if dequantise is None or dequantise.type.name != "DEQUANTIZE":
            continue
        checked += 1
        assert dequantise.get_input(0).dtype == packed
        assert dequantise.get_input(1).dtype == trt.bfloat16
        assert source(producers, dequantise.get_input(0)).type.name == "CONSTANT"
    assert checked == 7 * Checkpoint(folder).config.text.num_hidden_layers
    assert find_faults(trt, network, folder / "decoder.onnx") == []


def test_engines_hold_packed_numbers(engines):
    """Of every layer, in both profiles. INT4 in several blocks is multiplied in the kernel that dequantises it.

    NVFP4 with inputs in BF16 is dequantised by a kernel of its own, which TensorRT for RTX 1.7.1 does not fuse; so is
    INT4 of one block, which the tiny model has but for ``down_proj``.
    """
    precision, folder = engines
    assert {"decoder.engine", "vision.engine", BLOCKED} <= Manifest.read(folder).files.keys()
    layers = Checkpoint(folder).config.text.num_hidden_layers
    kind = {"int4": "Int4", "int8": "Int8", "nvfp4": "FP4E2M1"}[precision]
    lines = [line for line in (folder / "decoder.layers").read_text().splitlines() if f"Datatype: {kind}," in line]
    constants = [line.partition("Constants: ")[2].partition("Outputs: ")[0] for line in lines]
    assert sum(constant.count(f"Datatype: {kind},") for constant in constants) == 2 * 7 * layers
    fused = [line for line in lines if "down_proj.MatMul]" in line.partition("Metadata: ")[2]]
    if precision == "int4":
        assert len(fused) == 2 * layers


def test_inspect_names_them(engines):
    precision, folder = engines
    (decoder,) = (graph for graph in inspect_folder(folder).graphs if graph.name == "decoder")
    types = {name: kind for name, _, kind in decoder.layers}
    expected = {"int4": "BF16, INT4 weights", "int8": "BF16, INT8 weights", "nvfp4": "BF16, FP4 weights"}[precision]
    assert types["model.layers.0.mlp.down_proj.MatMul"] == expected
    assert [kind for name, kind in types.items() if name.startswith("lm_head.")] in ([], ["BF16"])


@pytest.mark.parametrize("capability", ["8.0", "8.9"])
def test_gpus_without_fp4_are_named(trt, tmp_path, capability):
    backend, precision = find_backend("tensorrt-rtx", "nvfp4")
    backend = backend.with_options({"compute_capabilities": (capability,)})
    assert isinstance(backend.options, TensorRTOptions)
    with pytest.raises(
        BuildError, match=rf"NVFP4 needs a GPU of compute capability 10\.0 .*Blackwell.* not {capability}"
    ):
        build_engines(resolve_model(checkpoint_of("nvfp4")), backend, precision, PROFILE, tmp_path)
