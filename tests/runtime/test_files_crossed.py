"""How many files one reads to follow a step, an image or a build; a limit that a new layer has to be worth."""

from contextlib import ExitStack

import pytest
import torch
from PIL import Image

from qwen2vl_trt import Pipeline, Request, SamplingParams, varlen
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.fused_ops import FusedOps
from qwen2vl_trt.runtime.backends import torch_runner
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.backends.torch_runner import CudaDecoder, CudaVision
from tests.support.engine_folders import PROFILE, build, build_fake_tensorrt, fake_tensorrt_runtime, installed_backends
from tests.support.files_crossed import files_crossed
from tests.support.recorded_graph import RecordedGraphs
from tests.support.varlen_reference import flash_attention

LIMITS = {"step": 23, "image": 21, "request": 44, "build": 33}
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def on_torch(checkpoint, folder, stack):
    return Pipeline.from_engine_dir(build(checkpoint, folder, "torch"), "cpu")


def on_torch_as_on_cuda(checkpoint, folder, stack):
    monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
    monkeypatch.setattr(varlen, "flash_attention", flash_attention)
    monkeypatch.setattr(torch_runner, "has_packed_attention", lambda *args: True)
    monkeypatch.setattr(torch_runner, "has_paged_attention", lambda *args: True)
    monkeypatch.setattr(FusedOps, "compile", lambda self, runs: None)
    engines, cpu = open_engines(build(checkpoint, folder, "torch"), "cpu"), torch.device("cpu")
    opened = Checkpoint(checkpoint)
    engines.__dict__["vision"] = CudaVision(opened, torch.float32, cpu)
    engines.__dict__["decoder"] = CudaDecoder(opened, PROFILE, torch.float32, cpu, True, RecordedGraphs())
    return Pipeline(engines)


def on_onnxruntime(checkpoint, folder, stack):
    pytest.importorskip("onnxruntime")
    return Pipeline.from_engine_dir(build(checkpoint, folder, "onnxruntime"), "cpu")


def on_tensorrt(checkpoint, folder, stack):
    pytest.importorskip("onnxruntime")
    stack.enter_context(fake_tensorrt_runtime())
    return Pipeline.from_engine_dir(build_fake_tensorrt(checkpoint, folder), "cpu")


@pytest.mark.parametrize("opened", [on_torch, on_torch_as_on_cuda, on_onnxruntime, on_tensorrt])
def test_a_step_an_image_and_a_request(checkpoint, tmp_path, stack, opened):
    pipeline = opened(checkpoint, tmp_path / "engines", stack)
    path = tmp_path / "image.png"
    Image.new("RGB", (80, 60), "red").save(path)
    output = pipeline.submit(Request("What is it?", images=[path]), PARAMS)

    def until_first_token():
        while not output.token_ids:
            pipeline.step()

    found = {"request": files_crossed(until_first_token)}
    pipeline.step()  # captures what the next one replays
    found["step"] = files_crossed(pipeline.step)
    found["image"] = files_crossed(lambda: pipeline.embed_images([path]))
    for work, files in found.items():
        print(f"{opened.__name__}, {work}: {len(files)} files", *files)
        assert len(files) <= LIMITS[work], (work, files)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "tensorrt-rtx"])
def test_a_build(checkpoint, tmp_path, backend):
    if backend not in [found.name for found in installed_backends()]:
        pytest.skip(f"the packages of {backend} are not installed")
    files = files_crossed(lambda: build(checkpoint, tmp_path / "engines", backend))
    print(f"{backend}, build: {len(files)} files", *files)
    assert len(files) <= LIMITS["build"], files
