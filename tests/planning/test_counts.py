"""The closed forms against figures worked out by hand, and against the modules themselves."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qwen2vl_trt.decoder import Decoder
from qwen2vl_trt.planning import counts
from qwen2vl_trt.planning.tables import find_config
from qwen2vl_trt.vision import VisionTransformer
from qwen2vl_trt.windows import window_layout

MODELS = [f"Qwen2.5-VL-{size}" for size in ("3B", "7B", "32B", "72B")]


def test_one_image_of_448_by_448():
    """1,024 patches: 16 full windows of 64, and four blocks of 32 over the whole image."""
    found = counts.vision_flops(find_config("Qwen2.5-VL-3B").vision, 32, 32)
    blocks = 32 * 2 * 1024 * 19_686_400  # 4 x 1280 x 1280 + 3 x 1280 x 3420 weights
    embedding, merger = 2 * 1024 * 1176 * 1280, 2 * 256 * (5120 * 5120 + 5120 * 2048)
    assert found.linear == blocks + embedding + merger == 1_312_041_205_760
    assert found.attention == 28 * 4 * 1280 * 1024 * 64 + 4 * 4 * 1280 * 1024 * 1024 == 30_870_077_440
    assert round(found.total / 1e12, 2) == 1.34


def test_border_windows_count_as_small_as_they_are():
    """10 x 20 patches: windows of 8 and 2 rows by 8, 8 and 4 columns."""
    config = find_config("Qwen2.5-VL-3B").vision
    pairs = 64**2 + 64**2 + 32**2 + 16**2 + 16**2 + 8**2
    assert counts.vision_flops(config, 10, 20).attention == 4 * 1280 * (28 * pairs + 4 * 200**2)


def test_a_token_of_7b():
    config = find_config("Qwen/Qwen2.5-VL-7B-Instruct")
    text = config.text
    assert counts.layer_weights(text) == 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944 == 233_046_016
    assert counts.head_weights(text) == 152_064 * 3584 == 544_997_376
    assert counts.decode_weight_bytes(text, 2) == 2 * (28 * 233_046_016 + 544_997_376) == 14_140_571_648
    assert counts.decoder_bytes(text, 2) == 14_140_571_648 + 2 * 544_997_376
    assert counts.decode_weight_bytes(text, 1) == 28 * 233_046_016 + 2 * 544_997_376
    assert counts.kv_bytes_per_token(text) == 2 * 28 * 4 * 128 * 2 == 57_344
    assert counts.prompt_tokens(config, 32, 32, 30) == 30 + 256 + 2
    decode = counts.decode_flops(text, 3, 100)
    assert decode.linear == 3 * 14_140_571_648
    assert decode.attention == 3 * 28 * 4 * 3584 * 100


def test_tied_embeddings_are_one_tensor():
    text = find_config("Qwen2.5-VL-3B").text
    assert text.tie_word_embeddings
    assert counts.decoder_bytes(text, 2) == counts.decode_weight_bytes(text, 2)


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_those_of_the_modules(model):
    config = find_config(model)
    with torch.device("meta"):
        tower, decoder = VisionTransformer(config.vision), Decoder(config.text)
    assert counts.vision_weights(config.vision) == sum(p.numel() for p in tower.parameters() if p.ndim > 1)
    layer = decoder.model.layers[0]
    assert counts.layer_weights(config.text) == sum(p.numel() for p in layer.parameters() if p.ndim > 1)
    matrices = sum(p.numel() for p in decoder.parameters() if p.ndim > 1)  # a tied one once
    assert counts.decoder_bytes(config.text, 2) == 2 * matrices


@pytest.mark.parametrize("model", ["Qwen2.5-VL-3B", "Qwen2.5-VL-7B"])
def test_operations_are_those_that_pytorch_counts(model):
    """PyTorch's own counter over the matrix products of the modules, on the meta device; 9 x 4 full windows."""
    config = find_config(model)
    with torch.device("meta"):
        tower, decoder = VisionTransformer(config.vision), Decoder(config.text)
        layout = window_layout(((1, 72, 32),), config.vision)
        indices = [getattr(layout, name).to("meta") for name in FIELDS]
        pixels = torch.empty(36, config.vision.window_slots, config.vision.qwen2_vl_dim)
    tower.inv_freq = tower.inv_freq.to("meta")  # computed on the CPU in any case
    decoder.model.inv_freq = decoder.model.inv_freq.to("meta")
    assert linear_flops(tower, pixels, *indices) == counts.vision_flops(config.vision, 72, 32).linear
    tokens = 50
    with torch.device("meta"):
        inputs = torch.empty(1, tokens, config.text.hidden_size)
        rows = torch.empty(1, config.text.num_key_value_heads, 64, config.text.head_dim)
        cache = [rows] * config.text.num_hidden_layers
        zero = torch.zeros(1, dtype=torch.int64)
        positions = torch.zeros(3, 1, tokens, dtype=torch.int64)
    found = linear_flops(decoder, inputs, positions, zero, zero + tokens, zero, cache, cache)
    assert found == counts.prefill_flops(config.text, tokens).linear


FIELDS = ("window_lengths", "position_ids", "sequence_index", "sequence_lengths", "sequence_position", "merge_index")


def linear_flops(module, *inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    return sum(flops for operator, flops in counter.get_flop_counts()["Global"].items() if operator in products)


def test_attention_over_a_prompt_is_causal():
    text = find_config("Qwen2.5-VL-7B").text
    assert counts.prefill_flops(text, 3).attention == 28 * 4 * 3584 * (1 + 2 + 3)
