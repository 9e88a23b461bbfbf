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
    for question in (varlen.has_packed_attention, varlen.has_paged_attention):
        question.cache_clear()
    yield
    for question in (varlen.has_packed_attention, varlen.has_paged_attention):
        question.cache_clear()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_bounds_are_running_sums_of_lengths():
    packed = PackedSequences.of(torch.tensor([4, 64, 16]))
    assert packed.cu_seqlens.tolist() == [0, 4, 68, 84]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 64


def paged(kv_heads, lengths, spare=2):
    """Keys, or values, of sequences ``[B, Hkv, M, D]``, the same in pages ``[pages, 256, Hkv, D]``, and their table.

    Pages are in a random order; NaN is wherever nothing may be read.
    """
    each = -(-max(lengths) // 256)
    rows = noise(len(lengths), kv_heads, each * 256, 16)
    order = torch.randperm(len(lengths) * each + spare, generator=torch.Generator().manual_seed(1))
    table = order[: len(lengths) * each].view(len(lengths), each).int()
    pages = torch.full((len(order), 256, kv_heads, 16), torch.nan)
    for row, length in enumerate(lengths):
        kept = torch.full((each * 256, kv_heads, 16), torch.nan)
        kept[:length] = rows[row, :, :length].transpose(0, 1)
        pages[table[row].long()] = kept.view(each, 256, kv_heads, 16)
    return rows, pages, table


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize("new", [(1, 1, 1, 1), (4, 1, 256, 3), (257, 1, 5, 1)])
def test_the_last_tokens_of_a_sequence_see_its_pages_up_to_themselves(monkeypatch, heads, kv_heads, new):
    monkeypatch.setattr(varlen, "flash_attention", varlen_reference.flash_attention)
    lengths = (257, 1, 300, 512)
    k, k_pages, table = paged(kv_heads, lengths)
    v, v_pages = k.flip(-1), k_pages.flip(-1).contiguous()
    q = noise(sum(new), heads, 16)
    cu_seqlens = torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    counts = torch.tensor(lengths, dtype=torch.int32)
    found = varlen.paged_attention(q, k_pages, v_pages, cu_seqlens, max(new), counts, table).split(new)
    for row, (queries, length) in enumerate(zip(q.split(new), lengths)):
        whole = torch.zeros(heads, length, 16)
        whole[:, length - new[row] :] = queries.transpose(0, 1)
        expected = F.scaled_dot_product_attention(
            whole[None], k[row : row + 1, :, :length], v[row : row + 1, :, :length], is_causal=True, enable_gqa=True
        )
        assert torch.allclose(found[row].transpose(0, 1), expected[0, :, length - new[row] :], atol=FP32)


def test_queries_before_the_first_key_give_zeros(monkeypatch):
    """As those that fill up a captured step do: 5 of a sequence of 1 key; and a sequence without queries is nothing."""
    monkeypatch.setattr(varlen, "flash_attention", varlen_reference.flash_attention)
    _, pages, table = paged(2, (1, 1, 1))
    cu_seqlens, counts = (torch.tensor(of, dtype=torch.int32) for of in ((0, 5, 5, 6), (1, 1, 1)))
    found = varlen.paged_attention(noise(6, 4, 16), pages, pages, cu_seqlens, 5, counts, table)
    assert not found[:4].any()
    only = [pages[int(table[row, 0]), 0].repeat_interleave(2, dim=0) for row in (0, 2)]
    assert torch.allclose(found[4:], torch.stack(only), atol=FP32), "one key is all that the last query sees"


REFUSED = {
    "pages of 128 tokens": {"k": torch.zeros(4, 128, 2, 16)},
    "a block table of int64": {"block_table": torch.zeros(2, 1, dtype=torch.int64)},
    "lengths of int64": {"lengths": torch.ones(2, dtype=torch.int64)},
    "bounds of int64": {"cu_seqlens": torch.arange(3)},
    "heads apart": {"k": torch.zeros(2, 256, 16, 2).transpose(2, 3)},
    "a page that is not there": {"block_table": torch.full((2, 1), 2, dtype=torch.int32)},
    "a table of more sequences": {"block_table": torch.zeros(3, 1, dtype=torch.int32)},
    "more keys than the table has": {"lengths": torch.tensor([1, 257], dtype=torch.int32)},
    "more queries than are said": {"max_seqlen": 0},
}


@pytest.mark.parametrize("what", [None, *REFUSED])
def test_the_stand_in_refuses_what_the_kernel_refuses(monkeypatch, what):
    monkeypatch.setattr(varlen, "flash_attention", varlen_reference.flash_attention)
    given = {
        "q": noise(2, 4, 16),
        "k": noise(2, 256, 2, 16),
        "cu_seqlens": torch.arange(3, dtype=torch.int32),
        "max_seqlen": 1,
        "lengths": torch.ones(2, dtype=torch.int32),
        "block_table": torch.zeros(2, 1, dtype=torch.int32),
    } | REFUSED.get(what, {})
    if what is None:
        assert varlen.paged_attention(v=given["k"], **given).isfinite().all()
        return
    with pytest.raises(AssertionError):
        varlen.paged_attention(v=given["k"], **given)


def test_pytorch_has_the_operator():
    """What is called, on this release: shapes of the published models, by PyTorch's own description of its output."""
    with FakeTensorMode():
        q, k = (torch.empty(3, heads, 128, dtype=torch.bfloat16, device="cuda") for heads in (16, 2))
        pages = torch.empty(9, 256, 2, 128, dtype=torch.bfloat16, device="cuda")
        lengths, bounds = (torch.ones(n, dtype=torch.int32, device="cuda") for n in (2, 3))
        table = torch.zeros(2, 4, dtype=torch.int32, device="cuda")
        assert varlen.paged_attention(q, pages, pages, bounds, 2, lengths, table).shape == q.shape
        assert varlen.packed_attention(k, k, k, torch.arange(3, dtype=torch.int32, device="cuda"), 2).shape == k.shape


def test_no_kernel_here(caplog):
    """PyTorch has the operator; on a CPU it raises, and that is an answer, with its cost."""
    assert not varlen.has_packed_attention(CPU, torch.bfloat16, 4, 32)
    assert not varlen.has_paged_attention(CPU, torch.bfloat16, 4, 2, 32)
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
    assert not varlen.has_paged_attention(CPU, torch.bfloat16, 4, 2, 32)
    assert f"aten::_flash_attention_forward takes no {argument}" in caplog.text


def test_what_a_kernel_can(monkeypatch):
    monkeypatch.setattr(varlen, "flash_attention", varlen_reference.flash_attention)
    assert varlen.has_packed_attention(CPU, torch.bfloat16, 16, 80)
    assert varlen.has_paged_attention(CPU, torch.float16, 28, 4, 128)
    assert not varlen.has_packed_attention(CPU, torch.float32, 16, 80), "FlashAttention has no FP32"
    assert not varlen.has_packed_attention(CPU, torch.bfloat16, 16, 84), "its head sizes are multiples of 8"


def test_an_operator_of_another_signature_is_not_used(monkeypatch):
    def flash_attention(*args):
        return torch.ops.aten._flash_attention_forward(*args, a_later_argument=1)

    monkeypatch.setattr(varlen, "flash_attention", flash_attention)
    assert not varlen.has_packed_attention(CPU, torch.bfloat16, 4, 32)
    assert not varlen.has_paged_attention(CPU, torch.bfloat16, 4, 2, 32)


WRONG = [
    "ignores lengths",
    "mixes heads",
    "sees too much",
    "leaves rows out",
    "takes pages in order",
    "first page only",
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_left_out(monkeypatch, caplog, wrong):
    def flash_attention(q, k, v, cu_seqlens, max_seqlen, causal=False, lengths=None, block_table=None):
        if wrong == "mixes heads":
            v = v.flip(1 if block_table is None else 2)
        if block_table is not None:
            if wrong == "ignores lengths":
                lengths = torch.full_like(lengths, 512)
            if wrong == "takes pages in order":
                block_table = block_table.clone()
                block_table[:2] = torch.arange(4, dtype=torch.int32).view(2, 2)
            if wrong == "first page only":
                block_table = block_table[:, :1].expand(-1, 2).contiguous()
        causal = causal and wrong != "sees too much"
        out = varlen_reference.flash_attention(q, k, v, cu_seqlens, max_seqlen, causal, lengths, block_table)
        if wrong == "leaves rows out" and lengths is not None:
            out[-1] = torch.nan
        return out

    monkeypatch.setattr(varlen, "flash_attention", flash_attention)
    assert not varlen.has_paged_attention(CPU, torch.bfloat16, 4, 2, 32)
    assert "is wrong by" in caplog.text
    assert varlen.has_packed_attention(CPU, torch.bfloat16, 4, 32) == (wrong != "mixes heads")
