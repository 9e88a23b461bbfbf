"""What the precisions cost: FP8 and the FP16 decoder on the CPU, against each other and against FP32."""

from pathlib import Path

import pytest
import torch

from qwen2vl_trt import Pipeline
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.profile import BuildConfig, BuildProfile
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.tiny.evaluation import answer_scenes, score
from qwen2vl_trt.tiny.scenes import TASKS, held_out_scenes
from qwen2vl_trt.windows import window_layout
from tests.support.bounds import E4M3_NOISE
from tests.support.engine_folders import build
from tests.support.thorough import often

CASES = often(40, 75)  # a task
PROFILE = BuildProfile.from_dict(BuildConfig.from_yaml(Path(__file__).parents[2] / "configs" / "tiny.yaml").limits)


@pytest.fixture(scope="module")
def folders(fp8_checkpoint, tmp_path_factory):
    """Engines by backend and precision."""
    parent = tmp_path_factory.mktemp("precisions")

    def folder(backend, precision):
        target = parent / f"{backend}-{precision}"
        checkpoint = fp8_checkpoint if precision == "fp8" else resolve_model("tiny").folder
        return target if target.exists() else build(checkpoint, target, backend, precision, PROFILE)

    return folder


def outputs(folder):
    """Image embeddings of three images, and the logits of a prefill and of a decode step."""
    engines = open_engines(folder, "cpu")
    config, generator = engines.checkpoint.config, torch.Generator().manual_seed(2)
    layout = window_layout(((1, 6, 10), (1, 2, 4), (1, 12, 8)), config.vision)
    pixels = torch.randn(*layout.sequence_position.shape, config.vision.qwen2_vl_dim, generator=generator)
    embeds = engines.vision(pixels.to(engines.dtype), layout)
    assert embeds.dtype == engines.precision.vision
    inputs = engines.decoder.embed(list(range(30, 50)))
    assert inputs.dtype == engines.precision.decoder
    positions = torch.arange(20).expand(3, 20)
    prefill = engines.decoder.step([Chunk(0, 0, 20)], inputs, positions).logits.clone()
    decode = engines.decoder.step([Chunk(0, 20, 1)], inputs[:1], positions[:, -1:] + 1).logits
    return [tensor.float() for tensor in (embeds, prefill, decode)]


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_onnxruntime_and_torch_compute_the_same_fp8(folders):
    """PyTorch computes in BF16 between the FP8 layers, ONNX Runtime in FP32: nearer to each other than to no FP8."""
    exact, ort, torch_fp8 = (
        outputs(folders(*which)) for which in (("torch", "fp32"), ("onnxruntime", "fp8"), ("torch", "fp8"))
    )
    for unquantised, expected, found in zip(exact, ort, torch_fp8):
        assert 0.003 < error(expected, unquantised) < 0.2, "quantised, and by no more than FP8 costs"
        assert error(found, expected) < error(expected, unquantised)


def test_onnxruntime_equals_torch_in_fp32_between(folders, fp8_checkpoint):
    """The same modules in FP32."""
    from qwen2vl_trt.engines.precision import FP8_IN_FP32
    from qwen2vl_trt.runtime.backends.torch_runner import TorchDecoder, TorchVision

    engines = open_engines(folders("onnxruntime", "fp8"), "cpu")
    checkpoint, cpu = Checkpoint(fp8_checkpoint), torch.device("cpu")
    assert engines.precision == FP8_IN_FP32
    vision = TorchVision(checkpoint, torch.float32, cpu)
    decoder = TorchDecoder(checkpoint, PROFILE, torch.float32, cpu)
    layout = window_layout(((1, 6, 10), (1, 12, 8)), checkpoint.config.vision)
    pixels = torch.randn(*layout.sequence_position.shape, 1176, generator=torch.Generator().manual_seed(2))
    assert error(vision(pixels, layout), engines.vision(pixels, layout)) < E4M3_NOISE
    step = [Chunk(0, 0, 20)], decoder.embed(list(range(30, 50))), torch.arange(20).expand(3, 20)
    found, expected = (runner.step(*step).logits for runner in (decoder, engines.decoder))
    assert error(found, expected) < E4M3_NOISE


def test_an_fp16_decoder_beside_a_bf16_tower(folders):
    exact, found, rough = (outputs(folders("torch", precision)) for precision in ("fp32", "fp16-decoder", "bf16"))
    assert torch.equal(found[0], rough[0]), "the same BF16 tower"
    for index in (1, 2):
        assert error(found[index], exact[index]) < 2e-3
        assert error(found[index], exact[index]) < error(rough[index], exact[index]), "three more bits"


def test_fp8_reads_held_out_digits_as_well(folders):
    """Through ONNX Runtime, as `run.py eval` asks them; docs/guide/quantization.md has figures over 1,000 of a task."""
    pipelines = [Pipeline.from_engine_dir(folders("onnxruntime", precision), "cpu") for precision in ("fp8", "fp32")]
    scenes = [scene for task in TASKS for scene in held_out_scenes(task, CASES, seed=0)]
    answers = [answer_scenes(pipeline, scenes) for pipeline in pipelines]
    scores = [score(given, [scene.answer for scene in scenes]) for given in answers]
    equal = sum(a == b for a, b in zip(*answers))
    assert scores[0].per_digit > scores[1].per_digit - 1, scores
    assert scores[0].exact > scores[1].exact - 1.5, scores  # 1 case in 160 is 0.6 of a point
    assert equal >= 0.95 * len(scenes), equal
