"""A published checkpoint in a hub's cache, Transformers' model and processor of it, and its engines."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from qwen2vl_trt import Pipeline, PipelineOptions
from qwen2vl_trt.engines.profile import BuildProfile
from tests.support.engine_folders import build
from tests.support.published import VOCABULARY, write_processor_files, write_published
from tests.support.shared import shared

PROFILE = BuildProfile(
    min_hw_dims=16, max_hw_dims=1024, max_batch_size=2, max_num_seqs=2, max_input_len=900, max_seq_len=1100
)
BACKENDS = ("torch", "onnxruntime")


@pytest.fixture(scope="session")
def vocabulary() -> None:
    """Skips where the published vocabulary is not at hand."""
    if not VOCABULARY.is_file():
        pytest.skip(f"{VOCABULARY} is missing: make .venv/vocabulary installs it")


@pytest.fixture(scope="session")
def processor_folder(vocabulary: None) -> Path:
    """The published files but for the weights. Do not write into it."""
    return shared("published-files", write_processor_files)


@pytest.fixture(scope="session")
def processor(processor_folder: Path) -> Any:
    """Transformers' processor."""
    return AutoProcessor.from_pretrained(processor_folder)


@dataclass(frozen=True)
class Published:
    """A cache of the hub, and the checkpoint's folder in it."""

    cache: Path
    snapshot: Path


@pytest.fixture(scope="session")
def published(processor_folder: Path) -> Published:
    """A 3B of two layers and two blocks. Do not write into it."""
    cache = shared("published-hub", lambda folder: write_published(folder, processor_folder))
    return Published(cache, next(cache.glob("*/snapshots/*")))


@pytest.fixture(scope="session")
def model(published: Published) -> Any:
    """Transformers' model in FP32."""
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(published.snapshot, dtype=torch.float32)
    return loaded.eval().requires_grad_(False)


@pytest.fixture(scope="session", params=BACKENDS)
def engines(request: pytest.FixtureRequest, published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines in FP32, on each backend in turn. Do not write into it."""
    folder = tmp_path_factory.mktemp("engines") / request.param
    return build(published.snapshot, folder, request.param, "fp32", PROFILE)


@pytest.fixture(scope="session")
def pipeline(engines: Path) -> Iterator[Pipeline]:
    """On each backend in turn; a prompt that comes again is read as the first time, so that draws are the same."""
    opened = Pipeline.from_engine_dir(engines, "cpu", PipelineOptions(reuse_prefixes=False))
    yield opened
    opened.close()
