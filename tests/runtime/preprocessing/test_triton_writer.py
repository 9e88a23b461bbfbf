"""Triton's kernels, run on the CPU by its interpreter and compiled for GPUs that are not there.

Where there is a GPU, tests/gpu/test_preprocessor.py runs them compiled.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from qwen2vl_trt.errors import EngineError, MissingDependencyError
from qwen2vl_trt.runtime.preprocessing import preprocessor as module
from qwen2vl_trt.runtime.preprocessing import triton_writer
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor
from qwen2vl_trt.runtime.preprocessing.settings import PixelSettings, PreprocessorSettings
from qwen2vl_trt.runtime.preprocessing.staging import Slot, Staging
from qwen2vl_trt.runtime.preprocessing.torch_writer import TorchWriter
from qwen2vl_trt.runtime.preprocessing.triton_writer import Tiles, TritonWriter
from tests.support.pictures import CONFIG, TINY, TINY_SETTINGS, in_form, merge_order, mixes, natural, noise
from tests.support.triton_kernels import CAPABILITIES, compiled, installed, interpreted

CPU = torch.device("cpu")


def preprocessor(config=CONFIG, settings=None, dtype=torch.float32, limit=1 << 28, tiles=None):
    staging = Staging(CPU, limit)
    result = Preprocessor(config, settings, dtype=dtype)
    # Few programs and little padding: the interpreter takes milliseconds for each, however small.
    tiles = tiles or (Tiles(64, 32, 1024) if config is TINY else Tiles(128, 256, 1 << 16))
    result._writer = TritonWriter(config, staging, TorchWriter(config, staging), tiles)
    return result


@interpreted
class TestInterpreted:
    """The same patches as the CPU's own way, bit for bit."""

    @settings(max_examples=15, deadline=None)
    @given(mixes(), st.sampled_from([torch.float32, torch.bfloat16]))
    def test_mixes(self, mix, dtype):
        expected = Preprocessor(TINY, TINY_SETTINGS, dtype=dtype).preprocess(mix.images, mix.videos).pixel_values
        memory = torch.full((expected.numel(),), torch.nan, dtype=dtype)
        packed = preprocessor(TINY, TINY_SETTINGS, dtype).preprocess(mix.images, mix.videos, out=memory)
        assert packed.pixel_values.data_ptr() == memory.data_ptr()
        assert torch.equal(packed.pixel_values, expected)

    def test_as_transformers(self):
        sizes = [(333, 71), (112, 140), (20, 20), (1, 200), (150, 164)]
        images = [natural(*size, seed) for seed, size in enumerate(sizes)]
        expected = Qwen2VLImageProcessor()(images=images, return_tensors="pt")["pixel_values"]
        assert torch.equal(merge_order(preprocessor().preprocess(images)), expected)

    def test_4k(self):
        images = [natural(2160, 3840), natural(30, 40)]
        small = PreprocessorSettings(image=PixelSettings(max_pixels=28 * 28 * 16))
        expected = Preprocessor(CONFIG, small).preprocess(images).pixel_values
        assert torch.equal(preprocessor(settings=small).preprocess(images).pixel_values, expected)

    @pytest.mark.parametrize("tiles", [Tiles(1, 16, 256), Tiles(2, 64, 512), Tiles(8, 32, 1 << 13)])
    def test_tiles_change_nothing(self, tiles):
        images = [natural(17, 31), in_form(natural(20, 20), "hwc"), natural(9, 12)]
        small = PreprocessorSettings(image=PixelSettings(60, 300))
        expected = Preprocessor(TINY, small).preprocess(images).pixel_values
        assert torch.equal(preprocessor(TINY, small, tiles=tiles).preprocess(images).pixel_values, expected)

    @pytest.mark.parametrize("form", ["hwc", "grey", "crop"])
    def test_images_of_the_device_are_read_where_they_are(self, form, monkeypatch):
        """Of any strides: nothing gathers them first."""
        images = [in_form(natural(70, 50), form), in_form(natural(32, 64), form)]
        expected = Preprocessor(TINY, TINY_SETTINGS).preprocess(images).pixel_values
        monkeypatch.setattr(Slot, "to_device", lambda slot, tensors: list(tensors))
        assert torch.equal(preprocessor(TINY, TINY_SETTINGS).preprocess(images).pixel_values, expected)

    def test_floats_among_them(self):
        images = [natural(37, 91), torch.rand(3, 50, 60), natural(32, 32)]
        expected = Preprocessor(TINY, TINY_SETTINGS).preprocess(images).pixel_values
        assert torch.equal(preprocessor(TINY, TINY_SETTINGS).preprocess(images).pixel_values, expected)

    @pytest.mark.parametrize(("limit", "most", "parts"), [(1 << 28, 128, 1), (1, 128, 9), (1 << 28, 4, 3)])
    def test_launches(self, limit, most, parts, monkeypatch):
        """Two for a batch of mixed sizes, unless memory or the number of frames takes several."""
        images = [noise(4 + 4 * (i % 3), 5 + i % 7, i) for i in range(9)]
        small = PreprocessorSettings(image=PixelSettings(16, 64))
        expected = Preprocessor(TINY, small).preprocess(images).pixel_values
        monkeypatch.setattr(triton_writer, "_MAX_FRAMES", most)
        launches = []
        launch = triton_writer.TritonBatch.fill_records
        monkeypatch.setattr(
            triton_writer.TritonBatch, "fill_records", lambda *arguments: (launches.append(1), launch(*arguments))
        )
        found = preprocessor(TINY, small, limit=limit).preprocess(images).pixel_values
        assert torch.equal(found, expected)
        assert len(launches) == parts

    def test_no_horizontal_pass_where_every_width_fits(self, monkeypatch):
        images = [natural(50, 40), natural(40, 40)]
        settings = PreprocessorSettings(image=PixelSettings(16, 10**4))
        expected = Preprocessor(TINY, settings).preprocess(images).pixel_values
        kernels = preprocessor(TINY)._writer._kernels
        monkeypatch.setattr(kernels, "resize_rows", None)
        assert torch.equal(preprocessor(TINY, settings).preprocess(images).pixel_values, expected)

    def test_warm_up(self):
        preprocessor(TINY)._writer.warm_up(CPU, torch.bfloat16)


