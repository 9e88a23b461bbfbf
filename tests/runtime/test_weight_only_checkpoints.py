"""The tiny model computed with its weights of 4 and 8 bits, against the checkpoint that they mean."""

from functools import partial

import pytest
import torch
from torch import nn

from qwen2vl_trt import Pipeline, PipelineOptions, Request
from qwen2vl_trt.accuracy.recorder import Recorder, decoder_modules
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.decoder import Decoder
from qwen2vl_trt.engines import precision
from qwen2vl_trt.engines.precision import computed_on_cpu
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.layers import RMSNorm
from qwen2vl_trt.quantized.rounding import round_to_nearest
from qwen2vl_trt.runtime.backends import weight_only
from qwen2vl_trt.runtime.backends.layer_output import end_decoder_after
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.runtime.backends.weight_only import Int4Linear, Int8Linear, WeightOnlyLinear
from qwen2vl_trt.tiny.evaluation import answer_scenes
from qwen2vl_trt.tiny.scenes import TASKS, held_out_scenes
from tests.runtime.test_quantized_checkpoints import FORMATS, PROFILE, compressed
from tests.support.adapters import ATTENTION, MLP, factors, modules, write_adapter
from tests.support.engine_folders import build
from tests.support.quantized import gptq, int8_tensors, modelopt_nvfp4, packed_tensors, quantized_checkpoint
from tests.support.shared import shared

TOKENS = 20
GPTQ8 = {"quant_method": "gptq", "bits": 8, "group_size": 128, "desc_act": False, "sym": False}
INT8 = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"}
W8A16 = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
MODELS = {
    "awq": ("int4", *FORMATS["awq"]),
    "gptq": ("int4", *FORMATS["gptq"]),
    "w4a16": ("int4", *FORMATS["w4a16"]),
    "int4-awq": ("int4", *FORMATS["int4-awq"]),
    "gptq-8": ("int8", GPTQ8, partial(gptq, group_size=128, bits=8, symmetric=False)),
    "int8": ("int8", compressed("int-quantized", **INT8), partial(int8_tensors, symmetric=False)),
    "w8a16": (
        "int8",
        compressed("pack-quantized", **W8A16),
        partial(packed_tensors, bits=8, group_size=32, symmetric=False),
    ),
    "nvfp4": ("nvfp4", FORMATS["nvfp4"][0], modelopt_nvfp4),
}


@pytest.fixture(params=MODELS)
def model(request):
    """A precision, the tiny model in a format of its numbers, and what that means."""
    if request.param == "fp8":
        return "fp8", request.getfixturevalue("fp8_checkpoint"), resolve_model("tiny").folder
    numbers, settings, write = MODELS[request.param]

    def make(folder):
        quantized_checkpoint(resolve_model("tiny").folder, folder, settings, write)

    folder = shared(f"tiny-{request.param}-for-torch", make)
    return numbers, folder / "quantized", folder / "plain"


def step(decoder):
    """Of a prompt of 20 tokens."""
    positions = torch.arange(TOKENS).expand(3, TOKENS)
    return decoder.step([Chunk(0, 0, TOKENS)], decoder.embed(list(range(30, 30 + TOKENS))), positions, hidden=True)


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def slowdown(request, monkeypatch):
    """A CPU that emulates BF16, and one that does not."""
    monkeypatch.setattr(precision, "bf16_slowdown", lambda: 9.0 if request.param == torch.float32 else 1.0)
    return request.param


@pytest.mark.parametrize("rows", [TOKENS - 1, TOKENS])
def test_states_and_answers(model, slowdown, rows, tmp_path, monkeypatch):
    """Against FP32 over the weights that are meant; ``lm_head`` is the model's own in 8 bits.

    Of BF16, the model's own layers in BF16 are the yardstick: they round input, weight and result, those of 4 bits the
    scale too. In FP32, products of 4 bits are in BF16 all the same; those of 8 bits hold a row's activations to 1/8126
    of the largest, and what is meant is rounded to FP16: both finer than BF16 by 8 and more.
    """
    numbers, quantized, plain = model
    monkeypatch.setattr(weight_only, "int4_rows", lambda: rows)
    engines = {
        name: open_engines(build(checkpoint, tmp_path / name, "torch", numbers_of, PROFILE), "cpu")
        for name, checkpoint, numbers_of in (
            ("plain", plain, "fp32"),
            ("bf16", plain, "bf16"),
            ("quantized", quantized, numbers),
        )
    }
    assert engines["quantized"].dtype == slowdown
    expected, rounded, found = (step(each.decoder) for each in engines.values())
    noise = error(rounded.hidden_states.float(), expected.hidden_states)
    allowed = 1.5 * noise if slowdown == torch.bfloat16 or numbers == "int4" else noise / 8
    assert error(found.hidden_states.float(), expected.hidden_states) < allowed
    head = engines["plain"].checkpoint.load("model.embed_tokens.weight").float()
    logits = found.hidden_states[-1:].float() @ round_to_nearest(head, 8, head.shape[1]).dequantize().T
    assert error(found.logits, logits) < 2**-7

    scenes = [scene for task in TASKS for scene in held_out_scenes(task, 2, seed=0)]
    answers = [answer_scenes(Pipeline(engines[name]), scenes) for name in ("plain", "quantized")]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("model", ["awq", "int8"], indirect=True)
