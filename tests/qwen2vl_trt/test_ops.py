"""The three operators: each eager form against a naive loop, each exported form against the eager one."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_trt import ops
from qwen2vl_trt.ops import has_scaled_mm, ragged_attention, rotate, update_cache
from tests.support.models import relative_error


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_attention(q, k, v, lengths, causal):
    """One query at a time, in FP64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    batch, heads, queries, dim = q.shape
    group = heads // k.shape[1]
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                seen = int(lengths[b]) - (queries - 1 - i if causal else 0)
                keys, values = k[b, h // group, :seen].double(), v[b, h // group, :seen].double()
                out[b, h, i] = (keys @ q[b, h, i].double() / dim**0.5).softmax(0) @ values
    return out


@st.composite
def attentions(draw):
    causal = draw(st.booleans())
    batch, kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 7]))
    keys = draw(st.integers(1, 12))
    queries = draw(st.integers(1, keys))
    lengths = [draw(st.integers(queries if causal else 1, keys)) for _ in range(batch)]
    dim = draw(st.sampled_from([4, 8, 20]))
    q = randn(batch, kv_heads * group, queries, dim, seed=1) * 2
    k, v = randn(batch, kv_heads, keys, dim, seed=2), randn(batch, kv_heads, keys, dim, seed=3)
    return q, k, v, torch.tensor(lengths), causal


@settings(deadline=None, max_examples=80)
@given(attentions())
def test_ragged_attention_equals_a_loop_over_rows(case):
    q, k, v, lengths, causal = case
    expected = naive_attention(q, k, v, lengths, causal)
    with torch.no_grad():
        by_length = ragged_attention(q, k, v, lengths, causal)
    masked = ragged_attention(q.requires_grad_(), k, v, lengths, causal)  # the path of training and of a GPU
    assert relative_error(by_length, expected) < 1e-5
    assert relative_error(masked.detach(), expected) < 1e-5


@settings(deadline=None, max_examples=40)
@given(attentions())
def test_keys_beyond_the_length_do_not_matter(case):
    q, k, v, lengths, causal = case
    with torch.no_grad():
        expected = ragged_attention(q, k, v, lengths, causal)
        beyond = (torch.arange(k.shape[2]) >= lengths[:, None])[:, None, :, None]
        k, v = k.masked_fill(beyond, 1e3), v.masked_fill(beyond, -1e3)
        assert torch.equal(ragged_attention(q, k, v, lengths, causal), expected)
    assert relative_error(torch.ops.qwen2vl_trt.ragged_attention(q, k, v, lengths, causal), expected) < 1e-5


@settings(deadline=None, max_examples=40)
@given(attentions())
def test_the_operator_of_the_graph_equals_the_eager_form(case):
    q, k, v, lengths, causal = case
    with torch.no_grad():
        eager = ragged_attention(q, k, v, lengths, causal)
    assert relative_error(torch.ops.qwen2vl_trt.ragged_attention(q, k, v, lengths, causal), eager) < 1e-5


def test_full_attention_over_a_prefix_of_the_keys():
    """A window whose queries are padded too: all slots ask, the first three answer."""
    q, k, v = randn(2, 2, 5, 4, seed=1), randn(2, 2, 5, 4, seed=2), randn(2, 2, 5, 4, seed=3)
    lengths = torch.tensor([3, 5])
    expected = naive_attention(q, k, v, lengths, causal=False)
    with torch.no_grad():
        found = ragged_attention(q, k, v, lengths, causal=False)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("starts", [[0, 0, 0], [5, 0, 2], [6, 6, 6]])
def test_update_cache_writes_each_row_at_its_start(starts, dtype):
    cache, new = randn(3, 2, 9, 4, seed=1).to(dtype), randn(3, 2, 3, 4, seed=2).to(dtype)
    expected = cache.clone()
    for row, start in enumerate(starts):
        for token in range(3):
            expected[row, :, start + token] = new[row, :, token]
    before = cache.clone()
    assert torch.equal(torch.ops.qwen2vl_trt.update_cache(cache, new, torch.tensor(starts)), expected)
    assert torch.equal(cache, before), "the operator of the graph has no effect beside its result"
    assert update_cache(cache, new, torch.tensor(starts)) is cache
    assert torch.equal(cache, expected)


