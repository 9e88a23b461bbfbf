"""What every test needs before Transformers is imported."""

import os
import signal
from collections.abc import Callable, Iterator
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


LONGEST = (
    "test_ray.py",
    "test_replicas.py",
    "test_commands.py",
    "test_tensorrt_build.py",
    "test_fp8.py",
    "test_command.py",
    "test_serving.py",
    "test_torch_cuda_path.py",
    "test_extraction.py",
    "test_precisions.py",
    "test_pipeline.py",
    "test_telemetry.py",
    "test_answers.py",
    "test_page.py",
)
"""Files of a minute or half of one: they come first, or one worker would still be at one when the other has ended."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is to run in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--no-onednn-packing"):
        from tests.support.onednn_packing import TYPES, PackingWithout

        torch.ops.mkldnn._reorder_linear_weight = PackingWithout(*TYPES)
        folder = Path(__file__).parent / "support" / "no_onednn_packing"
        found = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        # The same for processes that tests start: Python runs a sitecustomize that it finds there.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(folder.parents[2]), *filter(None, found)])


@pytest.fixture(scope="session", autouse=True)
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes of a run share what they make, and an engine build takes the graphs of another of the same model."""
    from qwen2vl_trt.engines import builders, tensorrt_build
    from qwen2vl_trt.export import onnx_model
    from tests.support import shared

    shared.share_in(tmp_path_factory)
    with pytest.MonkeyPatch.context() as patch:
        for module in (onnx_model, builders, tensorrt_build):
            patch.setattr(module, "export_onnx", shared.export_once)
        yield


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


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command of run.py in this process: a process of its own takes seconds to import everything.

    Gives its exit code, stdout and stderr.
    """
    from qwen2vl_trt.commands import call
    from qwen2vl_trt.commands.process import run_command

    def command(name: str, *options: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: call(name, [str(option) for option in options]))
        found = capfd.readouterr()
        return int(ended.value.code or 0), found.out, found.err

    return command


@dataclass(frozen=True)
class BuiltModel:
    """A random-weight model of Transformers in FP32, its checkpoint on disk, and its ONNX Runtime engines."""

    reference: Any
    checkpoint: Path
    engines: Path


def _build(name: str, reference: Any, dtype: torch.dtype, **save: Any) -> BuiltModel:
    from qwen2vl_trt.engines.backends import find_backend
    from qwen2vl_trt.engines.build import build_engines
    from qwen2vl_trt.engines.profile import BuildProfile
    from qwen2vl_trt.hub import ResolvedModel
    from tests.support.models import save_model
    from tests.support.shared import shared

    def make(folder: Path) -> None:
        model = ResolvedModel("random", save_model(reference, folder / "checkpoint", dtype, **save))
        profile = BuildProfile(
            min_hw_dims=4, max_hw_dims=1024, max_batch_size=4, max_num_seqs=4, max_input_len=128, max_seq_len=256
        )
        build_engines(model, *find_backend("onnxruntime", "fp32"), profile, folder / "engines")

    folder = shared(name, make)
    return BuiltModel(reference, folder / "checkpoint", folder / "engines")


@pytest.fixture(scope="session")
def untied_model() -> BuiltModel:
    """Weights in FP32, untied, in one file, by the published names; 7 heads share one. Do not write into it."""
    from tests.support.models import model_config, random_model

    text = {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1, "intermediate_size": 201}
    reference = random_model(model_config(tied=False, text=text, vision={"depth": 2}), seed=7)
    return _build("untied", reference, torch.float32, dialect="published")


@pytest.fixture(scope="session")
def tied_model() -> BuiltModel:
    """Weights in BF16, tied, in three shards, by the names of Transformers 5. Do not write into it."""
    from tests.support.models import in_dtype, model_config, random_model

    reference = random_model(model_config(tied=True, vision={"hidden_size": 80, "num_heads": 1}), seed=8)
    reference = in_dtype(in_dtype(reference, torch.bfloat16), torch.float32)  # what the checkpoint holds
    return _build("tied", reference, torch.bfloat16, shards=3)


@pytest.fixture(scope="session", params=["untied", "tied"])
def built_model(request: pytest.FixtureRequest) -> BuiltModel:
    """Both of them, one after the other."""
    return request.getfixturevalue(f"{request.param}_model")


@pytest.fixture(scope="session")
def fp8_checkpoint() -> Path:
    """The tiny model in FP8, by Model Optimizer over 96 scenes of its training digits. Do not write into it."""
    pytest.importorskip("modelopt", reason="NVIDIA Model Optimizer is not installed: the quantize extra")
    from qwen2vl_trt.building.calibration import Calibration, training_data
    from qwen2vl_trt.checkpoint import Checkpoint
    from qwen2vl_trt.export.quantize import quantize_checkpoint
    from qwen2vl_trt.hub import resolve_model
    from tests.support.shared import shared

    def make(folder: Path) -> None:
        checkpoint = Checkpoint(resolve_model("tiny").folder)
        folder.mkdir()
        quantize_checkpoint(checkpoint, folder / "tiny-fp8", Calibration(checkpoint, training_data(96)))

    return shared("fp8", make) / "tiny-fp8"
