"""Pinned buffers: what they hold, how they are reused, and the order of copies, reads and waits on (fake) streams."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_trt.runtime.preprocessing.staging import Staging, staged_bytes
from tests.support.pictures import in_form, noise

CPU = torch.device("cpu")


def brought(staging, tensors):
    with staging.slot(staged_bytes(tensors)) as slot:
        return [tensor.clone(memory_format=torch.preserve_format) for tensor in slot.to_device(tensors)]


class TestWhatArrives:
    """Values, shapes, and no more bytes than there are."""

    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def test_every_form(self, data):
        forms, side = st.sampled_from(["chw", "hwc", "crop"]), st.integers(1, 9)
        tensors = [
            in_form(noise(data.draw(side), data.draw(side), seed), data.draw(forms))
            for seed in range(data.draw(st.integers(0, 5)))
        ]
        tensors += [tensors[0].float() / 255, tensors[-1][:1].expand(3, -1, -1), torch.arange(7)] if tensors else []
        for expected, found in zip(tensors, brought(Staging(CPU), tensors), strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)

    def test_the_memorys_order_is_kept(self):
        """Transposing bytes on the host would take longer than everything else."""
        with Staging(CPU).slot(1 << 20) as slot:
            together, apart = slot.to_device([in_form(noise(5, 7), "hwc"), noise(5, 7)])
        assert together.stride() == (1, 21, 3)
        assert apart.stride() == (35, 7, 1)

    def test_grey_is_sent_once(self):
        grey = noise(64, 64)[:1].expand(3, -1, -1)
        assert staged_bytes([grey]) == 64 * 64
        with Staging(CPU).slot(staged_bytes([grey])) as slot:
            (found,) = slot.to_device([grey])
        assert found.stride() == (0, 64, 1)

    def test_a_tensor_given_twice_is_sent_once(self):
        image = noise(8, 8)
        with Staging(CPU).slot(1 << 20) as slot:
            first, other, second = slot.to_device([image, noise(8, 8, 1), image])
        assert first.data_ptr() == second.data_ptr() != other.data_ptr()

    def test_a_tensor_of_the_device_is_not_copied(self):
        """Here the device is one that a CPU has as well."""
        image = torch.empty(3, 4, 4, dtype=torch.uint8, device="meta")
        assert staged_bytes([image]) == 0
        with Staging(torch.device("meta")).slot(0) as slot:
            assert slot.to_device([image])[0] is image

    def test_several_sends_share_a_slot(self):
        with Staging(CPU).slot(staged_bytes([noise(5, 5), torch.arange(9)])) as slot:
            (image,) = slot.to_device([noise(5, 5)])
            (numbers,) = slot.to_device([torch.arange(9)])
            assert torch.equal(image, noise(5, 5))
            assert torch.equal(numbers, torch.arange(9))


class TestReuse:
    """Two slots in turn, memory within the limit."""

    def test_two_slots_in_turn(self):
        staging, addresses = Staging(CPU), []
        for _ in range(4):
            with staging.slot(1000) as slot:
                addresses.append(slot.to_device([noise(4, 4)])[0].data_ptr())
        assert addresses[:2] == addresses[2:]
        assert addresses[0] != addresses[1]

    def test_the_limit(self):
        staging = Staging(CPU, limit=10_000)
        kept = []
        for size in (4_000, 4_000, 6_000, 50_000, 100, 100):
            with staging.slot(size) as slot:
                assert slot.capacity >= size
                taken = slot.capacity
            kept.append(slot.capacity)
            assert kept[-1] == (taken if taken <= 10_000 else 0)
        assert max(kept) <= 10_000
        assert kept[3] == 0  # a frame larger than the limit leaves nothing behind
        assert kept[4] > 100  # the other slot keeps what it had


class FakeCuda:
    """Streams and events that note in which order things are asked of them."""

    def __init__(self, monkeypatch):
        self.log = []
        cuda = self

        class Event:
            def __init__(self, name):
                self.name = name

            def synchronize(self):
                cuda.log.append(f"host waits for {self.name}")

        class Stream:
            def __init__(self, name):
                self.name, self.events = name, 0

            def record_event(self):
                self.events += 1
                cuda.log.append(f"{self.name} records {self.name}{self.events}")
                return Event(f"{self.name}{self.events}")

            def wait_event(self, event):
                cuda.log.append(f"{self.name} waits for {event.name}")

        self.current, self.copies = Stream("current"), Stream("copies")
        monkeypatch.setattr(Staging, "stream", self.copies)
        monkeypatch.setattr(torch.cuda, "stream", self.switch)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: empty(*args, **options))

    @contextlib.contextmanager
    def switch(self, stream):
        self.log.append(f"on {stream.name}")
        yield


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


class TestOrder:
    """As CUDA would see it; the streams themselves are run in tests/gpu."""

    def test_copy_then_read_then_overwrite(self, cuda):
        staging, images = Staging(CPU), [noise(9, 9)]
        for _ in range(2):
            with staging.slot(1000) as slot:
                slot.to_device(images)
        cuda.log.clear()
        with staging.slot(1000) as slot:  # the first slot again
            assert cuda.log == ["host waits for copies1", "copies waits for current1"]
            found = slot.to_device(images)
            cuda.log.append("kernels")
        assert cuda.log[2:] == [
            "on copies",
            "copies records copies3",
            "current waits for copies3",
            "kernels",
            "current records current3",
        ]
        assert torch.equal(found[0], images[0])

    def test_what_is_there_needs_no_copy(self, cuda):
        staging = Staging(torch.device("meta"))
        with staging.slot(0) as slot:
            slot.to_device([torch.empty(3, 4, 4, dtype=torch.uint8, device="meta")])
        assert cuda.log == ["current records current1"]

    def test_pieces_leave_while_others_are_filled(self, cuda, monkeypatch):
        monkeypatch.setattr("qwen2vl_trt.runtime.preprocessing.staging._PIECE", 1000)
        images = [noise(20, 20, seed) for seed in range(5)]  # 1,200 bytes each
        staging = Staging(CPU)
        with staging.slot(staged_bytes(images)) as slot:
            slot._device = torch.zeros_like(slot._host)  # a twin of its own, as on a GPU
            cuda.log.clear()
            found = slot.to_device(images)
        assert cuda.log.count("on copies") == 5
        assert all(torch.equal(image, there) for image, there in zip(images, found, strict=True))