def test_update_cache_of_neighbouring_slots_is_in_place():
    whole, new = torch.zeros(5, 2, 6, 4), randn(2, 2, 1, 4)
    update_cache(whole[2:4], new, torch.tensor([3, 0]))
    assert torch.equal(whole[2, :, 3], new[0, :, 0])
    assert torch.equal(whole[3, :, 0], new[1, :, 0])
    assert int((whole != 0).sum()) == new.numel()


def test_rotate_turns_complex_numbers():
    x, angles = randn(2, 3, 5, 8), randn(2, 5, 4, seed=1) * 3
    expected = torch.empty(x.shape, dtype=torch.float64)
    for i in range(4):  # a complex number of the i-th value of each half, turned by its angle
        number = torch.complex(x[..., i].double(), x[..., i + 4].double())
        turned = number * torch.exp(1j * angles[:, None, :, i].double())
        expected[..., i], expected[..., i + 4] = turned.real, turned.imag
    before = x.clone()
    assert relative_error(rotate(x, angles.cos(), angles.sin()), expected) < 1e-6
    assert torch.equal(x, before)


def test_rotate_computes_in_fp32():
    x, angles = randn(1, 2, 64, 16).bfloat16(), randn(1, 64, 8, seed=1)
    found = rotate(x, angles.cos(), angles.sin())
    assert found.dtype == torch.bfloat16
    exact = rotate(x.float(), angles.cos(), angles.sin())
    assert torch.equal(found, exact.bfloat16())


class Everything(torch.nn.Module):
    def forward(self, x, cos, sin, cache, start, lengths):
        x = rotate(x, cos, sin)
        cache = update_cache(cache, x[:, :2], start)
        return ragged_attention(x, cache, cache, lengths, causal=True), cache


def test_the_exported_form_is_one_node_each_and_equals_the_eager_form():
    x, angles, cache = randn(2, 4, 3, 8), randn(2, 3, 4, seed=1), randn(2, 2, 9, 8, seed=2)
    arguments = (x, angles.cos(), angles.sin(), cache, torch.tensor([0, 4]), torch.tensor([3, 7]))
    program = torch.export.export(Everything(), arguments, strict=False)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    for name in ("qwen2vl_trt.update_cache.default", "qwen2vl_trt.ragged_attention.default"):
        assert called.count(name) == 1
    assert sum("RotaryEmbedding" in name or "rotary_embedding" in name for name in called) == 1
    found = program.module()(*arguments)
    with torch.no_grad():
        expected = Everything()(*(argument.clone() for argument in arguments))
    assert relative_error(found[0], expected[0]) < 1e-5
    assert relative_error(found[1], expected[1]) < 1e-6
    assert torch.equal(cache, randn(2, 2, 9, 8, seed=2)), "the exported form copies the cache"


class TestFP8Products:
    """Where they are not, FP8 layers are dequantised in every call, and the log says so."""

    @pytest.fixture(autouse=True)
    def _gpu(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, device.index))
        has_scaled_mm.cache_clear()
        yield
        has_scaled_mm.cache_clear()

    def test_from_ada_on(self, caplog):
        assert [has_scaled_mm(torch.device("cuda", minor)) for minor in (6, 9)] == [False, True]
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "cuda:6 has no FP8 products" in record.message
        assert "takes more time than BF16" in record.message

    def test_not_on_a_cpu(self, caplog):
        assert not has_scaled_mm(torch.device("cpu"))
        assert not caplog.records

    def test_an_operator_without_an_argument(self, monkeypatch, caplog):
        """A later PyTorch's."""
        arguments = [one for one in torch.ops.aten._scaled_mm.default._schema.arguments if one.name != "bias"]
        operator = SimpleNamespace(default=SimpleNamespace(_schema=SimpleNamespace(arguments=arguments)))
        monkeypatch.setattr(torch.ops.aten, "_scaled_mm", operator)
        assert not has_scaled_mm(torch.device("cuda", 9))
        assert "aten::_scaled_mm takes no bias" in caplog.text

    def test_an_operator_that_is_gone(self):
        assert "no operator aten::_no_such_product" in (ops.missing_arguments("_no_such_product", "bias") or "")
