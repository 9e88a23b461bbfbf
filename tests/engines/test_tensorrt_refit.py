"""Weight-stripped plans: which weights are left out, where they are, and that the runner would find each of them.

TensorRT for RTX builds no refittable plan without a GPU; its parsed network knows the names.
"""

import ctypes
import re
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

import qwen2vl_trt.engines.tensorrt_build as tensorrt_build
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.backends import TENSORRT, TENSORRT_RTX
from qwen2vl_trt.engines.options import TensorRTOptions
from qwen2vl_trt.engines.tensorrt_build import parse
from qwen2vl_trt.engines.tensorrt_callbacks import tensorrt_log
from qwen2vl_trt.engines.tensorrt_refit import refit, stored_weights, strip_weights
from qwen2vl_trt.errors import BuildError, EngineError
from qwen2vl_trt.weights import checkpoint_names
from tests.support.engine_folders import PROFILE

PREFIX = {"vision": "visual.", "decoder": ""}


@pytest.fixture(params=["vision", "decoder"])
def graph(request, rtx_engines):
    return rtx_engines.folder("bf16") / f"{request.param}.onnx"


def test_every_weight_of_the_checkpoint_is_named_and_placed(graph):
    checkpoint, weights = Checkpoint(graph.parent), stored_weights(graph)
    vision = graph.stem == "vision"
    names = {name for name in checkpoint_names(checkpoint) if name.startswith("visual.") == vision}
    tied = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {PREFIX[graph.stem] + name for name in weights} - tied == names - tied
    for name, weight in weights.items():
        location = checkpoint.locate(checkpoint_names(checkpoint)[PREFIX[graph.stem] + name])
        assert (weight.file, weight.offset, weight.length) == ("model.safetensors", location.offset, location.length)


def test_tensorrt_leaves_out_all_of_them_and_nothing_else(trt, graph):
    """In the parsed and lowered network: it knows each by the graph's name, and the flags are set."""
    parsed = parse(trt, graph)
    config = parsed.builder.create_builder_config()
    strip_weights(trt, parsed.network, config, graph)
    assert config.get_flag(trt.BuilderFlag.STRIP_PLAN)
    assert config.get_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    marked = parsed.network.are_weights_marked_refittable
    assert all(marked(name) for name in stored_weights(graph))
    inline = [
        value.name
        for value in onnx.load(graph, load_external_data=False).graph.initializer
        if value.name not in stored_weights(graph)
    ]
    assert inline
    assert not any(marked(name) for name in inline)
    constants = [parsed.network.get_layer(i) for i in range(parsed.network.num_layers)]
    large = [
        layer.name
        for layer in constants
        if layer.type == trt.LayerType.CONSTANT and np.prod(layer.get_output(0).shape, dtype=int) > 100
    ]
    assert set(large) <= set(stored_weights(graph)), "what stays in the plan is small"


def test_a_weight_that_tensorrt_does_not_know(trt, rtx_engines):
    folder = rtx_engines.folder("bf16")
    parsed = parse(trt, folder / "vision.onnx")
    with pytest.raises(BuildError, match=r"decoder\.onnx: tensorrt_rtx \S+ has no weights 'model\..*--strip-weights"):
        strip_weights(trt, parsed.network, parsed.builder.create_builder_config(), folder / "decoder.onnx")


def test_tensorrt_for_rtx_refuses_with_the_reason():
    with pytest.raises(BuildError, match=r"--strip-weights is not for tensorrt-rtx: without a GPU it builds no plan"):
        tensorrt_build._check_machine(TENSORRT_RTX, TensorRTOptions(strip_weights=True))


def test_the_command_refuses_it_in_one_line(trt, tmp_path, command):
    options = ("--backend", "tensorrt-rtx", "--strip-weights", "--engine-dir", tmp_path / "new")
    code, _, errors = command("build", *options)
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith("error: --strip-weights is not for tensorrt-rtx")
    assert not list((tmp_path / "new").glob("*.onnx"))


def test_tensorrt_takes_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    tensorrt_build._check_machine(TENSORRT, TensorRTOptions(strip_weights=True))
    assert TensorRTOptions(strip_weights=True).as_dict() == {"strip_weights": True}


