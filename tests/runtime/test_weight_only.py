"""The tiny model in 4 and 8 bits on ONNX Runtime, in every format that has such weights, against what they mean."""

import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qwen2vl_trt import Pipeline
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.decoder import Decoder
from qwen2vl_trt.engines.backends import BACKENDS
from qwen2vl_trt.engines.build import check_quantization
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.engines.precision import INT4, INT8_IN_FP32, NVFP4_IN_FP32
from qwen2vl_trt.errors import BuildError
from qwen2vl_trt.export.blocked_weights import BLOCKED, HEAD_BLOCK
from qwen2vl_trt.export.weights import DEQUANTIZED
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.quantized.rounding import round_to_nearest
from qwen2vl_trt.runtime.backends.onnxruntime_runner import load_decoder, open_session
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.tiny.evaluation import answer_scenes
from qwen2vl_trt.tiny.scenes import TASKS, held_out_scenes
from qwen2vl_trt.weights import EMBEDDING, checkpoint_names, load_weights
from tests.runtime.test_quantized_checkpoints import FORMATS, PROFILE, compressed
from tests.support.bounds import FP32
from tests.support.engine_folders import build
from tests.support.models import relative_error
from tests.support.quantized import gptq, int8_tensors, is_decoder_linear, packed_tensors, quantized_checkpoint
from tests.support.shared import shared

ROUNDED_INPUTS = 0.03
"""Of logits, as a norm: each linear layer takes its input in 8 bits. A step is 1/127 of the largest number of a block
of up to 128, some 3 times their root mean square; a rounding of 0.29 steps is 0.7% of a layer's input, and as much of
its output. Residuals carry them on, and 0.2% to 0.4% were measured."""

FORMATS_OF = {
    "awq": "int4",
    "gptq": "int4",
    "w4a16": "int4",
    "int4-awq": "int4",
    "gptq-8": "int8",
    "int8": "int8",
    "w8a16": "int8",
    "nvfp4": "nvfp4",
}
OTHERS = {
    "gptq-8": ({"quant_method": "gptq", "bits": 8, "group_size": 128}, partial(gptq, group_size=128, bits=8)),
    "int8": (
        compressed("int-quantized", num_bits=8, type="int", symmetric=True, strategy="channel"),
        int8_tensors,
    ),
    "w8a16": (
        compressed("pack-quantized", num_bits=8, type="int", symmetric=False, strategy="group", group_size=64),
        partial(packed_tensors, bits=8, group_size=64, symmetric=False),
    ),
}


def checkpoint_of(name: str) -> Path:
    settings, write = (FORMATS | OTHERS)[name]

    def make(folder):
        quantized_checkpoint(resolve_model("tiny").folder, folder, settings, write)

    return shared(f"tiny-{name}", make) / "quantized"


def engines_of(name: str) -> Path:
    """Do not write into them."""
    checkpoint, precision = checkpoint_of(name), FORMATS_OF[name]
    return shared(f"tiny-{name}-engines", lambda folder: build(checkpoint, folder, "onnxruntime", precision, PROFILE))


@pytest.fixture(params=FORMATS_OF)
def name(request):
    return request.param


@torch.no_grad()
def meant_logits(folder: Path) -> torch.Tensor:
    """By PyTorch in FP32, from the weights that the checkpoint means, unrounded; ``lm_head`` is rounded to 8 bits."""
    checkpoint = Checkpoint(folder)
    with torch.device("meta"):
        module = Decoder(checkpoint.config.text).eval()
    load_weights(module, checkpoint, dtype=torch.float32)
    names = checkpoint_names(checkpoint)
    for ours, theirs in names.items():
        if theirs in checkpoint.packed:
            weight = checkpoint.packed[theirs].read().dequantize()
            module.get_submodule(ours.removesuffix(".weight")).weight = nn.Parameter(weight)
    table = checkpoint.load(names[EMBEDDING])
    module.lm_head.weight = nn.Parameter(round_to_nearest(table, 8, HEAD_BLOCK).dequantize())
    states, _ = module.model(table[30:50].float()[None], torch.arange(20).expand(3, 1, 20))
    return module.lm_head(states[:, -1])


