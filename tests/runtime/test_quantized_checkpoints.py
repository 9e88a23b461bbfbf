"""The tiny model in every format that is read, against the checkpoint that it means, by tensors and by answers."""

import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl_trt import Pipeline
from qwen2vl_trt.building.plan import BuildRequest, plan_build
from qwen2vl_trt.building.quantized_model import quantize_first
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.build import check_quantization
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.engines.precision import FP8
from qwen2vl_trt.engines.profile import BuildConfig, BuildProfile
from qwen2vl_trt.errors import BuildError, EngineError
from qwen2vl_trt.export.weights import DEQUANTIZED
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.tiny.evaluation import answer_scenes
from qwen2vl_trt.tiny.scenes import TASKS, held_out_scenes
from tests.support.bounds import FP32
from tests.support.engine_folders import build
from tests.support.models import relative_error
from tests.support.quantized import (
    awq,
    fp8_tensors,
    gptq,
    modelopt_int4,
    modelopt_nvfp4,
    packed_tensors,
    quantized_checkpoint,
)
from tests.support.shared import shared

PROFILE = BuildProfile.from_dict(BuildConfig.from_yaml(Path(__file__).parents[2] / "configs" / "tiny.yaml").limits)


def compressed(format, **weights):
    """As LLM Compressor writes it."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    settings = {"config_groups": {"group_0": group}, "format": format, "quantization_status": "compressed"}
    return settings | {"quant_method": "compressed-tensors", "ignore": ["re:.*visual.*", "lm_head"]}


def smoothed_int4(weight):
    """Model Optimizer's INT4-AWQ with a scale for every input channel."""
    scale = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(0)) + 0.5
    return modelopt_int4(weight.float(), 128, scale.bfloat16().float())


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": False}
FORMATS = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, partial(awq, group_size=128)),
    "gptq": (GPTQ, partial(gptq, group_size=64, desc_act=True, symmetric=False, bias=True)),
    "w4a16": (
        compressed("pack-quantized", num_bits=4, type="int", symmetric=False, strategy="group", group_size=32),
        partial(packed_tensors, bits=4, group_size=32, symmetric=False),
    ),
    "fp8-static": (
        compressed("float-quantized", num_bits=8, type="float", symmetric=True, strategy="tensor"),
        partial(fp8_tensors, strategy="tensor"),
    ),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, modelopt_nvfp4),
    "int4-awq": ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, smoothed_int4),
}


@pytest.fixture(params=FORMATS)
def model(request):
    """The tiny model in a format, and what that means."""
    settings, write = FORMATS[request.param]

    def make(folder):
        quantized_checkpoint(resolve_model("tiny").folder, folder, settings, write)

    folder = shared(f"tiny-{request.param}", make)
    return folder / "quantized", folder / "plain"


def logits(folder):
    """Of a prompt of 20 tokens."""
    decoder = open_engines(folder, "cpu").decoder
    step = decoder.step([Chunk(0, 0, 20)], decoder.embed(list(range(30, 50))), torch.arange(20).expand(3, 20))
    return step.logits.clone()


def test_every_backend_answers_as_with_what_it_means(model, tmp_path):
    """FP32; a torch engine is bitwise the same, ONNX Runtime's up to the order of its sums."""
    quantized, plain = model
    folders = [
        build(checkpoint, tmp_path / name, backend, "fp32", PROFILE)
        for name, checkpoint, backend in (
            ("plain", plain, "torch"),
            ("torch", quantized, "torch"),
            ("onnxruntime", quantized, "onnxruntime"),
        )
    ]
    pipelines = [Pipeline.from_engine_dir(folder, "cpu") for folder in folders]
    scenes = [scene for task in TASKS for scene in held_out_scenes(task, 2, seed=0)]
    answers = [answer_scenes(pipeline, scenes) for pipeline in pipelines]
    assert answers[0] == answers[1] == answers[2]
    expected, torch_logits, ort_logits = map(logits, folders)
    assert torch.equal(torch_logits, expected)
    assert relative_error(ort_logits, expected) < FP32


@pytest.mark.parametrize("model", ["awq"], indirect=True)
def test_the_dequantised_file_is_the_engines_and_no_second_copy(model, tmp_path):
    quantized, plain = model
    folder = build(quantized, tmp_path / "engines", "onnxruntime", "fp32", PROFILE)
    manifest = Manifest.read(folder)
    assert set(manifest.files) == {"vision.onnx", "decoder.onnx", DEQUANTIZED}
    assert manifest.model_hash == Checkpoint(quantized).hash
    assert (folder / "model.safetensors").samefile(quantized / "model.safetensors")
    meant, written = load_file(plain / "model.safetensors"), load_file(folder / DEQUANTIZED)
    assert written.keys() == Checkpoint(quantized).packed.keys()
    assert all(torch.equal(written[name], meant[name]) for name in written)
    assert open_engines(folder, "cpu").checkpoint.packed.keys() == written.keys()
    with (folder / DEQUANTIZED).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(EngineError, match=rf"{re.escape(DEQUANTIZED)} is not the file that was built"):
        open_engines(folder, "cpu")


def test_fp8_is_not_made_of_what_is_quantised(model):
    quantized, _ = model
    method = Checkpoint(quantized).format.method
    with pytest.raises(BuildError, match=rf"is quantised \({method}\), and FP8 is made of an unquantised checkpoint"):
        check_quantization(Checkpoint(quantized), FP8)
    plan = plan_build(BuildRequest(quantized, precision="fp8"))
    assert quantize_first(plan) is plan, "nothing is calibrated first"


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
@pytest.mark.parametrize("model", ["awq"], indirect=True)
def test_tensorrt_rtx_builds(model, tmp_path, caplog):
    """FP16 weights in a BF16 graph. Runs the engine nowhere."""
    quantized, _ = model
    folder = build(quantized, tmp_path / "engines", "tensorrt-rtx", "bf16", PROFILE)
    assert {"vision.engine", "decoder.engine", DEQUANTIZED} <= Manifest.read(folder).files.keys()
    assert "(AWQ): its weights are dequantised to compute in bf16" in caplog.text