def test_no_plain_weight_stays(model, tmp_path):
    """Bytes of the decoder's linear layers: numbers, and what BF16 scales of groups of 128, or a channel's, take."""
    numbers, quantized, _ = model
    decoder = open_engines(build(quantized, tmp_path, "torch", numbers, PROFILE), "cpu").decoder.module
    assert not [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    norms = {name for name, module in decoder.named_modules() if isinstance(module, RMSNorm)}
    assert {name.removesuffix(".weight") for name, _ in decoder.named_parameters()} == norms
    layers = {name: module for name, module in decoder.named_modules() if isinstance(module, WeightOnlyLinear)}
    config = decoder.config
    assert len(layers) == 7 * config.num_hidden_layers + 1
    assert isinstance(layers["lm_head"].product, Int8Linear)
    for name, layer in layers.items():
        product = layer.product
        held = sum(buffer.nbytes for key, buffer in layer.named_buffers() if key != "bias")
        if isinstance(product, Int4Linear):
            out, channels = product.weight.shape[0], 2 * product.weight.shape[1]
            assert held == out * channels // 2 + 4 * out * channels // 128
        elif isinstance(product, Int8Linear):
            out, channels = product.parts[0].shape[0], sum(part.shape[1] for part in product.parts)
            assert held + out * channels <= out * channels + 4 * 3 * out * max(1, channels // 128)
        else:
            assert name == ""


@pytest.mark.parametrize("model", ["awq"], indirect=True)
def test_another_precision_dequantises(model, tmp_path):
    _, quantized, _ = model
    decoder = open_engines(build(quantized, tmp_path, "torch", "fp32", PROFILE), "cpu").decoder.module
    assert not [module for module in decoder.modules() if isinstance(module, WeightOnlyLinear)]


def test_what_is_between_products_is_fp32_where_bf16_is_emulated(slowdown):
    found = computed_on_cpu(precision.INT4)
    assert (found.vision, found.decoder) == (slowdown, slowdown)
    assert found.name == "int4"
    assert computed_on_cpu(precision.BF16) is precision.BF16


@pytest.mark.parametrize("model", ["awq"], indirect=True)
def test_states_of_a_layer(model, tmp_path):
    """``--layer``, and what ``compare`` records."""
    _, quantized, _ = model
    folder = build(quantized, tmp_path, "torch", "int4", PROFILE)
    whole = open_engines(folder, "cpu")
    recorder = Recorder()
    with recorder.listen(decoder_modules(whole.decoder.module.model)):
        step(whole.decoder)
    cut = open_engines(folder, "cpu")
    end_decoder_after(cut, 2)
    assert torch.equal(step(cut.decoder).hidden_states.float(), recorder.calls["model.layers.1"][0][0])


@pytest.mark.parametrize("model", ["fp8", "gptq", "int8", "nvfp4"], indirect=True)
def test_adapters_beside_quantised_weights(model, tmp_path):
    """Unmerged over them, against merged into the weights that they mean; without an adapter, nothing changes."""
    numbers, quantized, plain = model
    with torch.device("meta"):
        decoder = Decoder(Checkpoint(plain).config.text)
    trained = factors(decoder, modules(decoder, *ATTENTION, *MLP))
    targets = r"model\.layers\..*_proj"  # the vision tower's layers have some of these names too
    adapter = write_adapter(tmp_path / "adapter", trained, "published", target_modules=targets)

    def states(name, checkpoint, numbers, lora=None, options=None, adapter=None):
        folder = tmp_path / name
        given = {"lora": lora, "engine_dir": folder, "options": options, **PROFILE.as_dict()}
        pipeline = Pipeline.from_pretrained(checkpoint, "torch", numbers, "cpu", **given)
        return pipeline.hidden_states([Request("What digits are in the image? " * 3, adapter=adapter)])[0].float()

    served = PipelineOptions(lora_modules={"mine": adapter})
    merged, base = states("merged", plain, "fp32", lora=adapter), states("base", plain, "fp32")
    with_it = states("quantized", quantized, numbers, options=served, adapter="mine")
    without = states("quantized", quantized, numbers, options=served)
    assert error(merged, base) > 0.5
    noise = error(without, base)
    assert noise < 0.1
    assert error(with_it, merged) < 2 * noise + 0.01
