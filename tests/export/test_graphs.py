"""What the two ONNX files are: standard operators of opset 24, the agreed names, kilobytes, no trace of where from."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.export.graphs import cache_names, decoder_graph, vision_graph
from qwen2vl_trt.export.trace import trace
from qwen2vl_trt.weights import checkpoint_names
from tests.support.models import model_config, our_config

# Everything that a backend must know. An operator that joins this list must first be seen to work in each of them.
OPERATORS = {
    "vision": {
        *("Add", "Attention", "Cast", "Concat", "Cos", "GatherND", "Gelu", "Gemm", "MatMul", "Mul"),
        *("RMSNormalization", "Reshape", "RotaryEmbedding", "Shape", "Sigmoid", "Sin", "Split"),
        *("Squeeze", "Transpose", "Unsqueeze"),  # Squeeze of a shape: onnxscript 0.7.0 leaves it there
    },
    "decoder": {
        *("Add", "Attention", "Cast", "Concat", "Cos", "Gather", "GatherND", "Gemm", "MatMul", "Mul"),
        *("RMSNormalization", "Range", "Reshape", "RotaryEmbedding", "Shape", "Sigmoid", "Sin", "Split", "Squeeze"),
        *("TensorScatter", "Transpose", "Unsqueeze"),
    },
}


@pytest.fixture(scope="module", params=["vision", "decoder"])
def exported(built_model, request):
    """The configuration, the graph's name and its file without the weights."""
    path = built_model.engines / f"{request.param}.onnx"
    return our_config(built_model.reference.config), request.param, onnx.load(path, load_external_data=False), path


def dimensions(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_standard_operators_of_opset_24_only(exported):
    _, name, model, _ = exported
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    assert {node.op_type for node in model.graph.node} <= OPERATORS[name]


def test_one_node_each_for_what_backends_have_kernels_for(exported):
    config, name, model, _ = exported
    count = Counter(node.op_type for node in model.graph.node)
    blocks = config.vision.depth if name == "vision" else config.text.num_hidden_layers
    assert count["Attention"] == blocks
    assert count["RotaryEmbedding"] == 2 * blocks
    assert count["RMSNormalization"] == 2 * blocks + 1
    assert count["TensorScatter"] == (0 if name == "vision" else 2 * blocks)
    if name == "decoder":
        assert (count["Gemm"], count["MatMul"]) == (7 * blocks + 1, 0)


def test_attention_is_ragged_and_causal_only_in_the_decoder(exported):
    config, name, model, _ = exported
    lengths = []
    for node in model.graph.node:
        if node.op_type == "Attention":
            lengths.append(node.input[6])  # nonpad_kv_seqlen
            assert not any(node.input[3:6]), "neither a mask nor a past"
            causal = {attribute.name: attribute.i for attribute in node.attribute}.get("is_causal", 0)
            assert causal == (name == "decoder")
    if name == "decoder":
        assert set(lengths) == {"kv_lengths"}
    else:
        full = config.vision.fullatt_block_indexes
        expected = ["sequence_lengths" if i in full else "window_lengths" for i in range(config.vision.depth)]
        assert lengths == expected


def test_nodes_are_named_after_modules(exported):
    _, name, model, _ = exported
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    block = "blocks.1.attn" if name == "vision" else "model.layers.1.self_attn"
    assert f"{block}.Attention" in names


def test_inputs_and_outputs_are_the_agreed_ones(exported):
    config, name, model, _ = exported
    types = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}
    graph = {"vision": vision_graph, "decoder": decoder_graph}[name](config, torch.float32)
    assert [value.name for value in model.graph.input] == list(graph.inputs)
    assert [value.name for value in model.graph.output] == list(graph.outputs)
    for value, spec in zip(model.graph.input, graph.inputs.values()):
        assert dimensions(value) == list(spec.shape), value.name
        assert value.type.tensor_type.elem_type == types[spec.dtype], value.name


def test_names_and_dimensions_of_the_contract(exported):
    """Written out, so that a change of ``export/graphs.py`` is seen for what it breaks: every engine ever built."""
    config, name, model, _ = exported
    found = {value.name: dimensions(value) for value in [*model.graph.input, *model.graph.output]}
    if name == "vision":
        assert found == {
            "pixel_values": ["windows", "slots", 1176],
            "window_lengths": ["windows"],
            "position_ids": ["windows", "slots", 2],
            "sequence_index": ["sequences", "longest"],
            "sequence_lengths": ["sequences"],
            "sequence_position": ["windows", "slots"],
            "merge_index": ["tokens"],
            "image_embeds": ["tokens", config.vision.out_hidden_size],
        }
        return
    text = config.text
    cache = ["batch", text.num_key_value_heads, "max_seq_len", text.head_dim]
    caches = [f"{kind}_cache_{i}" for kind in "kv" for i in range(text.num_hidden_layers)]
    assert found == {
        "inputs_embeds": ["batch", "sequence", text.hidden_size],
        "position_ids": [3, "batch", "sequence"],
        "cache_start": ["batch"],
        "kv_lengths": ["batch"],
        "last_token": ["batch"],
        "logits": ["batch", text.vocab_size],
        "hidden_states": ["batch", "sequence", text.hidden_size],
        **dict.fromkeys(caches, cache),
        **{f"new_{name}": cache for name in caches},
    }
    k, v = cache_names(text.num_hidden_layers)
    assert k + v == caches


