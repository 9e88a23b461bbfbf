"""The preprocessor on CUDA: the CPU's patches bit for bit, on real streams, without waiting. Skipped without a GPU."""

import gc
import importlib.util
import io

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen2vl_trt.runtime.inputs.images import load_image
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor
from qwen2vl_trt.runtime.preprocessing.triton_writer import TritonWriter, triton_is_installed
from tests.support.pictures import CONFIG, TINY, TINY_SETTINGS, in_form, mixes, natural
from tests.support.thorough import often

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

SIZES = [(448, 448), (613, 847), (1, 200), (1080, 1920), (56, 84), (300, 64), (20, 20), (112, 1130)]


@pytest.fixture(
    params=[
        pytest.param(
            "triton", marks=pytest.mark.skipif(not triton_is_installed(), reason="Triton is not installed here")
        ),
        "torch",
    ]
)
def kernels(request):
    return request.param


def pictures(seed=0):
    forms = ("chw", "hwc", "grey", "crop")
    return [in_form(natural(*size, seed + i), forms[i % 4]) for i, size in enumerate(SIZES)]


def events_of(call):
    """What the GPU did in a call: names of kernels and copies. Skips where the profiler sees nothing of it."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    events = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not any(_is_kernel(name) for name in events):
        pytest.skip("PyTorch's profiler sees no kernels here (CUPTI)")
    return events


def _is_kernel(name):
    """Not a copy, a fill, or the profiler's own work."""
    return not name.startswith(("Memcpy", "Memset", "Activity Buffer", "Lazy Function"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestEqualsTheCpu:
    """Bit for bit from 8-bit pixels."""

    @settings(max_examples=often(20, 200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(mixes(), st.booleans())
    def test_mixes(self, kernels, dtype, mix, on_gpu):
        expected = Preprocessor(TINY, TINY_SETTINGS, dtype=dtype).preprocess(mix.images, mix.videos).pixel_values
        images = [image.cuda() for image in mix.images] if on_gpu else mix.images
        preprocessor = Preprocessor(TINY, TINY_SETTINGS, "cuda", dtype, kernels=kernels)
        memory = torch.full((expected.numel(),), torch.nan, dtype=dtype, device="cuda")
        packed = preprocessor.preprocess(images, mix.videos, out=memory)
        assert packed.pixel_values.data_ptr() == memory.data_ptr()
        assert torch.equal(packed.pixel_values.cpu(), expected)

    @pytest.mark.parametrize("limit", [1 << 20, 1 << 28])
    def test_real_sizes(self, kernels, dtype, limit):
        images, clip = [*pictures(), natural(2160, 3840)], [natural(360, 640, seed) for seed in range(5)]
        expected = Preprocessor(CONFIG, dtype=dtype).preprocess(images, [clip]).pixel_values
        preprocessor = Preprocessor(CONFIG, None, "cuda", dtype, kernels=kernels, memory_limit=limit)
        for _ in range(3):
            found = preprocessor.preprocess(images, [clip]).pixel_values
            assert found.is_cuda
            assert torch.equal(found.cpu(), expected)

    def test_floats_differ_by_rounding_alone(self, kernels, dtype):
        """PyTorch's kernels for floats sum in another order on CUDA."""
        images = [natural(333, 71).float() / 255, natural(112, 112), natural(90, 130).float() / 255]
        expected = Preprocessor(CONFIG, dtype=dtype).preprocess(images).pixel_values
        found = Preprocessor(CONFIG, None, "cuda", dtype, kernels=kernels).preprocess([i.cuda() for i in images])
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.pixel_values.cpu(), expected, rtol=0, atol=tolerance)


def test_triton_is_what_auto_means(kernels):
    if kernels == "triton":
        assert type(Preprocessor(CONFIG, device="cuda")._writer) is TritonWriter


class TestWithoutWaiting:
    """Streams and buffers."""

    def test_no_synchronisation(self, kernels):
        preprocessor = Preprocessor(CONFIG, None, "cuda", torch.bfloat16, kernels=kernels)
        images = [*pictures(), *(image.cuda() for image in pictures(9))]
        for _ in range(2):
            preprocessor.preprocess(images)
        torch.cuda.set_sync_debug_mode("error")
        try:
            preprocessor.preprocess(images)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_it_returns_while_the_gpu_is_busy(self, kernels):
        preprocessor = Preprocessor(CONFIG, None, "cuda", torch.bfloat16, kernels=kernels)
        batches = [pictures(seed) for seed in (0, 50)]  # which takes as long as the GPU is busy
        expected = [preprocessor.preprocess(batch).pixel_values.clone() for batch in batches]
        torch.cuda.synchronize()
        torch.cuda._sleep(4_000_000_000)  # cycles: some two seconds
        slept = torch.cuda.current_stream().record_event()
        found = [preprocessor.preprocess(batch).pixel_values for batch in batches]
        assert not slept.query()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)

    def test_buffers_are_not_overwritten_while_they_are_read(self, kernels):
        """Many batches ahead of the GPU, more than there are slots, on two streams of kernels."""
        host, preprocessor = (
            Preprocessor(CONFIG),
            Preprocessor(CONFIG, None, "cuda", kernels=kernels, memory_limit=1 << 22),
        )
        batches = [pictures(100 * number)[number % 3 :] for number in range(12)]
        streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
        found = []
        for number, batch in enumerate(batches):
            with torch.cuda.stream(streams[number % 2]):
                torch.cuda._sleep(20_000_000)
                found.append(preprocessor.preprocess(batch).pixel_values)
        torch.cuda.synchronize()
        for batch, pixels in zip(batches, found, strict=True):
            assert torch.equal(pixels.cpu(), host.preprocess(batch).pixel_values)

    def test_nothing_comes_back_and_host_pixels_go_once(self, kernels):
        preprocessor = Preprocessor(CONFIG, None, "cuda", torch.bfloat16, kernels=kernels)
        there, here = [image.cuda() for image in pictures()], pictures()
        for images in (there, here):
            preprocessor.preprocess(images)
            events = events_of(lambda images=images: preprocessor.preprocess(images))
            assert not any("DtoH" in name for name in events)
        if kernels == "triton":
            sent = [name for name in events if "HtoD" in name]
            assert len(sent) <= 3  # the pixels in pieces of 8 MB, then what describes them

    def test_two_launches(self):
        if not triton_is_installed():
            pytest.skip("Triton is not installed here")
        preprocessor = Preprocessor(CONFIG, None, "cuda", torch.bfloat16, kernels="triton")
        images = [image.cuda() for image in pictures()] * 4
        preprocessor.preprocess(images)
        events = events_of(lambda: preprocessor.preprocess(images))
        kernels = [name for name in events if _is_kernel(name)]
        assert ["resize_rows" in name for name in kernels] == [True, False], kernels
        assert ["write_windows" in name for name in kernels] == [False, True]
        assert sum("HtoD" in name for name in events) <= 2  # what describes the images

    def test_memory_stays(self, kernels):
        limit, slack = 1 << 24, 1 << 23  # PyTorch's allocator leaves up to 1 MB of a block unsplit, in each of several
        gc.collect()
        before = torch.cuda.memory_allocated()  # by other tests
        preprocessor = Preprocessor(CONFIG, None, "cuda", kernels=kernels, memory_limit=limit)
        memory = torch.empty(10**8, device="cuda")
        held = []
        for seed in range(6):
            preprocessor.preprocess([*pictures(seed), natural(2160, 3840, seed)], out=memory)
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated() - before)
        assert held[-1] <= held[1] + slack
        assert held[-1] - memory.nbytes <= 2 * limit + slack


@pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.nvimgcodec") is None,
    reason="nvImageCodec is not installed here",
)
class TestJpegFiles:
    """Decoded on the GPU: near to Pillow's pixels, not equal."""

    @pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
    @pytest.mark.parametrize("orientation", [1, 6])
    def test_near_to_pillow(self, subsampling, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files = []
        for size in ((448, 448), (333, 271)):
            buffer = io.BytesIO()
            smooth = Image.fromarray(natural(*size).permute(1, 2, 0).numpy()).resize(size[::-1])
            smooth.save(buffer, "JPEG", quality=90, subsampling=subsampling, exif=exif)
            files.append(buffer.getvalue())
        images = Preprocessor(CONFIG, device="cuda", decode="gpu").load_images(files, ["image 1", "image 2"])
        for file, image in zip(files, images, strict=True):
            expected = load_image(file)
            assert image.is_cuda
            assert image.shape == expected.shape
            assert np.abs(image.cpu().numpy().astype(int) - expected.numpy()).mean() < 2
