"""The most recently used embeddings stay, within the limit, and hold no more memory than they count."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_trt.runtime.media.embedding_cache import EmbeddingCache
from qwen2vl_trt.runtime.preprocessing.sizes import MediaSize

ROW = 4 * 8  # bytes
SIZE = MediaSize(60, 30, 56, 28, (1, 2, 4), 2)


def entry(tokens, value=0.0):
    return torch.full((tokens, 8), value), SIZE


def test_the_least_recently_used_makes_room():
    cache = EmbeddingCache(10 * ROW)
    for name, tokens in ((b"a", 4), (b"b", 3), (b"c", 3)):
        cache.store(name, *entry(tokens))
    assert (len(cache), cache.nbytes) == (3, 10 * ROW)
    assert cache.find(b"a") is not None
    cache.store(b"d", *entry(2))
    assert cache.find(b"b") is None
    assert all(cache.find(name) is not None for name in (b"a", b"c", b"d"))
    assert (cache.nbytes, cache.evictions) == (9 * ROW, 1)
    cache.store(b"e", *entry(11))  # alone too large: nobody is driven out for it
    assert cache.find(b"e") is None
    assert len(cache) == 3
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_zero_keeps_nothing():
    cache = EmbeddingCache(0)
    cache.store(b"a", *entry(1))
    assert len(cache) == 0


def test_a_batch_does_not_stay_for_one_of_its_images():
    cache, batch = EmbeddingCache(100 * ROW), torch.arange(80.0).view(10, 8)
    cache.store(b"a", batch[2:4], SIZE)
    found = cache.find(b"a")
    assert found.embeds.untyped_storage().nbytes() == 2 * ROW
    assert torch.equal(found.embeds, batch[2:4])
    assert found.size is SIZE


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), max_size=60), st.integers(0, 12))
def test_bytes_are_counted(steps, limit):
    cache, sizes = EmbeddingCache(limit * ROW), {}
    for name, tokens in steps:
        key = bytes([name])
        if cache.find(key) is None:
            sizes[key] = tokens
        cache.store(key, *entry(tokens))
        held = [key for key in sizes if cache.find(key) is not None]
        assert cache.nbytes == sum(sizes[key] for key in held) * ROW <= limit * ROW
        assert all(cache.find(key).embeds.shape == (sizes[key], 8) for key in held)
