"""What every test needs before Transformers is imported."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# One thread for PyTorch, and for ONNX Runtime, which follows it, here and in processes that tests start: on tiny
# tensors two are slower, and twenty times slower where both cores have other work: every operator waits for both.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from qwen2vl_trt.export.importable_torchvision import allow_torchvision

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # Triton's kernels then run on the CPU, by its interpreter. It must be told before anything imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")


allow_torchvision()

from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor  # noqa: E402 - it imports torchvision

DEFAULT_SIZES = [(processor, dict(processor.size)) for processor in (Qwen2VLImageProcessor, Qwen2VLVideoProcessor)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-onednn-packing",
        action="store_true",
        help="let oneDNN's packing operator fail for every type, as it does for BF16 on a CPU without AVX-512",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-onednn-packing"):
        from tests.support.onednn_packing import TYPES, PackingWithout

        torch.ops.mkldnn._reorder_linear_weight = PackingWithout(*TYPES)
        folder = Path(__file__).parent / "support" / "no_onednn_packing"
        found = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        # The same for processes that tests start: Python runs a sitecustomize that it finds there.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(folder.parents[2]), *filter(None, found)])


@pytest.fixture(autouse=True)
def default_sizes() -> None:
    """Transformers writes the limits of each processor that it reads into the defaults of the class."""
    for processor, size in DEFAULT_SIZES:
        processor.size = dict(size)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A command that is interrupted ignores signals from there on; the next test does not."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@dataclass(frozen=True)
class BuiltModel:
    """A random-weight model of Transformers in FP32, its checkpoint on disk, and its ONNX Runtime engines."""

    reference: Any
    checkpoint: Path
    engines: Path


def _build(folder: Path, reference: Any, dtype: torch.dtype, **save: Any) -> BuiltModel:
    from qwen2vl_trt.engines.backends import find_backend
    from qwen2vl_trt.engines.build import build_engines
    from qwen2vl_trt.engines.profile import BuildProfile
    from qwen2vl_trt.hub import ResolvedModel
    from tests.support.models import save_model

    built = BuiltModel(reference, save_model(reference, folder / "checkpoint", dtype, **save), folder / "engines")
    profile = BuildProfile(min_hw_dims=4, max_hw_dims=1024, max_batch_size=4, max_input_len=128, max_seq_len=256)
    build_engines(
        ResolvedModel("random", built.checkpoint), *find_backend("onnxruntime", "fp32"), profile, built.engines
    )
    return built


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> BuiltModel:
    """Weights in FP32, untied, in one file, by the published names; 7 heads share one. Do not write into it."""
    from tests.support.models import model_config, random_model

    text = {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1, "intermediate_size": 201}
    reference = random_model(model_config(tied=False, text=text, vision={"depth": 2}), seed=7)
    return _build(tmp_path_factory.mktemp("untied"), reference, torch.float32, dialect="published")


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> BuiltModel:
    """Weights in BF16, tied, in three shards, by the names of Transformers 5. Do not write into it."""
    from tests.support.models import in_dtype, model_config, random_model

    reference = random_model(model_config(tied=True, vision={"hidden_size": 80, "num_heads": 1}), seed=8)
    reference = in_dtype(in_dtype(reference, torch.bfloat16), torch.float32)  # what the checkpoint holds
    return _build(tmp_path_factory.mktemp("tied"), reference, torch.bfloat16, shards=3)


@pytest.fixture(scope="session", params=["untied", "tied"])
def built_model(request: pytest.FixtureRequest) -> BuiltModel:
    """Both of them, one after the other."""
    return request.getfixturevalue(f"{request.param}_model")


@pytest.fixture(scope="session")
def fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in FP8, by Model Optimizer over 96 scenes of its training digits. Do not write into it."""
    pytest.importorskip("modelopt", reason="NVIDIA Model Optimizer is not installed: the quantize extra")
    from qwen2vl_trt.checkpoint import Checkpoint
    from qwen2vl_trt.export.quantize import quantize_checkpoint
    from qwen2vl_trt.hub import resolve_model
    from qwen2vl_trt.runtime.calibration import Calibration
    from qwen2vl_trt.tiny.evaluation import training_data

    checkpoint = Checkpoint(resolve_model("tiny").folder)
    samples = Calibration(checkpoint, training_data(96))
    return quantize_checkpoint(checkpoint, tmp_path_factory.mktemp("fp8") / "tiny-fp8", samples).folder
