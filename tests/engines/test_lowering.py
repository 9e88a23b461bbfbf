"""What the parser leaves wrong is found, and the lowering leaves nothing of it."""

import math
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines import lowering
from qwen2vl_trt.engines.lowering import attention_nodes, find_faults, lower
from qwen2vl_trt.engines.options import ATTENTION_MASKS
from qwen2vl_trt.engines.tensorrt_build import parse
from qwen2vl_trt.engines.tensorrt_callbacks import tensorrt_log
from qwen2vl_trt.errors import BuildError

GRAPHS = ("vision", "decoder")


def parse_only(trt, path):
    """The network as the parser leaves it."""
    builder = trt.Builder(tensorrt_log(trt))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, tensorrt_log(trt))
    assert parser.parse_from_file(str(path))
    return SimpleNamespace(builder=builder, network=network, parser=parser)


def layers(trt, network, kind):
    return [layer for layer in lowering._layers(network) if layer.type == getattr(trt.LayerType, kind)]


def attentions(trt, network):
    return {attention.name: attention for attention in lowering._attentions(trt, network)}


@pytest.fixture(scope="module", params=GRAPHS)
def path(rtx_engines, request):
    return rtx_engines.folder("bf16") / f"{request.param}.onnx"


@pytest.fixture(scope="module")
def config(rtx_checkpoint):
    return Checkpoint(rtx_checkpoint).config


@pytest.fixture(params=ATTENTION_MASKS)
def attention_mask(request):
    return request.param


@pytest.fixture
def lowered(trt, path, attention_mask):
    return parse(trt, path, attention_mask)


class TestWithoutTheLowering:
    """Each of these fails when a later parser does better, and then the lowering can do less."""

    def test_every_attention_is_wrong(self, trt, path):
        faults = find_faults(trt, parse_only(trt, path).network, path)
        for node in attention_nodes(path).values():
            assert f"attention {node.name} has no mask made from {node.lengths}" in faults
            assert f"attention {node.name} scales its keys in the network's type" in faults
            assert f"attention {node.name} scales its queries in the network's type" in faults
            assert f"attention {node.name} has no softmax scale" in faults
            assert (f"attention {node.name} is UPPER_LEFT, not NONE" in faults) == node.causal
            with_lengths = find_faults(trt, parse_only(trt, path).network, path, "lengths")
            assert f"attention {node.name} does not take its lengths from {node.lengths}" in with_lengths
            assert (f"attention {node.name} is UPPER_LEFT, not LOWER_RIGHT" in with_lengths) == node.causal

    def test_no_engine_is_built_when_a_repair_is_missing(self, trt, path, monkeypatch):
        monkeypatch.setattr(lowering._ScaledRotary, "scale", lambda *arguments: None)
        with pytest.raises(BuildError, match=r"attention .* has no softmax scale \(tensorrt_rtx 1\..*no engine"):
            parse(trt, path)


