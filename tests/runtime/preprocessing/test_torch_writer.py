"""What CUDA does without Triton, here on the CPU: the same bytes as the CPU's own way."""

from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from qwen2vl_trt.runtime.preprocessing import frames, torch_writer
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor
from qwen2vl_trt.runtime.preprocessing.staging import Staging
from qwen2vl_trt.runtime.preprocessing.torch_writer import TorchWriter
from tests.support.pictures import CONFIG, TINY, TINY_SETTINGS, in_form, merge_order, mixes, natural, noise

CPU = torch.device("cpu")
HD, UHD = (1080, 1920), (2160, 3840)


def preprocessor(config=CONFIG, settings=None, dtype=torch.float32, limit=1 << 28):
    result = Preprocessor(config, settings, dtype=dtype)
    result._writer = TorchWriter(config, Staging(CPU, limit))
    return result


class TestResize:
    """Whole numbers against PyTorch's CPU kernel, which Transformers reaches by way of torchvision."""

    sides = st.one_of(st.integers(1, 60), st.integers(61, 1500))

    @settings(max_examples=150, deadline=None)
    @given(st.tuples(sides, sides), st.tuples(st.integers(4, 700), st.integers(4, 700)), st.booleans())
    @example((1, 1), (28, 28), False)
    @example((1, 200), (28, 3136), False)
    @example((3000, 1), (700, 2), True)
    @example(HD, (728, 1316), True)
    @example((448, 448), (448, 447), True)
    def test_equals_the_cpu_bit_for_bit(self, source, size, together):
        image = in_form(noise(*source), "hwc" if together else "chw")  # noise reaches both ends of the range
        expected = frames.resize(image, size)
        assert torch.equal(torch_writer.resize(image[None], size)[0], expected)

    def test_4k(self):
        image = natural(*UHD)
        size = (756, 1344)
        assert torch.equal(torch_writer.resize(image[None], size)[0], frames.resize(image, size))

    def test_both_ends_are_reached(self):
        """Overshoot beyond 0 and 255 is cut, as it is there."""
        image = (noise(40, 40) > 127).to(torch.uint8) * 255
        found = torch_writer.resize(image[None], (90, 130))[0]
        assert torch.equal(found, frames.resize(image, (90, 130)))
        assert {0, 255} <= set(found.flatten().tolist())

    @pytest.mark.parametrize("size", [(333, 271), (613, 400)])
    def test_floats_as_transformers(self, size):
        image = natural(*size).float() / 255
        assert torch.equal(torch_writer.resize(image[None], (280, 252))[0], frames.resize(image, (280, 252)))


class TestPatches:
    """Whole batches."""

    @settings(max_examples=60, deadline=None)
    @given(mixes(), st.sampled_from([torch.float32, torch.bfloat16]))
    def test_equal_the_cpus(self, mix, dtype):
        expected = Preprocessor(TINY, TINY_SETTINGS, dtype=dtype).preprocess(mix.images, mix.videos).pixel_values
        memory = torch.full((expected.numel(),), torch.nan, dtype=dtype)
        packed = preprocessor(TINY, TINY_SETTINGS, dtype).preprocess(mix.images, mix.videos, out=memory)
        assert packed.pixel_values.data_ptr() == memory.data_ptr()
        assert torch.equal(packed.pixel_values, expected)

    @pytest.mark.parametrize("chunk", [1, 1 << 28])
    @pytest.mark.parametrize("limit", [1, 1 << 28])
    def test_alike_frames_go_together_wherever_they_stand(self, chunk, limit, monkeypatch):
        sizes = [(140, 252), (56, 56), (140, 252), (28, 112), (224, 224)]
        images = [natural(*size, seed) for seed, size in enumerate(sizes)] + [torch.rand(3, 56, 56)]
        clips = [[natural(280, 364, seed) for seed in range(count)] for count in (4, 1, 3)]
        expected = Preprocessor(CONFIG).preprocess(images, clips).pixel_values
        monkeypatch.setattr(torch_writer, "_CHUNK", chunk)
        assert torch.equal(preprocessor(limit=limit).preprocess(images, clips).pixel_values, expected)

    def test_as_transformers(self):
        images = [natural(*size, seed) for seed, size in enumerate([(333, 71), (112, 140), (613, 847), (20, 20)])]
        expected = Qwen2VLImageProcessor()(images=images, return_tensors="pt")["pixel_values"]
        assert torch.equal(merge_order(preprocessor().preprocess(images)), expected)

    def test_the_number_of_operations_does_not_grow_with_the_images(self):
        def operations(count):
            images = [natural(90, 130, seed) for seed in range(count)] + [natural(112, 112)] * count
            with Calls() as calls:
                preprocessor().preprocess(images)
            work = ("aten::copy_", "aten::index_select", "aten::addcmul_", "aten::index_copy_", "aten::div_")
            return sum(calls.counts[name] for name in work)

        assert operations(8) == operations(2) > 0


class Calls(TorchDispatchMode):
    """Counts PyTorch's operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.counts[function._schema.name] += 1
        return function(*arguments, **(named or {}))