def test_the_reason_still_holds(trt, rtx_engines):
    """Should a release build it without a GPU, the refusal has to go."""
    path = rtx_engines.folder("bf16") / "decoder.onnx"
    parsed = parse(trt, path)
    config = tensorrt_build._configure(
        trt, parsed.builder, path, tensorrt_build.decoder_ranges(PROFILE), TensorRTOptions()
    )
    strip_weights(trt, parsed.network, config, path)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert parsed.builder.build_serialized_network(parsed.network, config) is None


class FakeRefitter:
    """The names that a network has, and what it is given; see the bindings' Refitter."""

    wanted = None  # bytes by name
    rejects = fails = False

    def __init__(self, engine, logger):
        self.given, FakeRefitter.last = {}, self

    def get_all_weights(self):
        return list(self.wanted)

    def get_weights_prototype(self, name):
        return SimpleNamespace(dtype="BF16", size=self.wanted[name] // 2, nbytes=self.wanted[name])

    def set_named_weights(self, name, weights):
        self.given[name] = ctypes.string_at(weights.ptr, weights.count * 2)
        return not self.rejects

    def get_missing_weights(self):
        return [name for name in self.wanted if name not in self.given]

    def refit_cuda_engine(self):
        return not self.fails


@pytest.fixture
def fake(trt, graph, monkeypatch):
    weights = {name: stored.length for name, stored in stored_weights(graph).items()}
    monkeypatch.setattr(FakeRefitter, "wanted", weights)
    return SimpleNamespace(
        Refitter=FakeRefitter, Weights=lambda dtype, ptr, count: SimpleNamespace(dtype=dtype, ptr=ptr, count=count)
    )


class TestRefit:
    def test_each_weight_is_the_checkpoints_own(self, trt, fake, graph):
        refit(fake, None, tensorrt_log(trt), graph)
        checkpoint = Checkpoint(graph.parent)
        assert FakeRefitter.last.given.keys() == stored_weights(graph).keys()
        for name, content in FakeRefitter.last.given.items():
            tensor = checkpoint.load(checkpoint_names(checkpoint)[PREFIX[graph.stem] + name])
            assert content == tensor.view(torch.uint8).numpy().tobytes(), name

    def refused(self, trt, fake, graph):
        with pytest.raises(EngineError) as error:
            refit(fake, None, tensorrt_log(trt), graph)
        return str(error.value)

    def test_a_weight_that_the_files_do_not_have(self, trt, fake, graph):
        FakeRefitter.wanted["surprise"] = 2
        assert f"{graph.name} has no weights 'surprise', which the engine needs" in self.refused(trt, fake, graph)

    def test_a_weight_of_another_size(self, trt, fake, graph):
        name = next(iter(FakeRefitter.wanted))
        FakeRefitter.wanted[name] += 2
        assert re.search(r"have [\d,]+ bytes, the engine needs [\d,]+\. Rebuild", self.refused(trt, fake, graph))

    def test_tensorrt_does_not_take_one(self, trt, fake, graph, monkeypatch):
        monkeypatch.setattr(FakeRefitter, "rejects", True)
        assert "TensorRT does not take weights" in self.refused(trt, fake, graph)

    def test_one_is_missing(self, trt, fake, graph, monkeypatch):
        monkeypatch.setattr(FakeRefitter, "get_missing_weights", lambda self: ["a.b"])
        assert "the engine still lacks weights 'a.b'" in self.refused(trt, fake, graph)

    def test_tensorrt_fails(self, trt, fake, graph, monkeypatch):
        monkeypatch.setattr(FakeRefitter, "fails", True)
        assert "TensorRT cannot give the engine its weights" in self.refused(trt, fake, graph)


def test_the_refitters_names(trt):
    names = [name for name in vars(FakeRefitter) if name.startswith(("get", "set", "refit"))]
    assert not [name for name in names if not hasattr(trt.Refitter, name)]
    array = np.arange(6, dtype=np.int32)
    weights = trt.Weights(trt.DataType.INT32, array.ctypes.data, 6)
    assert (weights.size, weights.nbytes, weights.dtype) == (6, 24, trt.DataType.INT32)