def found_logits(folder: Path, level: int | None = None) -> torch.Tensor:
    """Of the same prompt; ``level`` instead of the accuracy level that engines are run with."""
    engines = open_engines(folder, "cpu")
    session = None
    if level is not None:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
        session = onnxruntime.InferenceSession(folder / "decoder.onnx", options, providers=["CPUExecutionProvider"])
    decoder = load_decoder(engines, session)
    step = decoder.step([Chunk(0, 0, 20)], decoder.embed(list(range(30, 50))), torch.arange(20).expand(3, 20))
    return step.logits.clone()


def test_logits(name):
    """With activations in FP32 exactly what the weights mean; as engines are run, near it."""
    folder = engines_of(name)
    expected = meant_logits(checkpoint_of(name))
    assert relative_error(found_logits(folder, level=0), expected) < FP32
    found = found_logits(folder)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < ROUNDED_INPUTS


def test_every_layer_is_multiplied_as_it_is_packed(name, tmp_path, monkeypatch):
    """In the graph that ONNX Runtime runs, the way that the runner opens it."""
    folder, optimised = engines_of(name), tmp_path / "optimised.onnx"
    session_options = onnxruntime.SessionOptions

    def options():
        made = session_options()
        made.optimized_model_filepath, made.log_severity_level = str(optimised), 3
        return made

    monkeypatch.setattr(onnxruntime, "SessionOptions", options)
    open_session(folder / "decoder.onnx", torch.device("cpu"))
    operators = Counter(node.op_type for node in onnx.load(optimised, load_external_data=False).graph.node)
    assert operators["MatMulNBits"] == 7 * Checkpoint(folder).config.text.num_hidden_layers + 1
    assert operators["DequantizeLinear"] == 0


def test_answers(name):
    """Those of the held-out scenes that the dequantised model answers, but for a few."""
    scenes = [scene for task in TASKS for scene in held_out_scenes(task, 4, seed=0)]
    pipeline = Pipeline.from_engine_dir(engines_of(name), "cpu")
    right = sum(answer == scene.answer for answer, scene in zip(answer_scenes(pipeline, scenes), scenes))
    assert right >= len(scenes) - 2


def test_the_folder_holds_what_it_needs_once(name):
    """Packed weights, scales of each block, lm_head in 8 bits; the graph is small, the checkpoint's file is linked."""
    folder, checkpoint = engines_of(name), checkpoint_of(name)
    opened = Checkpoint(checkpoint)
    manifest = Manifest.read(folder)
    assert set(manifest.files) == {"vision.onnx", "decoder.onnx", BLOCKED}
    assert manifest.files[BLOCKED].bytes == (folder / BLOCKED).stat().st_size
    assert (folder / "model.safetensors").samefile(checkpoint / "model.safetensors")
    weights = sum(weight.shape[0] * weight.shape[1] for weight in opened.packed.values())
    bits = 4 if FORMATS_OF[name] == "int4" else 8
    block = {"gptq": 64, "w8a16": 64, "w4a16": 32, "nvfp4": 16}.get(name, 128)
    zeros = name in ("awq", "gptq", "w4a16", "w8a16")
    channels = sum(weight.shape[1] for weight in opened.packed.values())
    text = opened.config.text
    head = text.vocab_size * text.hidden_size * (1 + 4 / HEAD_BLOCK)
    most = weights * (bits / 8 + (4 + 4 * zeros) / block) + head + 8 * channels * (name == "gptq")
    most += 4 * channels * (name == "int4-awq") + 64 * 5 * len(opened.packed) + 128  # alignment
    assert (folder / BLOCKED).stat().st_size <= most
    assert (folder / "decoder.onnx").stat().st_size < 100_000


def test_the_checker_accepts_it(name, tmp_path):
    """Beside copies of the weights: the checker takes any hard link for an attack."""
    shutil.copytree(engines_of(name), tmp_path / "copy")
    onnx.checker.check_model(tmp_path / "copy" / "decoder.onnx", full_check=True)