class TestLowered:
    """Walks the network by itself: it does not ask ``find_faults``."""

    def test_attention_has_a_mask_of_its_kind(self, trt, rtx_engines, config):
        """What it says is in test_lowered_meaning.py."""
        full = config.vision.fullatt_block_indexes
        expected = {
            "vision": {
                f"blocks.{i}.attn.Attention": "sequence_lengths_mask" if i in full else "window_lengths_mask"
                for i in range(config.vision.depth)
            },
            "decoder": {
                f"model.layers.{i}.self_attn.Attention": "kv_lengths_mask" for i in range(config.text.num_hidden_layers)
            },
        }
        for graph in GRAPHS:
            network = parse(trt, rtx_engines.folder("bf16") / f"{graph}.onnx")
            found = attentions(trt, network.network)
            assert {name: attention.mask.name for name, attention in found.items()} == expected[graph]
            assert {attention.mask.dtype for attention in found.values()} == {trt.bool}
            assert {attention.causal_kind for attention in found.values()} == {trt.CausalMaskKind.NONE}
            assert {attention.key_value_lengths for attention in found.values()} == {None}

    def test_decoder_attention_is_lower_right_with_lengths(self, trt, rtx_engines, config):
        network = parse(trt, rtx_engines.folder("bf16") / "decoder.onnx", "lengths")
        found = attentions(trt, network.network)
        assert len(found) == config.text.num_hidden_layers
        for attention in found.values():
            assert attention.causal_kind == trt.CausalMaskKind.LOWER_RIGHT
            assert attention.key_value_lengths.name == "kv_lengths_int32"
            assert attention.key_value_lengths.dtype == trt.int32
            assert attention.mask is None

    def test_vision_attention_has_the_lengths_of_its_kind(self, trt, rtx_engines, config):
        network = parse(trt, rtx_engines.folder("bf16") / "vision.onnx", "lengths")
        full = config.vision.fullatt_block_indexes
        expected = {
            f"blocks.{i}.attn.Attention": "sequence_lengths_int32" if i in full else "window_lengths_int32"
            for i in range(config.vision.depth)
        }
        found = attentions(trt, network.network)
        assert {name: attention.key_value_lengths.name for name, attention in found.items()} == expected
        assert {attention.causal_kind for attention in found.values()} == {trt.CausalMaskKind.NONE}
        casts = {layer.get_output(0).name: layer.get_input(0).name for layer in layers(trt, network.network, "CAST")}
        for name in ("sequence_lengths", "window_lengths"):
            assert casts[f"{name}_int32"] == name

    def test_keys_go_in_as_they_are(self, trt, rtx_engines, config):
        """The parser multiplied the whole cache, all its capacity, by the root of the scale."""
        network = parse(trt, rtx_engines.folder("bf16") / "decoder.onnx")
        found = attentions(trt, network.network)
        for i in range(config.text.num_hidden_layers):
            attention = found[f"model.layers.{i}.self_attn.Attention"]
            assert attention.get_input(1).name == f"new_k_cache_{i}"
            assert attention.get_input(2).name == f"new_v_cache_{i}"

    def test_the_softmax_scale_is_exact_and_shared(self, trt, path, config):
        head = (config.vision if path.stem == "vision" else config.text).head_dim
        builder = trt.Builder(tensorrt_log(trt))
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, tensorrt_log(trt))
        parser.parse_from_file(str(path))
        arrays = lower(trt, network, path)
        scales = [array for array in arrays if array.dtype == np.float32]
        assert [array.ravel().tolist() for array in scales] == [[np.float32(1 / math.sqrt(head))]] * 2  # cos, sin
        rotated = layers(trt, network, "ROTARY_EMBEDDING")
        scaled = [layer for layer in rotated if layer.get_input(1).name == "cos_scaled"]
        assert len(rotated) == 2 * len(scaled)
        assert {layer.get_input(2).name for layer in scaled} == {"sin_scaled"}

    def test_caches_are_aliased(self, trt, rtx_engines, config):
        network = parse(trt, rtx_engines.folder("bf16") / "decoder.onnx").network
        updates = layers(trt, network, "KV_CACHE_UPDATE")
        outputs = {network.get_output(i).name for i in range(network.num_outputs)}
        expected = {f"{kind}_cache_{i}" for kind in "kv" for i in range(config.text.num_hidden_layers)}
        assert {layer.get_input(0).name for layer in updates} == expected
        for layer in updates:
            assert layer.get_output(0).name == f"new_{layer.get_input(0).name}"
            assert layer.get_output(0).name in outputs

    @pytest.mark.parametrize("precision", ["bf16", "fp32"])
    @pytest.mark.parametrize("graph", GRAPHS)
    def test_precision(self, trt, rtx_engines, precision, graph):
        network = parse(trt, rtx_engines.folder(precision) / f"{graph}.onnx").network
        dtype = {"bf16": trt.bfloat16, "fp32": trt.float32}[precision]
        products = layers(trt, network, "MATRIX_MULTIPLY")
        assert len(products) >= 8
        for product in products:
            assert {product.get_input(0).dtype, product.get_input(1).dtype, product.get_output(0).dtype} == {dtype}
        for inside in (*layers(trt, network, "ROTARY_EMBEDDING"), *layers(trt, network, "REDUCE")):  # REDUCE: norms
            assert inside.get_input(0).dtype == trt.float32
        for attention in attentions(trt, network).values():
            assert {attention.get_input(i).dtype for i in range(3)} == {dtype}
            assert attention.decomposable
        outputs = {network.get_output(i).name: network.get_output(i).dtype for i in range(network.num_outputs)}
        assert outputs.pop("logits", trt.float32) == trt.float32
        assert set(outputs.values()) == {dtype}

    def test_no_plugin(self, trt, lowered):
        assert not [layer.name for layer in lowering._layers(lowered.network) if "PLUGIN" in layer.type.name]


