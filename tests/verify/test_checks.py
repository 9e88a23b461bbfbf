"""What the checks hold against what: each passes here, on a GPU too where there is one, and fails over damage."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from qwen2vl_trt import ops, varlen
from qwen2vl_trt.benchmarks.roofline import Rates
from qwen2vl_trt.engines.backends import Backend
from qwen2vl_trt.engines.precision import BF16
from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.runtime.backends.torch_attention import PageCache
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor
from qwen2vl_trt.verify import agreement, environment, kernels, speed
from qwen2vl_trt.verify.finding import equal, within
from tests.accuracy.damaged import damage
from tests.support import varlen_reference

PLACES = [
    torch.device("cpu"),
    pytest.param(
        torch.device("cuda", 0),
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
    ),
]
CPU = PLACES[0]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Folders of the tiny model in FP32, by backend; do not write into them."""
    root = tmp_path_factory.mktemp("verify")
    for backend in ("torch", "onnxruntime"):
        assert agreement.build_tiny(backend, "fp32", root / backend, 4).result == "passed"
    return root


@pytest.mark.parametrize("device", PLACES, ids=str)
class TestHere:
    @pytest.mark.parametrize("check", [kernels.fused_attention, kernels.fp8_products, kernels.preprocessor])
    def test_kernels(self, check, device):
        assert check(device).result == "passed"

    @pytest.mark.parametrize("check", [kernels.decode_graphs, kernels.overlap])
    def test_engines(self, engines, check, device):
        found = check(engines / "torch", device)
        assert (found.result, found.value, found.unit) == ("passed", 6, "of 6 answers equal")


def test_attention_that_sees_one_key_too_many(monkeypatch):
    attend = PageCache._attend_tokens
    longer = lambda self, q: attend(self._replace(step=replace(self.step, lengths=self.step.lengths + 1)), q)  # noqa: E731
    monkeypatch.setattr(PageCache, "_attend_tokens", longer)
    found = kernels.fused_attention(CPU)
    assert (found.result, found.words) == ("failed", "scaled dot product, FP32, more than 1e-05")


class TestFlashAttention:
    """What a GPU runs, over what stands for the kernel."""

    def test_right(self, monkeypatch):
        monkeypatch.setattr(varlen, "flash_attention", varlen_reference.flash_attention)
        found = kernels.fused_attention(CPU, flash=True)
        assert (found.result, found.words) == ("passed", "FlashAttention, BF16")
        assert 0 < found.value < 2e-2

    @pytest.mark.parametrize("call", ["packed", "chunk", "decode"])
    def test_wrong_in_one_of_its_uses(self, monkeypatch, call):
        def flash(q, k, v, cu_seqlens, max_seqlen, causal=False, lengths=None, block_table=None):
            out = varlen_reference.flash_attention(q, k, v, cu_seqlens, max_seqlen, causal, lengths, block_table)
            used = "packed" if not causal else "chunk" if max_seqlen[0] > 1 else "decode"
            return out * 1.1 if used == call else out

        monkeypatch.setattr(varlen, "flash_attention", flash)
        assert kernels.fused_attention(CPU, flash=True).result == "failed"


def test_fp8_products_with_a_wrong_scale(monkeypatch):
    rescale = ops.rescale
    monkeypatch.setattr(ops, "rescale", lambda y, scale, bias: rescale(y, scale * 1.1, bias))
    assert kernels.fp8_products(CPU).result == "failed"


def test_a_preprocessor_that_is_off_by_a_bit(monkeypatch):
    preprocess = Preprocessor.preprocess

    def wrong(self, images):
        packed = preprocess(self, images)
        if len(images) > 1:
            packed.pixel_values[0, 0, 0] += 1e-6
        return packed

    monkeypatch.setattr(Preprocessor, "preprocess", wrong)
    assert kernels.preprocessor(CPU).result == "failed"


def test_decode_steps_with_other_weights(engines, monkeypatch):
    load = kernels._EagerTorch.load_decoder

    def wrong(self, opened):
        decoder = load(self, opened)
        decoder.module.lm_head.weight.data.neg_()
        return decoder

    monkeypatch.setattr(kernels._EagerTorch, "load_decoder", wrong)
    assert kernels.decode_graphs(engines / "torch", CPU).result == "failed"


def test_verdicts():
    assert within(0.1, 0.1, "x", "").result == "passed"
    assert within(math.nan, 0.1, "x", "").result == "failed"
    assert equal([[1], [2]], [[1], [3]], "x") == kernels.Finding("failed", "x", 1, "of 2 answers equal")


INSTALLED = agreement.COMPARING