def test_layers_of_other_numbers_are_dequantised(tmp_path, caplog):
    """Or of groups of 8 channels, which make no block; a line counts them."""
    four = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    schemes = {
        "re:.*(gate|up)_proj": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        "re:.*down_proj": four | {"group_size": 8},
        "re:.*[qkvo]_proj": four | {"group_size": 32},
    }
    groups = {name: {"targets": [name], "weights": weights} for name, weights in schemes.items()}
    text = Checkpoint(resolve_model("tiny").folder).config.text

    def write(weight):
        if len(weight) == text.intermediate_size:
            return packed_tensors(weight, bits=8, group_size=-1)
        return packed_tensors(weight, bits=4, group_size=8 if weight.shape[1] == text.intermediate_size else 32)

    settings = compressed("pack-quantized") | {"config_groups": groups}
    quantized_checkpoint(resolve_model("tiny").folder, tmp_path, settings, write)
    folder = build(tmp_path / "quantized", tmp_path / "engines", "onnxruntime", "int4", PROFILE)
    assert set(Manifest.read(folder).files) == {"vision.onnx", "decoder.onnx", BLOCKED, DEQUANTIZED}
    (line,) = (record.getMessage() for record in caplog.records if "dequantised" in record.getMessage())
    assert f"{3 * text.num_hidden_layers} layers of the decoder are dequantised, not computed in int4" in line
    dequantized = load_file(folder / DEQUANTIZED)
    assert {name.split(".")[-2] for name in dequantized} == {"gate_proj", "up_proj", "down_proj"}
    found, expected = found_logits(folder, level=0), meant_logits(tmp_path / "quantized")
    assert (found - expected).norm() / expected.norm() < 2**-10, "weights of those layers are rounded to FP16"

    caplog.clear()  # torch computes each layer in its own numbers
    assert open_engines(build(tmp_path / "quantized", tmp_path / "torch", "torch", "int4", PROFILE), "cpu").decoder
    (line,) = (record.getMessage() for record in caplog.records if "dequantised" in record.getMessage())
    assert f"{text.num_hidden_layers} quantised layers are dequantised as they are loaded" in line


def test_an_embedding_in_4_bits(tmp_path):
    """It has no product: it is dequantised where tokens are looked up, and ``lm_head``, tied to it, is multiplied."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear", "re:.*embed_tokens"], "weights": weights}}
    settings = compressed("pack-quantized") | {"config_groups": groups}
    write = partial(packed_tensors, bits=4, group_size=32)
    layers = lambda name: is_decoder_linear(name) or name == "model.embed_tokens.weight"  # noqa: E731
    quantized_checkpoint(resolve_model("tiny").folder, tmp_path, settings, write, layers)
    for backend in ("onnxruntime", "torch"):
        folder = build(tmp_path / "quantized", tmp_path / backend, backend, "int4", PROFILE)
        decoder = open_engines(folder, "cpu").decoder
        step = decoder.step([Chunk(0, 0, 20)], decoder.embed(list(range(30, 50))), torch.arange(20).expand(3, 20))
        plain = open_engines(build(tmp_path / "plain", tmp_path / f"{backend}-plain", backend, "fp32", PROFILE), "cpu")
        embeds = plain.decoder.embed(list(range(30, 50)))
        expected = plain.decoder.step([Chunk(0, 0, 20)], embeds, torch.arange(20).expand(3, 20)).logits
        assert (step.logits.float() - expected).norm() / expected.norm() < ROUNDED_INPUTS


class TestWhatDoesNotFit:
    def test_an_unquantised_model(self):
        checkpoint = Checkpoint(resolve_model("tiny").folder)
        with pytest.raises(
            BuildError, match=r"is not quantised to int8; \S.*build\S* --precision int8 does that first"
        ):
            check_quantization(checkpoint, INT8_IN_FP32)

    def test_a_model_in_other_numbers(self):
        checkpoint = Checkpoint(checkpoint_of("awq"))
        said = r"is quantised \(AWQ\) to int4, not to nvfp4: --precision int4 computes in what it has; --precision bf16"
        with pytest.raises(BuildError, match=said):
            check_quantization(checkpoint, NVFP4_IN_FP32)

    def test_a_model_in_fp8_by_compressed_tensors(self):
        settings, write = FORMATS["fp8-static"]

        def make(folder):
            quantized_checkpoint(resolve_model("tiny").folder, folder, settings, write)

        checkpoint = Checkpoint(shared("tiny-fp8-static", make) / "quantized")
        with pytest.raises(BuildError, match=r"to other numbers, not to int4: --precision bf16 or fp32 dequantises it"):
            check_quantization(checkpoint, INT4)

    def test_a_backend_without_it(self):
        with pytest.raises(BuildError, match=r"backend tensorrt cannot be built in 'int8', only in bf16, .* nvfp4$"):
            BACKENDS["tensorrt"].precision("int8")


def test_a_build_that_dequantises_nothing_does_not_say_so(caplog, tmp_path):
    build(checkpoint_of("awq"), tmp_path / "engines", "onnxruntime", "int4", PROFILE)
    assert "dequantised" not in caplog.text