class TestAnUndoneRepairIsFound:
    def test_nothing_to_find(self, trt, lowered, path, attention_mask):
        assert find_faults(trt, lowered.network, path, attention_mask) == []

    def test_corner(self, trt, path):
        """Beside a mask TensorRT itself takes none."""
        lowered = parse(trt, path, "lengths")
        name, attention = next(iter(attentions(trt, lowered.network).items()))
        attention.causal_kind = trt.CausalMaskKind.UPPER_LEFT
        wanted = "NONE" if path.stem == "vision" else "LOWER_RIGHT"
        assert find_faults(trt, lowered.network, path, "lengths") == [f"attention {name} is UPPER_LEFT, not {wanted}"]

    def test_the_other_kind(self, trt, lowered, path, attention_mask):
        """Each says what it lacks, and that the other's is in the way."""
        other = next(kind for kind in ATTENTION_MASKS if kind != attention_mask)
        found = find_faults(trt, lowered.network, path, other)
        count = len(attentions(trt, lowered.network))
        assert sum("lengths beside its mask" in fault or "mask beside its lengths" in fault for fault in found) == count
        assert sum("does not take its lengths" in fault or "has no mask" in fault for fault in found) == count

    def test_lengths_missing(self, trt, path):
        lowered = parse(trt, path, "lengths")
        name, attention = next(iter(attentions(trt, lowered.network).items()))
        attention.key_value_lengths = None
        (fault,) = find_faults(trt, lowered.network, path, "lengths")
        assert fault.startswith(f"attention {name} does not take its lengths from")

    def other_kinds(self, trt, rtx_engines, config, attention_mask):
        """The vision network, and an attention of each kind of it: full and windowed."""
        path = rtx_engines.folder("bf16") / "vision.onnx"
        lowered = parse(trt, path, attention_mask)
        found = attentions(trt, lowered.network)
        full, windowed = (
            next(
                found[f"blocks.{i}.attn.Attention"] for i in range(2) if (i in config.vision.fullatt_block_indexes) == f
            )
            for f in (True, False)
        )
        return lowered, path, full, windowed

    def test_lengths_of_the_other_kind(self, trt, rtx_engines, config):
        lowered, path, full, windowed = self.other_kinds(trt, rtx_engines, config, "lengths")
        full.key_value_lengths = windowed.key_value_lengths
        assert find_faults(trt, lowered.network, path, "lengths") == [
            f"attention {full.name} does not take its lengths from sequence_lengths"
        ]

    def test_a_mask_of_the_other_kind(self, trt, rtx_engines, config):
        lowered, path, full, windowed = self.other_kinds(trt, rtx_engines, config, "explicit")
        full.mask = windowed.mask
        assert find_faults(trt, lowered.network, path) == [
            f"attention {full.name} has no mask made from sequence_lengths"
        ]

    def test_decomposition(self, trt, rtx_engines):
        path = rtx_engines.folder("fp32") / "decoder.onnx"
        lowered = parse(trt, path)
        name, attention = next(iter(attentions(trt, lowered.network).items()))
        attention.decomposable = False
        assert find_faults(trt, lowered.network, path) == [
            f"attention {name} may not be decomposed where there is no fused kernel"
        ]

    def test_scaled_keys(self, trt, lowered, path, attention_mask):
        name, attention = next(iter(attentions(trt, lowered.network).items()))
        keys = attention.get_input(1)
        doubled = lowered.network.add_elementwise(keys, keys, trt.ElementWiseOperation.SUM).get_output(0)
        attention.set_input(1, doubled)
        found = find_faults(trt, lowered.network, path, attention_mask)
        assert found == [f"attention {name} scales its keys in the network's type"]

    def test_a_cache_that_is_no_output(self, trt, rtx_engines):
        path = rtx_engines.folder("bf16") / "decoder.onnx"
        lowered = parse(trt, path)
        network = lowered.network
        output = next(t for t in map(network.get_output, range(network.num_outputs)) if t.name == "new_v_cache_1")
        network.unmark_output(output)
        (fault,) = find_faults(trt, network, path)
        assert (
            fault == "cache update model.layers.1.self_attn.TensorScatter_2 is not aliased from an input to its output"
        )

    def test_logits_in_a_smaller_type(self, trt, rtx_engines):
        path = rtx_engines.folder("bf16") / "decoder.onnx"
        lowered = parse(trt, path)
        network = lowered.network
        logits = next(t for t in map(network.get_output, range(network.num_outputs)) if t.name == "logits")
        logits.name = "precise"
        network.unmark_output(logits)
        rough = network.add_cast(logits, trt.bfloat16).get_output(0)
        rough.name = "logits"
        network.mark_output(rough)
        assert find_faults(trt, network, path) == ["output logits is BF16, not FP32"]


