"""The cache grows by powers of two, keeps what it holds, and shrinks when nothing is in use."""

import pytest
import torch

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.errors import LimitError
from qwen2vl_trt.runtime.backends.common import KVCache
from tests.support.models import model_config

CONFIG = Qwen2VLConfig.from_dict(model_config().to_dict()).text


def cache(slots=3, max_seq_len=1000):
    return KVCache(CONFIG, slots, max_seq_len, torch.float32, "cpu")


def test_a_cache_begins_empty_and_no_larger_than_allowed():
    found = cache()
    assert len(found.k) == len(found.v) == CONFIG.num_hidden_layers
    assert found.k[0].shape == (3, CONFIG.num_key_value_heads, 128, CONFIG.head_dim)
    assert not any(tensor.any() for tensor in (*found.k, *found.v))
    assert cache(max_seq_len=50).capacity == 50


def test_it_grows_by_powers_of_two_up_to_the_limit():
    found = cache()
    sizes = []
    for length in (1, 128, 129, 256, 257, 400, 513, 1000):
        found.reserve(length)
        assert found.capacity >= length
        sizes.append(found.capacity)
    assert sizes == [128, 128, 256, 256, 512, 512, 1000, 1000]
    with pytest.raises(LimitError, match=r"1,001 tokens do not fit the cache of 1,000 \(--max-seq-len\)"):
        found.reserve(1001)


def test_growth_keeps_what_is_written():
    found = cache()
    for number, tensor in enumerate((*found.k, *found.v)):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    before = [tensor.clone() for tensor in (*found.k, *found.v)]
    found.reserve(300)
    for old, new in zip(before, (*found.k, *found.v)):
        assert torch.equal(new[:, :, :128], old)
        assert not new[:, :, 128:].any()


def test_reset_shrinks_and_a_small_cache_stays():
    found = cache()
    small = found.k[0]
    found.reset()
    assert found.k[0] is small
    found.reserve(600)
    found.reset()
    assert found.capacity == 128


def test_a_fixed_capacity():
    found = KVCache(CONFIG, 2, 300, torch.float32, "cpu", fixed=True)
    tensors = (*found.k, *found.v)
    found.reserve(300)
    found.reset()
    assert found.capacity == 300
    assert all(before is after for before, after in zip(tensors, (*found.k, *found.v)))


def test_rows_are_contiguous_views():
    found = cache()
    k, v = found.rows(1, 2)
    assert len(k) == len(v) == CONFIG.num_hidden_layers
    assert all(tensor.is_contiguous() for tensor in (*k, *v))
    v[0].fill_(7)
    assert (found.v[0][1:] == 7).all()
    assert not found.v[0][0].any()


def filled(found):
    for number, tensor in enumerate((*found.k, *found.v)):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    return [tensor.clone() for tensor in (*found.k, *found.v)]


def test_a_prefix_is_copied_and_nothing_else():
    found = cache()
    before = filled(found)
    found.copy_prefix(2, 0, 50)
    for old, new in zip(before, (*found.k, *found.v)):
        assert torch.equal(new[0, :, :50], old[2, :, :50])
        assert torch.equal(new[0, :, 50:], old[0, :, 50:])
        assert torch.equal(new[1:], old[1:])


def test_trimming_keeps_what_is_asked_for():
    found = cache()
    found.reserve(700)
    before = filled(found)
    sizes = []
    for length in (600, 512, 257, 256, 129, 300, 100, 0):
        found.trim(length)
        sizes.append(found.capacity)
        for old, new in zip(before, (*found.k, *found.v)):
            assert torch.equal(new, old[:, :, : found.capacity])
    assert sizes == [1000, 512, 512, 256, 256, 256, 128, 128]


def test_growth_out_of_memory_leaves_everything_as_it_was(monkeypatch):
    found = cache()
    before = filled(found)

    def exhausted(*arguments, **keywords):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "zeros", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        found.reserve(300)
    assert found.capacity == 128
    assert all(torch.equal(old, new) for old, new in zip(before, (*found.k, *found.v)))


def test_bytes_are_those_of_keys_and_values():
    found = cache()
    expected = 2 * CONFIG.num_hidden_layers * 3 * CONFIG.num_key_value_heads * 128 * CONFIG.head_dim * 4
    assert found.nbytes == expected
