"""Time by operator from TensorRT's profiler; the other backends' are in ``test_command.py``."""

import pytest

from qwen2vl_trt.benchmarks.cases import Limits, Shape, cases
from qwen2vl_trt.benchmarks.engines import EngineOptions
from qwen2vl_trt.benchmarks.operators import ITERATIONS, Profiler
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.preprocessing.preprocessor import PreprocessorSettings
from tests.support.engine_folders import PROFILE, build_fake_tensorrt, fake_tensorrt_runtime, write_checkpoint

pytest.importorskip("onnxruntime", reason="it computes what the engines would")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("operators")
    return build_fake_tensorrt(write_checkpoint(root / "checkpoint"), root / "engines")


@pytest.mark.parametrize(
    ("stage", "shape", "calls"),
    [
        ("vision", "56x84", {"image_embeds": 1}),
        # Two prompts, then three tokens of both.
        ("decoder", "batch:2,prompt:5,generate:4", {"logits": 2 + 3}),
        ("pipeline", "56x84,batch:1,generate:3", {"image_embeds": 1, "logits": 1 + 2}),
    ],
)
def test_tensorrts_layers_are_counted_once_a_call(folder, stage, shape, calls):
    checkpoint = open_engines(folder, "cpu").checkpoint
    settings = PreprocessorSettings.from_folder(checkpoint.folder)
    (case,) = cases([stage], [Shape.parse(shape)], Limits(PROFILE, checkpoint.config.vision, settings))
    with fake_tensorrt_runtime():
        operators = Profiler().operators(EngineOptions(folder, "cpu"), case)
    found = {operator.name: operator for operator in operators}
    for output, count in calls.items():
        operator = found[f"layer of {output}"]
        assert (operator.kind, operator.calls) == ("TensorRT", count * ITERATIONS)
        assert operator.milliseconds == pytest.approx(0.5 * operator.calls)
    assert ("layer of logits" in found) == (stage != "vision")
    assert sum(operator.percentage for operator in operators) == pytest.approx(100)
