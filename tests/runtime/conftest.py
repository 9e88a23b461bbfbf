"""One random-weight model for all tests of the runtime: its checkpoint, its engines, and Transformers' view of it."""

import pytest
import torch

from qwen2vl_trt import Pipeline
from tests.support.engine_folders import BUILDS, build, write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture(scope="session")
def engine_dirs(checkpoint, tmp_path_factory):
    """Engine folder by backend."""
    folder = tmp_path_factory.mktemp("engines")
    return {backend: build(checkpoint, folder / backend, backend, precision) for backend, precision in BUILDS}


@pytest.fixture(scope="session")
def pipelines(engine_dirs):
    """Pipeline by backend; a test leaves it idle."""
    return {backend: Pipeline.from_engine_dir(folder, "cpu") for backend, folder in engine_dirs.items()}


@pytest.fixture(params=[backend for backend, _ in BUILDS])
def pipeline(pipelines, request):
    """Each backend's pipeline in turn."""
    found = pipelines[request.param]
    yield found
    assert not found.busy, "the test left requests in the pipeline"


@pytest.fixture(scope="session")
def reference(checkpoint):
    """Transformers' model (FP32) and processor."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(checkpoint)
