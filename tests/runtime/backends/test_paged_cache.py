"""The cache in pages: where tokens go, and who has which pages without a scheduler."""

import pytest
import torch

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.errors import LimitError
from qwen2vl_trt.runtime.backends.paged_cache import PAGE, PagedKVCache, page_bytes, pages_of
from qwen2vl_trt.runtime.backends.steps import Chunk
from tests.support.models import model_config

CONFIG = Qwen2VLConfig.from_dict(model_config().to_dict()).text


def cache(pages=10, slots=3, max_seq_len=700):
    return PagedKVCache(CONFIG, slots, max_seq_len, pages, torch.float32, "cpu")


def test_sizes():
    assert [pages_of(tokens) for tokens in (0, 1, 256, 257, 700)] == [0, 1, 1, 2, 3]
    found = cache()
    assert found.block_table.shape == (3, 3)
    assert found.k[0].shape == found.v[1].shape == (10, PAGE, CONFIG.num_key_value_heads, CONFIG.head_dim)
    assert found.nbytes == 10 * PAGE * 2 * CONFIG.num_hidden_layers * CONFIG.num_key_value_heads * CONFIG.head_dim * 4
    assert page_bytes(CONFIG, torch.float32) == found.nbytes / 10 + PAGE * CONFIG.hidden_size * 4


def test_new_tokens_go_to_the_pages_of_their_slot():
    found = cache()
    found.block_table[:] = [[4, 2, 9], [0, 0, 0], [7, 1, 3]]
    chunks = [Chunk(2, 255, 3), Chunk(1, 5, 1), Chunk(0, 512, 2)]
    expected = [7 * PAGE + 255, 1 * PAGE, 1 * PAGE + 1, 5, 9 * PAGE, 9 * PAGE + 1]
    assert found.slot_mapping(chunks).tolist() == expected


def test_pages_without_a_scheduler():
    found = cache()
    found.allot(3, 600)
    assert sorted(found.block_table.flatten()) == list(range(1, 10)), "page 0 belongs to nobody"
    with pytest.raises(LimitError, match="3 sequences of 600 tokens do not fit the cache of 8 pages"):
        cache(pages=9).allot(3, 600)


def test_clearing_pages_leaves_the_others():
    found = cache()
    for tensor in (*found.k, *found.v):
        tensor.fill_(torch.nan)
    found.clear([2, 5])
    found.clear([])
    for tensor in (*found.k, *found.v):
        assert not tensor[[2, 5]].any()
        assert tensor[[0, 1, 3, 4, 6, 7, 8, 9]].isnan().all()
