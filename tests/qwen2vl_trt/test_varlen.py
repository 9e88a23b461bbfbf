"""Varlen attention with a stand-in for the CUDA kernel: what it is asked, and that a wrong kernel is found out."""

import pytest
import torch
import torch.nn.functional as F

from qwen2vl_trt import varlen
from qwen2vl_trt.windows import PackedSequences
from tests import varlen_reference

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget():
    for question in (varlen.can_pack, varlen.can_read_cache):
        question.cache_clear()
    yield
    for question in (varlen.can_pack, varlen.can_read_cache):
        question.cache_clear()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_bounds():
    packed = PackedSequences.of(torch.tensor([4, 64, 16]))
    assert packed.bounds.tolist() == [0, 4, 68, 84]
    assert packed.bounds.dtype == torch.int32
    assert packed.longest == 64


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (3, 3)])
def test_a_cache_is_read_through_its_strides(monkeypatch, heads, kv_heads):
    monkeypatch.setattr(varlen, "kernel", lambda: varlen_reference.varlen_attn)
    q, k, v = noise(3, heads, 16), noise(3, kv_heads, 10, 16), noise(4, kv_heads, 10, 16)[1:]
    k[1, :, 4:] = torch.nan  # not to be read
    lengths = torch.tensor([10, 4, 1], dtype=torch.int32)
    found = varlen.cached_attention(q, k, v, lengths, 10)
    for row, length in enumerate(lengths):
        expected = F.scaled_dot_product_attention(
            q[row, :, None], k[row, :, :length], v[row, :, :length], enable_gqa=True
        )
        assert torch.allclose(found[row], expected[:, 0], atol=1e-6)


def test_no_kernel_here():
    """PyTorch has the function; on a CPU it raises, and that is an answer."""
    assert not varlen.can_pack(CPU, torch.bfloat16, 4, 32)
    assert not varlen.can_read_cache(CPU, torch.bfloat16, 4, 2, 32)


def test_what_a_kernel_can(monkeypatch):
    monkeypatch.setattr(varlen, "kernel", lambda: varlen_reference.varlen_attn)
    assert varlen.can_pack(CPU, torch.bfloat16, 16, 80)
    assert varlen.can_read_cache(CPU, torch.float16, 28, 4, 128)
    assert not varlen.can_pack(CPU, torch.float32, 16, 80), "FlashAttention has no FP32"
    assert not varlen.can_pack(CPU, torch.bfloat16, 16, 84), "its head sizes are multiples of 8"


def test_pytorch_2_10_packs_and_reads_no_cache(monkeypatch):
    monkeypatch.setattr(varlen, "kernel", lambda: varlen_reference.varlen_attn_2_10)
    assert varlen.can_pack(CPU, torch.bfloat16, 4, 32)
    assert not varlen.can_read_cache(CPU, torch.bfloat16, 4, 2, 32)


def test_pytorch_without(monkeypatch):
    monkeypatch.setattr(varlen, "kernel", lambda: None)
    assert not varlen.can_pack(CPU, torch.bfloat16, 4, 32)
    assert not varlen.can_read_cache(CPU, torch.bfloat16, 4, 2, 32)


@pytest.mark.parametrize("wrong", ["ignores lengths", "mixes heads"])
def test_a_wrong_kernel_is_left_out(monkeypatch, caplog, wrong):
    def kernel(query, key, value, *args, seqused_k=None, enable_gqa=False, **others):
        if wrong == "ignores lengths" and seqused_k is not None:
            seqused_k = torch.full_like(seqused_k, 130)
        if wrong == "mixes heads":
            value = value.flip(1)
        return varlen_reference.varlen_attn(
            query, key, value, *args, seqused_k=seqused_k, enable_gqa=enable_gqa, **others
        )

    monkeypatch.setattr(varlen, "kernel", lambda: kernel)
    assert not varlen.can_read_cache(CPU, torch.bfloat16, 4, 2, 32)
    assert "is wrong by" in caplog.text
    assert varlen.can_pack(CPU, torch.bfloat16, 4, 32) == (wrong == "ignores lengths")
