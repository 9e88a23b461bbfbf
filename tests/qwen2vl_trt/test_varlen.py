"""FlashAttention with a stand-in for the CUDA kernel: what it is asked, and that a wrong kernel is found out."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen2vl_trt import varlen
from qwen2vl_trt.windows import PackedSequences
from tests.support import varlen_reference
from tests.support.bounds import FP32

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget():
    for question in (varlen.has_packed_attention, varlen.has_cache_attention):
        question.cache_clear()
    yield
    for question in (varlen.has_packed_attention, varlen.has_cache_attention):
        question.cache_clear()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_bounds_are_running_sums_of_lengths():
    packed = PackedSequences.of(torch.tensor([4, 64, 16]))
    assert packed.cu_seqlens.tolist() == [0, 4, 68, 84]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 64


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (3, 3)])
def test_a_cache_is_read_through_its_strides(monkeypatch, heads, kv_heads):
    monkeypatch.setattr(varlen, "flash_attention", varlen_reference.flash_attention)
    q, k, v = noise(3, heads, 16), noise(3, kv_heads, 10, 16), noise(4, kv_heads, 10, 16)[1:]
    k[1, :, 4:] = torch.nan  # not to be read
    lengths = torch.tensor([10, 4, 1], dtype=torch.int32)
    found = varlen.decode_attention(q, k, v, lengths, 10, varlen.CuSeqlens.of(3, k))
    for row, length in enumerate(lengths):
        expected = F.scaled_dot_product_attention(
            q[row, :, None], k[row, :, :length], v[row, :, :length], enable_gqa=True
        )
        assert torch.allclose(found[row], expected[:, 0], atol=FP32)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize("chunk", [1, 4, 10])
def test_a_chunk_sees_its_row_up_to_itself(monkeypatch, heads, kv_heads, chunk):
    monkeypatch.setattr(varlen, "flash_attention", varlen_reference.flash_attention)
    q, k, v = noise(2, heads, 10, 16), noise(2, kv_heads, 10, 16), noise(3, kv_heads, 10, 16)[1:]
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(varlen.prefill_attention(q[:, :, -chunk:], k, v), whole[:, :, -chunk:], atol=FP32)


def test_pytorch_has_the_operator():
    """What is called, on this release: shapes of the published models, by PyTorch's own description of its output."""
    with FakeTensorMode():
        q, k = (torch.empty(3, heads, 128, dtype=torch.bfloat16, device="cuda") for heads in (16, 2))
        cache = torch.empty(3, 2, 1000, 128, dtype=torch.bfloat16, device="cuda")
        lengths = torch.ones(3, dtype=torch.int32, device="cuda")
        assert varlen.decode_attention(q, cache, cache, lengths, 512, varlen.CuSeqlens.of(3, cache)).shape == q.shape
        chunk = torch.empty(3, 16, 7, 128, dtype=torch.bfloat16, device="cuda")
        assert varlen.prefill_attention(chunk, cache, cache).shape == chunk.shape
        assert varlen.packed_attention(k, k, k, torch.arange(3, dtype=torch.int32, device="cuda"), 2).shape == k.shape


def test_no_kernel_here(caplog):
    """PyTorch has the operator; on a CPU it raises, and that is an answer, with its cost."""
    assert not varlen.has_packed_attention(CPU, torch.bfloat16, 4, 32)
    assert not varlen.has_cache_attention(CPU, torch.bfloat16, 4, 2, 32)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert all("which costs time and memory" in record.message for record in caplog.records)


@pytest.mark.parametrize("argument", ["seqused_k", "block_table"])
def test_an_operator_without_an_argument_is_not_used(monkeypatch, caplog, argument):
    """A later PyTorch's may have lost one of those that a cache needs."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    arguments = [one for one in schema.arguments if one.name != argument]
    operator = SimpleNamespace(default=SimpleNamespace(_schema=SimpleNamespace(arguments=arguments)))
    monkeypatch.setattr(varlen, "flash_attention", varlen_reference.flash_attention)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", operator)
    assert not varlen.has_cache_attention(CPU, torch.bfloat16, 4, 2, 32)
    assert f"aten::_flash_attention_forward takes no {argument}" in caplog.text


def test_what_a_kernel_can(monkeypatch):
    monkeypatch.setattr(varlen, "flash_attention", varlen_reference.flash_attention)
    assert varlen.has_packed_attention(CPU, torch.bfloat16, 16, 80)
    assert varlen.has_cache_attention(CPU, torch.float16, 28, 4, 128)
    assert not varlen.has_packed_attention(CPU, torch.float32, 16, 80), "FlashAttention has no FP32"
    assert not varlen.has_packed_attention(CPU, torch.bfloat16, 16, 84), "its head sizes are multiples of 8"


def test_an_operator_of_another_signature_is_not_used(monkeypatch):
    def flash_attention(*args):
        return torch.ops.aten._flash_attention_forward(*args, a_later_argument=1)

    monkeypatch.setattr(varlen, "flash_attention", flash_attention)
    assert not varlen.has_packed_attention(CPU, torch.bfloat16, 4, 32)
    assert not varlen.has_cache_attention(CPU, torch.bfloat16, 4, 2, 32)


@pytest.mark.parametrize("wrong", ["ignores lengths", "mixes heads", "sees too much", "leaves rows out"])
def test_a_wrong_kernel_is_left_out(monkeypatch, caplog, wrong):
    def flash_attention(q, k, v, cu_seqlens, max_seqlen, causal=False, lengths=None):
        if wrong == "ignores lengths" and lengths is not None:
            lengths = torch.full_like(lengths, 130)
        if wrong == "mixes heads":
            v = v.flip(1)
        out = varlen_reference.flash_attention(
            q, k, v, cu_seqlens, max_seqlen, causal and wrong != "sees too much", lengths
        )
        if wrong == "leaves rows out" and lengths is not None:
            out[-1] = torch.nan
        return out

    monkeypatch.setattr(varlen, "flash_attention", flash_attention)
    assert not varlen.has_cache_attention(CPU, torch.bfloat16, 4, 2, 32)
    assert "is wrong by" in caplog.text
    assert varlen.has_packed_attention(CPU, torch.bfloat16, 4, 32) == (wrong != "mixes heads")