class TestGraphsThatItDoesNotKnow:
    def edited(self, rtx_engines, tmp_path, edit):
        """The decoder's graph with its first attention edited."""
        model = onnx.load(rtx_engines.folder("bf16") / "decoder.onnx", load_external_data=False)
        edit(next(node for node in model.graph.node if node.op_type == "Attention"))
        path = tmp_path / "decoder.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    @pytest.mark.parametrize(
        "edit",
        [
            lambda node: node.attribute.append(onnx.helper.make_attribute("scale", 0.5)),
            lambda node: node.input.__setitem__(3, "hidden_states"),
            lambda node: node.input.__setitem__(6, ""),
            lambda node: node.input.__setitem__(6, "computed"),
        ],
        ids=["scale", "mask", "no lengths", "computed lengths"],
    )
    def test_another_attention_is_refused(self, trt, rtx_engines, tmp_path, edit):
        path = self.edited(rtx_engines, tmp_path, edit)
        with pytest.raises(BuildError, match=r"decoder\.onnx: model\.layers\.0\.self_attn\.Attention is not plain"):
            attention_nodes(path)

    def test_a_causal_attention_over_no_cache(self, trt, rtx_engines, tmp_path):
        path = self.edited(rtx_engines, tmp_path, lambda node: node.input.__setitem__(1, "hidden_states"))
        with pytest.raises(BuildError, match=r"model\.layers\.0\.self_attn\.Attention is causal, and its keys are no"):
            attention_nodes(path)

    def test_an_attention_that_the_graph_does_not_name(self, trt, rtx_engines, tmp_path):
        path = rtx_engines.folder("bf16") / "decoder.onnx"
        other = self.edited(rtx_engines, tmp_path, lambda node: setattr(node, "name", "renamed"))
        network = parse_only(trt, path).network
        with pytest.raises(
            BuildError, match=r"TensorRT made an attention .model\.layers\.0\.self_attn\.Attention. that"
        ):
            lower(trt, network, other)
        assert "attention renamed is missing" in find_faults(trt, network, other)