KERNELS = """
from qwen2vl_trt.runtime.preprocessing import triton_kernels as module
from qwen2vl_trt.runtime.preprocessing.triton_writer import Tiles, _MAX_FRAMES

def kernels():
    tiles, pointers = Tiles(), {"records": "*i64", "starts": "*i32", "tables": "*i32"}
    sizes = {"TILE_ROWS": tiles.rows, "TILE_COLUMNS": tiles.columns, "FRAMES": _MAX_FRAMES}
    yield module.resize_rows, pointers | {"count": "i32"}, sizes, 4
    sizes = {"PATCH": 14, "TIMES": 2, "MERGE": 2, "SIDE": 4, "BLOCK": tiles.block, "FRAMES": _MAX_FRAMES}
    for bits in ("*i16", "*i32"):
        yield module.write_windows, pointers | {"levels": bits, "output": bits, "count": "i32"}, sizes, 4
"""


@installed
def test_compiles_from_ampere_to_blackwell_without_spills(tmp_path):
    """To machine code, by the assembler that Triton brings."""
    kernels = compiled(KERNELS, tmp_path)
    assert len(kernels) == 3 * 2 * len(CAPABILITIES)
    for kernel, used in kernels.items():
        assert used["STACK"] == used["LOCAL"] == 0, kernel  # what does not fit the registers lies there
        assert used["REG"] <= 128, kernel  # four programs of four warps on a multiprocessor at least


class TestChoice:
    """Which writer a GPU gets. The device is named only: nothing runs on it."""

    @pytest.fixture(autouse=True)
    def no_device(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device", lambda device: module.nullcontext())

    def writer(self, **options):
        return Preprocessor(CONFIG, device="cuda:0", **options)._writer

    def test_a_cpu_has_its_own(self):
        assert type(Preprocessor(CONFIG, kernels="torch")._writer) is module.CpuWriter

    def test_torch_on_request(self):
        assert type(self.writer(kernels="torch")) is TorchWriter

    def test_torch_where_triton_is_missing(self, monkeypatch, caplog):
        for place in (module, triton_writer):
            monkeypatch.setattr(place, "triton_is_installed", lambda: False)
        assert type(self.writer()) is TorchWriter
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "Triton is not installed; PyTorch preprocesses" in record.message
        with pytest.raises(MissingDependencyError, match="pip install triton"):
            self.writer(kernels="triton")

    @installed
    def test_triton_where_it_compiles(self, monkeypatch):
        monkeypatch.setattr(TritonWriter, "warm_up", lambda *arguments: None)
        assert type(self.writer()) is TritonWriter

    @installed
    def test_torch_where_it_does_not(self, monkeypatch, caplog):
        def fail(*arguments):
            raise RuntimeError("Failed to find C compiler.\nDetails")

        monkeypatch.setattr(TritonWriter, "warm_up", fail)
        assert type(self.writer()) is TorchWriter
        assert [record.getMessage() for record in caplog.records] == [
            "Triton cannot compile for this GPU (Failed to find C compiler.);"
            " PyTorch preprocesses instead, in many kernels"
        ]
        with pytest.raises(EngineError, match="Failed to find C compiler"):
            self.writer(kernels="triton")
