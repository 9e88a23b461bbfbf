"""What is built where nobody says everything: by the commands and by ``Pipeline.from_pretrained`` alike."""

from pathlib import Path

import pytest
import torch

from qwen2vl_trt import BuildError, LimitError, Pipeline, Request, SamplingParams
from qwen2vl_trt.building import plan as plan_module
from qwen2vl_trt.building.plan import BuildRequest, built_folder, plan_build
from qwen2vl_trt.engines import backends, precision
from qwen2vl_trt.engines.backends import BF16, FP32

DIGITS = Path(__file__).parents[2] / "docs" / "digits.png"
LIMITS = {
    "min_hw_dims": 4,
    "max_hw_dims": 1024,
    "max_batch_size": 2,
    "max_num_seqs": 2,
    "max_input_len": 512,
    "max_seq_len": 640,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def test_from_pretrained_builds_what_is_missing_once(folder):
    given = {"backend": "torch", "precision": "fp32", "device": "cpu", **LIMITS}
    pipeline = Pipeline.from_pretrained("tiny", **given)
    manifest = folder / "artifacts" / "tiny-torch-fp32" / "manifest.json"
    built = manifest.stat().st_mtime_ns
    (output,) = pipeline.generate(Request("What digits are in the image?", [DIGITS]), SamplingParams(max_tokens=16))
    assert output.text == "92059"
    assert repr(output).startswith("Output(text='92059', tokens=6, finish_reason='stop', prompt_tokens=")
    assert Pipeline.from_pretrained("tiny", "torch", "fp32", "cpu").profile.as_dict() == LIMITS  # as they are there
    assert manifest.stat().st_mtime_ns == built
    with pytest.raises(BuildError, match=r"holds other engines: --max-batch-size 2 there, 3 wanted.*--force"):
        Pipeline.from_pretrained("tiny", **given | {"max_batch_size": 3})
    with pytest.raises(LimitError, match=r"options is a dict; give PipelineOptions"):
        Pipeline.from_pretrained("tiny", **given, options={"strict_size": True})
    with pytest.raises(BuildError, match=r"unknown option 'batch_size' of a build; known: model, .*max_batch_size"):
        Pipeline.from_pretrained("tiny", batch_size=3)


def test_engines_that_are_there_are_taken_instead_of_measuring_the_cpu_anew(folder, monkeypatch):
    """A busy moment must not build a second folder."""
    measured = []
    monkeypatch.setattr(plan_module, "bf16_slowdown", lambda: 2.0)
    monkeypatch.setattr(backends, "cpu_precision", lambda: measured.append(1) or BF16)
    request = BuildRequest(model="tiny", backend="torch")
    assert plan_build(request).precision == "bf16"
    Pipeline.from_pretrained("tiny", "torch", FP32.name, "cpu", **LIMITS)
    assert plan_build(request).precision == "fp32"
    assert len(measured) == 1
    assert plan_build(BuildRequest(model="tiny", backend="torch", force=True)).precision == "bf16"


def test_paths_may_be_strings(folder):
    given = BuildRequest.of(
        {"model": "tiny", "engine_dir": "engines", "config": "tiny.yaml", "calibration_data": "data"}
    )
    assert (given.engine_dir, given.config, given.calibration_data) == (
        Path("engines"),
        Path("tiny.yaml"),
        Path("data"),
    )


def test_a_quantised_checkpoint_keeps_its_precision(folder, fp8_checkpoint):
    for backend in ("torch", "onnxruntime"):
        plan = plan_build(BuildRequest(model=fp8_checkpoint, backend=backend))
        assert plan.precision == "fp8"
    assert plan_build(BuildRequest(model=fp8_checkpoint, backend="torch", precision="bf16")).precision == "bf16"


BOTH = ("onnxruntime", "tensorrt")


@pytest.mark.parametrize(
    ("gpu", "installed", "slowdown", "given", "expected"),
    [
        (False, BOTH, 2.0, {}, "onnxruntime"),
        (False, (), 2.0, {}, "torch"),
        (False, BOTH, 0.5, {}, "torch"),
        (False, BOTH, 0.5, {"stored": "int4"}, "onnxruntime"),
        (False, (), 0.5, {"stored": "int4"}, "torch"),
        (False, BOTH, 0.5, {"stored": "fp8"}, "torch"),
        (False, BOTH, 0.5, {"precision": "fp8"}, "torch"),
        (False, BOTH, 2.0, {"precision": "fp8"}, "onnxruntime"),
        (False, BOTH, 0.5, {"precision": "fp32"}, "onnxruntime"),
        (False, BOTH, 2.0, {"precision": "bf16"}, "torch"),
        (True, ("onnxruntime",), 2.0, {}, "torch"),
        (True, BOTH, 0.5, {}, "tensorrt"),
        (True, BOTH, 0.5, {"precision": "int8"}, "torch"),
        (True, BOTH, 2.0, {"device": "cpu"}, "onnxruntime"),
        (True, BOTH, 0.5, {"device": "cpu"}, "torch"),
        (False, ("onnxruntime",), 2.0, {"device": "cuda:1"}, "torch"),
    ],
)
def test_the_default_backend_suits_the_device_and_the_precision(monkeypatch, gpu, installed, slowdown, given, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(backends, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(backends, "bf16_slowdown", lambda: slowdown)
    assert backends.default_backend(**given) == expected


@pytest.mark.parametrize(("slowdown", "backend", "numbers"), [(0.5, "torch", "bf16"), (2.0, "onnxruntime", "fp32")])
def test_what_was_chosen_is_said_once(folder, caplog, monkeypatch, slowdown, backend, numbers):
    for module in (backends, plan_module, precision):
        monkeypatch.setattr(module, "bf16_slowdown", lambda: slowdown)
    caplog.set_level("INFO", "qwen2vl_trt.building")
    given = {"device": "cpu", **LIMITS}
    Pipeline.from_pretrained("tiny", "torch", "fp32", **given)
    for _ in range(2):
        Pipeline.from_pretrained("tiny", **given)
    chosen = Path(f"artifacts/tiny-{backend}-{numbers}")
    assert caplog.messages == [f"building {chosen}: backend {backend}, precision {numbers} by default"]


def test_a_method_of_quantisation_that_there_is_not(folder):
    with pytest.raises(BuildError, match="--quant-method is 'gptq'; known: awq, rtn"):
        plan_build(BuildRequest(model="tiny", precision="int4", quant_method="gptq"))
    with pytest.raises(BuildError, match=r"--quant-method says how to build, but .* runs as it was built"):
        built_folder(BuildRequest(engine_dir=Path("engines"), quant_method="rtn"))


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("onnxruntime", None, "nvfp4"),
        ("tensorrt", None, "bf16"),
        ("tensorrt", (9, 0), "bf16"),
        ("tensorrt", (10, 0), "nvfp4"),
        ("tensorrt-rtx", (12, 0), "nvfp4"),
    ],
)
def test_nvfp4_is_the_default_where_its_products_are(monkeypatch, name, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert backends.BACKENDS[name].default_precision(None, "nvfp4").name == expected
    if name != "onnxruntime":
        assert backends.BACKENDS[name].default_precision(None, "int4").name == "int4"
