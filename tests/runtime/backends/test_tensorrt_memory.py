"""What the cache needs, said before it is taken; the numbers are Qwen2.5-VL-7B's."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.runtime.backends.common import KVCache
from qwen2vl_trt.runtime.backends.tensorrt_tensors import (
    ALIGNMENT,
    check_cache,
    check_rows,
    in_words,
    streaming_budget,
    token_bytes,
)

OF_7B = SimpleNamespace(num_hidden_layers=28, num_key_value_heads=4, head_dim=128)
PROFILE = BuildProfile()  # 8 requests of 8,192 tokens
NEEDED = 8 * 8192 * 57344


def refused(free, profile=PROFILE):
    with pytest.raises(EngineError) as error:
        check_cache(OF_7B, profile, torch.bfloat16, free)
    return str(error.value)


def test_bytes_of_a_token():
    assert token_bytes(OF_7B, torch.bfloat16) == 57344
    cache = KVCache(OF_7B, 2, 16, torch.float32, "cpu", fixed=True)
    assert sum(tensor.nbytes for tensor in (*cache.k, *cache.v)) == 2 * 16 * token_bytes(OF_7B, torch.float32)


def test_what_fits_is_said():
    check_cache(OF_7B, PROFILE, torch.bfloat16, NEEDED)
    assert refused(NEEDED - 1) == (
        "the key-value cache needs 3.76 GB for --max-batch-size 8 x --max-seq-len 8,192, and 3.76 GB of GPU memory is"
        " left for it; what fits: --max-batch-size 7 at this length or --max-seq-len 7,936 at this batch."
        " Rebuild, or free GPU memory."
    )
    assert "--max-seq-len 1,024 (--max-input-len below 1,024) at this batch" in refused(NEEDED // 8)
    assert "--max-batch-size 1 at this length" in refused(NEEDED // 8)
    assert "--max-batch-size" not in refused(NEEDED // 8 - 1).partition("what fits:")[2]
    assert "what fits: nothing, not one request." in refused(0)
    assert "what fits: nothing, not one request." in refused(-5)


@given(st.integers(0, NEEDED - 1))
def test_what_is_said_to_fit_fits(free):
    words = refused(free).partition("what fits:")[2].replace(",", "").split()
    for option, changes in (("--max-batch-size", "max_batch_size"), ("--max-seq-len", "max_seq_len")):
        if option in words:
            value = int(words[words.index(option) + 1])
            limits = PROFILE.as_dict() | {"max_input_len": 1, changes: value}
            check_cache(OF_7B, BuildProfile(**limits), torch.bfloat16, free)
            check_rows(OF_7B, BuildProfile(**limits), torch.bfloat16)


@pytest.mark.parametrize(("length", "step"), [(700, None), (701, 2), (1000, None), (999, 2)])
def test_rows_begin_at_aligned_addresses(length, step):
    config = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=2, head_dim=32)
    profile = BuildProfile(max_batch_size=2, max_input_len=1, max_seq_len=length)
    assert (length * 2 * 32 * 2 % ALIGNMENT == 0) == (step is None)
    if step is None:
        check_rows(config, profile, torch.bfloat16)
    else:
        with pytest.raises(EngineError, match=rf"cache rows of .* bytes; .* Rebuild with a multiple of {step}\."):
            check_rows(config, profile, torch.bfloat16)
        check_rows(config, BuildProfile(max_batch_size=1, max_input_len=1, max_seq_len=length), torch.bfloat16)


@pytest.mark.parametrize(("free", "budget"), [(10, 0), (12, 2), (20, 10), (21, 10), (0, 0)])
def test_weights_stream_where_they_do_not_fit(free, budget):
    """What is left beside 10 bytes of other needs, at most all 10 of the weights."""
    assert streaming_budget(10, free, 10) == budget


def test_bytes_in_words():
    assert [in_words(count) for count in (0, 4_500_000, 10**9, 123_456_789_000)] == [
        "0.0 MB", "4.5 MB", "1.00 GB", "123.46 GB"
    ]  # fmt: skip