@pytest.mark.parametrize("compared", [INSTALLED, ("no_such_package",)], ids=["transformers", "torch"])
class TestAccuracy:
    """With the extra ``compare`` and without."""

    @pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
    def test_engines_that_are_right(self, engines, monkeypatch, compared, backend):
        monkeypatch.setattr(agreement, "COMPARING", compared)
        found = agreement.compare_tiny(engines / backend, "cpu")
        assert found.result == "passed"
        assert found.words.endswith("Transformers FP32" if compared == INSTALLED else "the torch backend in FP32")
        assert 0 <= found.value < 1e-5

    def test_engines_with_a_wrong_block(self, engines, monkeypatch, compared, tmp_path):
        monkeypatch.setattr(agreement, "COMPARING", compared)
        wrong = damage(engines / "onnxruntime", tmp_path / "wrong", "vision", "blocks.1")
        found = agreement.compare_tiny(wrong, "cpu")
        assert found.result == "failed"
        assert found.words.startswith("image_embeds: maximum relative error ")


class TestBackends:
    def test_one_that_runs_is_tried_in_the_precisions_that_matter(self):
        version, device, precisions = environment.where_it_runs("onnxruntime", "cpu")
        assert (device, precisions) == ("cpu", ["fp32"])
        assert version[0].isdecimal()

    def test_one_for_gpus_is_skipped_without(self):
        found = environment.where_it_runs("tensorrt-rtx", "cpu")
        assert (found.result, found.words) == ("skipped", "runs on GPUs alone")

    def test_one_that_is_not_installed_is_skipped(self, monkeypatch):
        monkeypatch.setattr(environment, "find_spec", lambda name: None)
        found = environment.where_it_runs("tensorrt", "cuda")
        assert (found.result, found.words) == ("skipped", "tensorrt is not installed")

    def test_one_that_is_broken_fails(self, monkeypatch):
        def old(self):
            raise EngineError("it is too old")

        monkeypatch.setattr(Backend, "load", old)
        found = environment.where_it_runs("onnxruntime", "cpu")
        assert (found.result, found.words) == ("failed", "it is too old")


class TestGpus:
    """What torch sees beside what the driver's tool lists."""

    LISTED: ClassVar = {"gpus": [], "nvidia_smi": ["NVIDIA L4, 23034 MiB, 8.9, 580.1"], "torch": "2.13.0"}

    def test_none(self):
        assert environment.gpu({"gpus": [], "nvidia_smi": []}, wanted=True).result == "skipped"

    @pytest.mark.parametrize(
        ("cuda", "why"), [(None, "torch 2.13.0 is for CPUs: install one for CUDA"), ("13.0", "is the driver too old")]
    )
    def test_one_that_torch_does_not_see(self, cuda, why):
        found = environment.gpu(self.LISTED | {"torch_cuda": cuda}, wanted=True)
        assert found.result == "failed"
        assert found.words.startswith("nvidia-smi lists NVIDIA L4, 23034 MiB, 8.9, 580.1; torch 2.13.0")
        assert why in found.words

    def test_one_that_nobody_asked_for(self):
        assert environment.gpu(self.LISTED, wanted=False).result == "skipped"

    def test_one_that_torch_sees(self):
        gpu = {"name": "NVIDIA L4", "memory_bytes": 24e9, "compute_capability": "8.9"}
        found = environment.gpu({"gpus": [gpu]}, wanted=True)
        assert (found.result, found.words) == ("passed", "1 x NVIDIA L4, compute capability 8.9")
        assert (found.value, found.unit) == (24, "GB")


class TestDepth:
    """Of a random model, on a GPU with an H200's rates and 8 cores beside it."""

    RATES = Rates(copy=4.3e12, read={1 << 30: 4.3e12}, gemm=790e12, fp8_gemm=None)
    GB = 1e9

    @pytest.fixture
    def deepest(self, monkeypatch, tmp_path):
        monkeypatch.setattr(speed.os, "cpu_count", lambda: 8)
        monkeypatch.setattr(speed.shutil, "disk_usage", lambda root: SimpleNamespace(free=1e12))

        def deepest(seconds, memory, plans=False):
            name = "Qwen2.5-VL-3B"
            model = speed.deepest(name, BF16, plans, True, self.RATES, seconds, memory, tmp_path)
            return model.words if isinstance(model, kernels.Finding) else model.label

        return deepest

    def test_what_the_memory_holds(self, deepest):
        assert deepest(200, 140 * self.GB) == "3B"
        assert deepest(200, 16 * self.GB) == "3B, 8 layers"
        assert deepest(200, 4 * self.GB) == "3B, 2 layers"
        assert deepest(200, 1 * self.GB) == speed.NO_ROOM

    def test_what_the_time_allows(self, deepest):
        assert deepest(30, 140 * self.GB) == "3B, 8 layers"
        assert deepest(14, 140 * self.GB) == "3B, 2 layers"
        assert deepest(5, 140 * self.GB) == "no time left"
        assert deepest(200, 140 * self.GB, plans=True) == "3B, 8 layers"

    def test_what_the_disk_holds(self, deepest, monkeypatch):
        monkeypatch.setattr(speed.shutil, "disk_usage", lambda root: SimpleNamespace(free=3 * self.GB))
        assert deepest(200, 140 * self.GB) == "3B, 2 layers"
