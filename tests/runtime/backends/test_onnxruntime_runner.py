"""What the ONNX Runtime runners ask of a session on a GPU, over fake tensors and a stand-in for the session."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.export.graphs import cache_names
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.windows import window_layout
from tests.support.models import model_config, our_config

ort = pytest.importorskip("onnxruntime")
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


@pytest.fixture
def bound(monkeypatch):
    """Names in the order in which they are bound, inputs and outputs."""
    names = []

    def noting(bind):
        def noted(binding, name, *args):
            names.append(name)
            bind(binding, name, *args)

        return noted

    for bind in ("bind_input", "bind_output"):
        monkeypatch.setattr(ort.IOBinding, bind, noting(getattr(ort.IOBinding, bind)))
    return names


@pytest.fixture
def append(engine_dirs):
    """A new decoder's step, of so many known tokens behind so many in each of some slots."""

    def load():
        decoder = open_engines(engine_dirs["onnxruntime"]).decoder

        def step(slots, start, length=1, hidden=False):
            embeds = decoder.embed([1 + (7 * slot + at) % 90 for slot in slots for at in range(start, start + length)])
            positions = torch.arange(start, start + length).repeat(len(slots)).expand(3, -1)
            found = decoder.step([Chunk(slot, start, length) for slot in slots], embeds, positions, hidden=hidden)
            return found.logits.clone(), found.hidden_states

        return decoder, step

    return load


def test_a_decode_step_binds_nothing(append, bound):
    """Two caches a layer, five inputs and the logits were bound at every step: three times as long as tiny's graph."""
    decoder, step = append()
    caches = 2 * sum(map(len, decoder.cache.rows(0, 1)))
    for slots in (range(2), range(1, 3)):
        bound.clear()
        step(slots, 0)
        assert len(bound) == caches + 6
        bound.clear()
        for start in range(1, 4):
            step(slots, start)
        assert bound == []


def test_a_decoder_goes_with_its_last_name(append):
    """Session and cache are gigabytes: they do not wait for Python's collector."""
    decoder, step = append()
    step([0], 0)
    gone = weakref.ref(decoder)
    gc.disable()
    try:
        del decoder, step
        assert gone() is None
    finally:
        gc.enable()


def test_a_prompt_binds_its_own_tensors_alone(append, bound):
    _, step = append()
    step([0], 0, 5)
    bound.clear()
    step([0], 5, 6)
    assert not [name for name in bound if "cache_" in name and name != "cache_start"]
    step([0], 11)
    bound.clear()
    step([0], 12)
    assert bound == []


def test_hidden_states_of_an_earlier_step_are_not_written(append):
    """They are bound by address, and an output that is bound is computed."""
    _, step = append()
    _, states = step([0], 0, 4, hidden=True)
    kept = states.clone()
    step([0], 4, 4)
    step([0], 8)
    assert torch.equal(states, kept)


def test_a_cache_that_moved_is_bound_anew(append, bound):
    """The old addresses may be anyone's memory by then."""
    decoder, step = append()
    step([0], 0, 100)
    step([0], 100)
    bound.clear()
    longer = [step([0], start)[0] for start in range(101, 131)]  # the capacity doubles at 128
    assert len(bound) == 2 * sum(map(len, decoder.cache.rows(0, 1))) + 6, "once for all the steps behind"
    other, again = append()
    other.cache.reserve(200)
    again([0], 0, 100)
    expected = [again([0], start)[0] for start in range(100, 131)][1:]
    torch.testing.assert_close(torch.stack(longer), torch.stack(expected), rtol=0, atol=1e-4)

    freed = [cache.fill_(3) for caches in decoder.cache.rows(0, 4) for cache in caches]
    decoder.reset()
    assert decoder.cache.capacity == 128
    for start in range(2):
        found, _ = step([0], start)
        torch.testing.assert_close(found, again([0], start)[0], rtol=0, atol=1e-4)
    assert all(cache.eq(3).all() for cache in freed)
