"""Where everything lies on a GPU: the torch backend over fake tensors, which have a device and a shape and no values.

They raise where a tensor of the host meets one of the device in arithmetic, and where the host reads a value. The
widths are the published 3B's. On a PyTorch for the CPU the device is named meta, on one for CUDA cuda; it is not there.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen2vl_trt import ops
from qwen2vl_trt.benchmarks.random_model import config_of
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.runtime.backends import common, torch_graphs, torch_runner
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.runtime.backends.torch_runner import CudaDecoder, CudaVision
from qwen2vl_trt.windows import window_layout

DEVICE = torch.device("cuda", 0) if torch.version.cuda else torch.device("meta")
CONFIG = Qwen2VLConfig.from_dict(config_of("Qwen2.5-VL-3B", 2, 8))
PROFILE = BuildProfile(4, 16384, 8, 8, 4096, 8192)
GRIDS = ((1, 4, 10), (3, 6, 4), (1, 10, 18), (1, 2, 30))


class Apart(TorchDispatchMode):
    """No operator takes from the host what it gives to the device, or the other way round."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        assert len({x.device.type for x in tensors}) < 2, f"{function} crosses between the host and the device"
        return result


class OnDevice(TorchDispatchMode):
    """Every tensor of every operator is the device's, as a captured graph has it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        assert all(x.device.type == DEVICE.type for x in tensors), f"{function} touches the host in a capture"
        return result


class Device:
    """The fake device, and the one way there.

    Attributes:
        sent: tensors that went.
        captures: bodies of graphs.
    """

    def __init__(self):
        self.mode = FakeTensorMode()
        self.sent = self.captures = 0

    def empty(self, shape, dtype):
        with self.mode:
            return torch.empty(shape, dtype=dtype, device=DEVICE)

    @contextmanager
    def running(self):
        """Where tensors are made they are fake, the host's too."""
        with self.mode, Apart():
            yield

    def send(self, values, device, dtype=None):
        tensor = torch.as_tensor(values, dtype=dtype)
        if tensor.device.type == DEVICE.type:
            return tensor
        self.sent += 1
        return self.empty(tensor.shape, tensor.dtype)

    def capture(self, body):
        self.captures += 1
        with OnDevice():
            body()
        return body

    def load_weights(self, module, checkpoint, prefix, dtype, device, quantized=None, mapped=False):
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            owner, _, leaf = name.rpartition(".")
            kept = parameter.dtype == torch.float8_e4m3fn or leaf.endswith("_scale")
            loaded = self.empty(parameter.shape, parameter.dtype if kept else dtype)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(loaded, requires_grad=False))


@pytest.fixture(params=["fused", "masked", "fp8"])
def device(request, monkeypatch):
    device = Device()
    for module in (torch_runner, torch_graphs, common):
        monkeypatch.setattr(module, "to_device", device.send)
    for question in ("has_packed_attention", "has_paged_attention"):
        monkeypatch.setattr(torch_runner, question, lambda *args: request.param != "masked")
    monkeypatch.setattr(torch_runner, "load_weights", device.load_weights)
    monkeypatch.setattr(torch_runner, "_free_memory", lambda device: None)
    monkeypatch.setattr(ops, "has_scaled_mm", lambda device: True)
    monkeypatch.setattr(torch, "equal", lambda one, other: True)  # of scales, when layers are joined
    layers = frozenset()
    if request.param == "fp8":
        with torch.device("meta"):
            whole = {"visual.": torch_runner.VisionTransformer(CONFIG.vision), "": torch_runner.Decoder(CONFIG.text)}
        layers = frozenset(
            prefix + name
            for prefix, module in whole.items()
            for name, child in module.named_modules()
            if isinstance(child, nn.Linear) and name != "lm_head"
        )
    monkeypatch.setattr(torch_runner, "fp8_layers", lambda checkpoint: layers)
    return device


def test_the_vision_runner_meets_the_host_in_send_alone(device):
    with device.mode:
        vision = CudaVision(SimpleNamespace(config=CONFIG), torch.bfloat16, DEVICE, compiled=False)
    for grids in (((1, 32, 32),), GRIDS):
        layout = window_layout(grids, CONFIG.vision)
        vision._indices(layout)  # from values that the host knows
        pixels = device.empty((*layout.sequence_position.shape, 1176), torch.bfloat16)
        with device.running():
            embeds = vision(pixels, layout)
        assert embeds.device == DEVICE
        assert embeds.shape == (sum(layout.tokens_per_item), CONFIG.text.hidden_size)


def test_the_decoder_runner_meets_the_host_in_send_alone(device):
    with device.mode:
        decoder = CudaDecoder(
            SimpleNamespace(config=CONFIG), PROFILE, torch.bfloat16, DEVICE, True, device.capture, compiled=False
        )

    def step(*chunks, wanted=None):
        """Tensors that the host sent."""
        tokens = sum(chunk.length for chunk in chunks)
        inputs_embeds = device.empty((tokens, CONFIG.text.hidden_size), torch.bfloat16)
        positions, before = np.zeros((3, tokens), np.int64), device.sent
        position_ids = SimpleNamespace(shape=positions.shape, numpy=lambda: positions)  # a tensor would be made fake
        with device.running():
            found = decoder.step(chunks, inputs_embeds, position_ids, wanted, hidden=True)
        assert {x.device for x in (found.logits, found.hidden_states, found.greedy)} == {DEVICE}
        rows = len(chunks) if wanted is None else len(wanted)
        assert found.logits.shape == (rows, CONFIG.text.vocab_size)
        assert found.greedy.shape == (rows,)
        assert found.hidden_states.shape == inputs_embeds.shape
        return device.sent - before

    fused = decoder._steps._fused
    assert step(Chunk(0, 0, 300)) == 2, "numbers, and where logits are wanted"
    assert step(Chunk(0, 300, 17), wanted=[]) == 1
    assert step(Chunk(5, 40, 17), Chunk(0, 317, 1), Chunk(2, 0, 300), wanted=[1]) == 2
    assert device.captures == (2 if fused else 0)
    for written in range(3):
        answers = [Chunk(2, 10 + written, 1), Chunk(7, 200 + written, 1), Chunk(4, 30 + written, 1)]
        assert step(*answers) == 1, "positions, slot mapping, lengths and block table together"
        assert step(*answers, wanted=[0, 2]) == 2
    assert device.captures == (3 if fused else 1)
    with device.running():
        assert decoder.embed([1, 2, 3]).device == DEVICE
