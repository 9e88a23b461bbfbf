"""What an engine is compared with, which profile a batch runs in, and whether the cache fits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.engines.tensorrt_profiles import Range
from qwen2vl_trt.errors import EngineError, LimitError
from qwen2vl_trt.runtime.backends.common import KVCache
from qwen2vl_trt.runtime.backends.tensorrt_tensors import (
    ALIGNMENT,
    EngineTensor,
    check_cache,
    check_rows,
    check_tensors,
    choose_profile,
    expected_tensors,
    format_bytes,
    streaming_budget,
    token_bytes,
)

PROFILES = (
    {"batch": Range(1, 1, 4), "sequence": Range(1, 100, 300)},
    {"batch": Range(1, 4, 4), "sequence": Range(1, 1, 1)},
)
EMBEDS = EngineTensor((-1, -1, 8), torch.bfloat16, True, None, (((1, 1, 8), (4, 300, 8)), ((1, 1, 8), (4, 1, 8))))
CACHE = EngineTensor((-1, 2, 64, 4), torch.bfloat16, True, None, (((1, 2, 64, 4), (4, 2, 64, 4)),) * 2)
UPDATED = EngineTensor((-1, 2, 64, 4), torch.bfloat16, False, "k_cache_0")
TENSORS = {"inputs_embeds": EMBEDS, "k_cache_0": CACHE, "new_k_cache_0": UPDATED}


def shapes(batch, sequence, capacity=64):
    return {"inputs_embeds": (batch, sequence, 8), "k_cache_0": (batch, 2, capacity, 4)}


def test_a_graph_says_what_an_engine_must_have(tmp_path):
    bf16 = onnx.TensorProto.BFLOAT16
    inputs = [
        onnx.helper.make_tensor_value_info("inputs_embeds", bf16, ["batch", "sequence", 8]),
        onnx.helper.make_tensor_value_info("k_cache_0", bf16, ["batch", 2, 64, 4]),
    ]
    outputs = [onnx.helper.make_tensor_value_info("new_k_cache_0", bf16, ["batch", 2, 64, 4])]
    path = tmp_path / "graph.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "graph", inputs, outputs)), path)
    assert expected_tensors(path, PROFILES) == TENSORS


@pytest.mark.parametrize(("batch", "sequence", "profile"), [(1, 1, 1), (4, 1, 1), (1, 2, 0), (4, 300, 0)], ids=str)
def test_the_narrowest_profile_that_fits(batch, sequence, profile):
    assert choose_profile(TENSORS, shapes(batch, sequence), "decoder") == profile


def test_the_order_of_profiles_does_not_matter():
    turned = {
        name: replace(tensor, profiles=tensor.profiles[::-1]) if tensor.is_input else tensor
        for name, tensor in TENSORS.items()
    }
    assert choose_profile(turned, shapes(1, 1), "decoder") == 0
    assert choose_profile(turned, shapes(1, 2), "decoder") == 1


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (shapes(1, 301), r"decoder engine: inputs_embeds is 1 x 301 x 8; it was built for 1 x 1 x 8 to 4 x 300 x 8"),
        (shapes(0, 1), r"inputs_embeds is 0 x 1 x 8; it was built for 1 x 1 x 8 to 4 x"),
        (shapes(5, 1), r"inputs_embeds is 5 x 1 x 8"),
        (shapes(1, 1, capacity=63), r"k_cache_0 is 1 x 2 x 63 x 4; it was built for 1 x 2 x 64 x 4 to 4 x 2 x 64 x 4"),
        ({**shapes(1, 1), "inputs_embeds": (1, 8)}, "inputs_embeds is 1 x 8"),
    ],
)
def test_shapes_outside_every_profile(found, said):
    with pytest.raises(LimitError, match=said):
        choose_profile(TENSORS, found, "decoder")


def test_an_engine_that_is_what_its_folder_says():
    check_tensors(TENSORS, dict(TENSORS), "decoder.engine")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("new_k_cache_0", None, "it lacks tensor 'new_k_cache_0'"),
        ("surprise", {}, "it has an unknown tensor 'surprise'"),
        (
            "inputs_embeds",
            {"dtype": torch.float16},
            "dtype of tensor 'inputs_embeds' is torch.float16, .* torch.bfloat16",
        ),
        (
            "k_cache_0",
            {"shape": (-1, 2, 32, 4)},
            r"shape of tensor 'k_cache_0' is \(-1, 2, 32, 4\), .* \(-1, 2, 64, 4\)",
        ),
        ("new_k_cache_0", {"alias": None}, "alias of tensor 'new_k_cache_0' is None, .* say k_cache_0"),
        ("k_cache_0", {"is_input": False}, "is_input of tensor 'k_cache_0' is False"),
        ("k_cache_0", {"profiles": CACHE.profiles[:1]}, "profiles of tensor 'k_cache_0'"),
    ],
)
def test_an_engine_of_another_folder(name, changes, said):
    found = dict(TENSORS)
    if changes is None:
        del found[name]
    else:
        found[name] = replace(found.get(name, CACHE), **changes)
    with pytest.raises(EngineError, match=rf"^decoder\.engine is not of this folder: {said}.*Rebuild\.$"):
        check_tensors(found, TENSORS, "decoder.engine")


OF_7B = SimpleNamespace(num_hidden_layers=28, num_key_value_heads=4, head_dim=128)  # Qwen2.5-VL-7B
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
        "the key-value cache needs 3.76 GB for --max-num-seqs 8 x --max-seq-len 8,192, and 3.76 GB of GPU memory is"
        " left for it; what fits: --max-num-seqs 7 at this length or --max-seq-len 7,936 for as many requests."
        " Rebuild, or free GPU memory."
    )
    assert "--max-seq-len 1,024 (--max-input-len below 1,024) for as many requests" in refused(NEEDED // 8)
    assert "--max-num-seqs 1 at this length" in refused(NEEDED // 8)
    assert "--max-num-seqs" not in refused(NEEDED // 8 - 1).partition("what fits:")[2]
    assert "what fits: nothing, not one request." in refused(0)
    assert "what fits: nothing, not one request." in refused(-5)


@given(st.integers(0, NEEDED - 1))
def test_what_is_said_to_fit_fits(free):
    words = refused(free).partition("what fits:")[2].replace(",", "").split()
    for option, changes in (("--max-num-seqs", "max_num_seqs"), ("--max-seq-len", "max_seq_len")):
        if option in words:
            value = int(words[words.index(option) + 1])
            limits = PROFILE.as_dict() | {"max_input_len": 1, changes: value}
            check_cache(OF_7B, BuildProfile(**limits), torch.bfloat16, free)
            check_rows(OF_7B, BuildProfile(**limits), torch.bfloat16)


@pytest.mark.parametrize(("length", "step"), [(700, None), (701, 2), (1000, None), (999, 2)])
def test_rows_begin_at_aligned_addresses(length, step):
    config = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=2, head_dim=32)
    profile = BuildProfile(max_num_seqs=2, max_input_len=1, max_seq_len=length)
    assert (length * 2 * 32 * 2 % ALIGNMENT == 0) == (step is None)
    if step is None:
        check_rows(config, profile, torch.bfloat16)
    else:
        with pytest.raises(EngineError, match=rf"cache rows of .* bytes; .* Rebuild with a multiple of {step}\."):
            check_rows(config, profile, torch.bfloat16)
        check_rows(config, BuildProfile(max_num_seqs=1, max_input_len=1, max_seq_len=length), torch.bfloat16)


@pytest.mark.parametrize(("free", "budget"), [(10, 0), (12, 2), (20, 10), (21, 10), (0, 0)])
def test_weights_stream_where_they_do_not_fit(free, budget):
    """What is left beside 10 bytes of other needs, at most all 10 of the weights."""
    assert streaming_budget(10, free, 10) == budget


def test_bytes_format_bytes():
    assert [format_bytes(count) for count in (0, 4_500_000, 10**9, 123_456_789_000)] == [
        "0.0 MB", "4.5 MB", "1.00 GB", "123.46 GB"
    ]  # fmt: skip
