"""How often the host waits for the device in a decode step: once, for the tokens."""

import pytest
import torch

from qwen2vl_trt.runtime.backends.runners import Step
from qwen2vl_trt.runtime.request import Output
from qwen2vl_trt.runtime.sampling_params import Sampling
from qwen2vl_trt.runtime.scheduling.scheduler import Scheduler
from qwen2vl_trt.transfer import to_device
from tests.support.device_tensors import META, DeviceTensor, Synchronisations, pin
from tests.support.fake_decoder import FakeDecoder, expected, sequence

SAMPLINGS = {
    "greedy": {},
    "penalised": {"repetition_penalty": 1.5},
    "counted": {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    "drawn": {"temperature": 0.8},
    "top-k": {"temperature": 0.8, "top_k": 5},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "min-p": {"temperature": 0.8, "min_p": 0.1},
    "all": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
}


@pytest.fixture
def device(monkeypatch):
    """A mode that counts; enter it where the device is used."""
    mode = Synchronisations()
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin(mode))
    return mode


class DeviceDecoder(FakeDecoder):
    """The fake decoder, whose embeddings and logits lie on the device; its own work does not count."""

    def embed(self, token_ids):
        if isinstance(token_ids, DeviceTensor):
            return token_ids.float()[:, None]
        return to_device(token_ids, META, torch.float32)[:, None]

    def step(self, chunks, inputs_embeds, position_ids, wanted=None, hidden=False):
        assert isinstance(inputs_embeds, DeviceTensor)
        assert not isinstance(position_ids, DeviceTensor)  # a runner that reads them would wait
        with torch.utils._python_dispatch._disable_current_modes():
            step = super().step(chunks, inputs_embeds.held, position_ids, wanted, hidden)
        return Step(DeviceTensor(step.logits), None)


def on_device(prompt, params):
    item = sequence(prompt, params=params, output=Output())
    item.inputs_embeds = DeviceTensor(item.inputs_embeds)
    return item


@pytest.mark.parametrize("kinds", [[kind] for kind in SAMPLINGS] + [list(SAMPLINGS)])
@pytest.mark.parametrize("gap", [False, True])
def test_one_a_decode_step(device, kinds, gap):
    with device:
        scheduler, items = Scheduler(DeviceDecoder(8), 64), []
        for number, kind in enumerate([*kinds, *kinds]):
            params = Sampling(30, seed=number, **SAMPLINGS[kind])
            items.append(on_device([1 + number, 2, 3], params))
        for item in items[:8]:
            scheduler.add(item)
        while not all(item.sampled or item.output.finished for item in items[:8]):
            scheduler.step()
        if gap and len(items) > 2:  # a row between the running ones that is nobody's
            scheduler.cancel(items[1].output)
        device.seen.clear()
        for steps in range(1, 6):
            assert len(scheduler.step()) >= 1
            assert len(device.seen) == steps, device.seen


def test_a_prompt_waits_once_for_its_first_token(device):
    with device:
        scheduler = Scheduler(DeviceDecoder(2), 4)
        item = on_device([1, 2, 3, 4, 5, 6], Sampling(5))
        scheduler.add(item)
        device.seen.clear()
        scheduler.step()
        assert device.seen == []  # a chunk that is not the last
        scheduler.step()
        assert len(device.seen) == 1
        while scheduler.busy:
            scheduler.step()
    assert item.output.token_ids == expected([1, 2, 3, 4, 5, 6], 5)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: int(x[0]),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=False),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x[[0, 1]],
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.tensor([1, 2]).to(x.device),
        lambda x: torch.tensor([1, 2]).to(x.device, non_blocking=True),  # from memory that is not pinned
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.new_tensor([1]),
        lambda x: torch.equal(x, x),
    ],
)
def test_whatever_makes_the_host_wait_is_counted(device, read):
    """Each of these makes the host wait on CUDA: the count above fails where one is added."""
    with device:
        x = DeviceTensor(torch.arange(3.0))
        read(x)
        assert len(device.seen) >= 1


def test_what_does_not_count(device):
    with device:
        x = DeviceTensor(torch.arange(3.0))
        y = to_device([0, 2], META)
        (x + 1).argmax()
        x[y].softmax(-1).cumsum(-1)
        x.clone().index_copy_(0, y, x[y])
        torch.zeros(3, device=META) + x
        assert device.seen == []