def test_the_file_says_nothing_about_the_machine(exported, built_model):
    _, _, model, path = exported
    graph = model.graph
    everything = [model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]
    assert not any(part.doc_string for part in everything)
    assert not any(part.metadata_props for part in everything)
    content = path.read_bytes()
    folders = (built_model.engines.parent, Path.home(), Path.cwd(), Path(__file__).parent)
    for part in (*(str(folder) for folder in folders if len(folder.parts) > 1), "site-packages", ".py"):
        assert part.encode() not in content


def test_the_file_is_small(exported):
    _, _, _, path = exported
    assert path.stat().st_size < 60_000


def test_weights_lie_in_the_checkpoints_file(exported, built_model):
    """Every weight points at its own bytes, and nothing else of any size is in the graph."""
    _, name, model, _ = exported
    checkpoint = Checkpoint(built_model.checkpoint)
    names = checkpoint_names(checkpoint)
    inside = 0
    seen = set()
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            inside += np.prod(tensor.dims) * 8
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        ours = ("visual." if name == "vision" else "") + tensor.name
        location = checkpoint.locate(names[ours])
        assert (built_model.checkpoint / where["location"]).resolve() == location.path
        assert (int(where["offset"]), int(where["length"])) == (location.offset, location.length)
        types = {TensorProto.FLOAT: torch.float32, TensorProto.BFLOAT16: torch.bfloat16}
        assert types[tensor.data_type] == location.dtype
        assert np.prod(tensor.dims) == np.prod(location.shape)
        seen.add(ours)
    assert inside < 2000
    prefix = ("visual.",) if name == "vision" else ("model.", "lm_head.")
    assert seen == {ours for ours in names if ours.startswith(prefix)} - {"model.embed_tokens.weight"}


def test_bf16_weights_are_cast_and_fp32_weights_are_not(exported, built_model):
    _, name, model, _ = exported
    weights = {tensor.name for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL}
    casts = {node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    transposed = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
    assert bool(set(transposed.values()) & weights) == (name == "vision")  # a Gemm takes them as they are stored
    assert not casts & set(transposed.values()), "a transposed weight is cast thereafter: half the bytes to transpose"
    casts = {transposed.get(name, name) for name in casts} & weights
    stored = Checkpoint(built_model.checkpoint).locate(Checkpoint(built_model.checkpoint).names[0]).dtype
    assert casts == (weights if stored == torch.bfloat16 else set())


def test_the_checker_accepts_it(exported, tmp_path):
    """Beside copies of the weights: the checker takes any hard link for an attack."""
    _, _, _, path = exported
    shutil.copytree(path.parent, tmp_path / "copy")
    onnx.checker.check_model(tmp_path / "copy" / path.name, full_check=True)


def test_a_bf16_graph_with_a_static_cache():
    """What TensorRT needs: BF16 in and out, logits in FP32, the capacity a number."""
    config = our_config(model_config())
    model = trace(decoder_graph(config, torch.bfloat16, max_seq_len=64), torch.bfloat16)
    types = {value.name: str(value.dtype) for value in [*model.graph.inputs, *model.graph.outputs]}
    assert types.pop("logits") == "FLOAT"
    assert {name for name, dtype in types.items() if dtype == "INT64"} == {
        "position_ids",
        "cache_start",
        "kv_lengths",
        "last_token",
    }
    assert set(types.values()) == {"BFLOAT16", "INT64"}
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if "cache_" in value.name and value.name != "cache_start":
            assert list(value.shape) == ["batch", 2, 64, 16]
    weights = [value for value in model.graph.initializers.values() if value.const_value is None]
    assert {str(value.dtype) for value in weights} == {"BFLOAT16"}
    for node in model.graph:
        if node.op_type == "RotaryEmbedding":
            assert str(node.inputs[0].dtype) == "FLOAT", "rotary embeddings are computed in FP32"
        if node.op_type == "Attention":
            assert str(node.inputs[0].dtype) == "BFLOAT16"
