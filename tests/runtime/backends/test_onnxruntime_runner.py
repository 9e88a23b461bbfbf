"""What the ONNX Runtime runners ask of a session on a GPU, over fake tensors and a stand-in for the session."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.export.graphs import cache_names
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.windows import window_layout
from tests.support.models import model_config, our_config

onnxruntime_runner = pytest.importorskip("qwen2vl_trt.runtime.backends.onnxruntime_runner")

GPU = torch.device("cuda", 1)
CONFIG = our_config(model_config())
TEXT, VISION = CONFIG.text, CONFIG.vision


class Operators(TorchDispatchMode):
    """Notes what is queued on the current stream."""

    def __init__(self, log):
        super().__init__()
        self._log = log

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._log.append("operator")
        return function(*args, **(kwargs or {}))


class Session:
    """Notes what is bound and when it runs."""

    def __init__(self, log):
        self._log, self.inputs, self.outputs = log, {}, {}

    def get_outputs(self):
        return [SimpleNamespace(shape=["tokens", 64])]

    def io_binding(self):
        def bind(bound):
            return lambda name, *args: bound.update({name: args})

        return SimpleNamespace(bind_input=bind(self.inputs), bind_output=bind(self.outputs))

    def run_with_iobinding(self, binding):
        self._log.append("run")


@pytest.fixture
def log(monkeypatch):
    """In order: operators, waits of the host for the current stream, runs of the session."""
    log = []

    def current_stream(device):
        assert device == GPU
        return SimpleNamespace(synchronize=lambda: log.append("synchronize"))

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: 256, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True), Operators(log):
        yield log


def test_vision_runs_after_what_the_current_stream_holds(log):
    """The session's stream would else read pixels that are still being written."""
    session = Session(log)
    runner, layout = onnxruntime_runner.OrtVision(session, GPU), window_layout(((1, 4, 4),), VISION)
    for _ in range(2):  # the second time, nothing waits for index tensors to be copied
        log.clear()
        runner(torch.zeros(*layout.sequence_position.shape, VISION.qwen2_vl_dim, device=GPU), layout)
        assert "operator" in log
        assert log[-2:] == ["synchronize", "run"]
    assert {args[:2] for args in (*session.inputs.values(), *session.outputs.values())} == {("cuda", 1)}


def test_a_step_runs_after_what_the_current_stream_holds(log, monkeypatch):
    monkeypatch.setattr(onnxruntime_runner, "TokenEmbedding", lambda *args: None)
    # A PyTorch for the CPU takes no slice of a fake GPU's tensor.
    monkeypatch.setattr(onnxruntime_runner.KVCache, "rows", lambda cache, first, count: (cache.k, cache.v))
    session, checkpoint = Session(log), SimpleNamespace(config=SimpleNamespace(text=TEXT))
    decoder = onnxruntime_runner.OrtDecoder(session, checkpoint, BuildProfile(4, 16, 2, 8, 16), torch.float32, GPU)
    chunks = [Chunk(slot, 0, 3) for slot in range(2)]
    decoder.step(chunks, torch.zeros(6, TEXT.hidden_size, device=GPU), torch.zeros(3, 6, dtype=torch.int64))
    assert log[-2:] == ["synchronize", "run"]
    for key, value in cache_names(TEXT.num_hidden_layers):
        assert session.inputs[key] == session.outputs[f"new_{key}"]
        assert session.inputs[value] == session.outputs[f"new_{value}"]


@pytest.fixture
def opened(monkeypatch, engine_dirs):
    """Opens a graph on a GPU; gives the providers that the session was asked for."""

    def open_with(providers):
        asked = []

        def session(path, options, providers):
            asked.extend(providers)
            return SimpleNamespace(get_providers=lambda: started)

        started = providers
        monkeypatch.setattr(onnxruntime_runner, "default_device", lambda: "cuda")
        monkeypatch.setattr(onnxruntime_runner.ort, "InferenceSession", session)
        onnxruntime_runner.open_session(engine_dirs["onnxruntime"] / "vision.onnx", GPU)
        return asked

    return open_with


def test_fp32_on_a_gpu_is_not_tf32(opened):
    name, options = opened(["CUDAExecutionProvider", "CPUExecutionProvider"])[0]
    assert name == "CUDAExecutionProvider"
    assert options == {"device_id": 1, "use_tf32": 0}


def test_its_threads_do_not_spin_between_operators(engine_dirs):
    """The cores are those of images, texts and a server, too."""
    session = onnxruntime_runner.open_session(engine_dirs["onnxruntime"] / "vision.onnx", torch.device("cpu"))
    assert session.get_session_options().get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_a_provider_that_does_not_start_is_no_silent_cpu(opened):
    """ONNX Runtime goes on with the other providers, and computes on the CPU."""
    with pytest.raises(EngineError, match=r"device cuda:1: .* could not start its CUDA provider.*--device cpu"):
        opened(["CPUExecutionProvider"])
