"""Bounds against counts by hand; those of planning are compared with PyTorch's own counter in ``tests/planning``."""

from dataclasses import replace

import pytest

from qwen2vl_trt.benchmarks.cases import Case
from qwen2vl_trt.benchmarks.random_model import config_of
from qwen2vl_trt.benchmarks.roofline import Bound, Rates, bounds_of
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.precision import BF16, FP8, FP32, INT4_IN_FP32

RATES = Rates(copy=100.0, read={1000: 50.0}, gemm=1000.0, fp8_gemm=2000.0)
CONFIG = Qwen2VLConfig.from_dict(config_of("Qwen2.5-VL-7B"))
HIDDEN, INNER, KV, VOCABULARY = 3584, 18944, 512, 152064
LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * INNER
BLOCK = 4 * 1280 * 1280 + 3 * 1280 * 3420


def test_an_image_of_448x448_through_the_real_tower():
    case = Case("vision", "448x448", ((448, 448),), ((1, 32, 32),))
    found = bounds_of(case, CONFIG, BF16, RATES)["latency"]
    merger = 5120 * 5120 + 5120 * 3584
    attention = 2 * 1280 * (28 * 16 * 64 * 64 + 4 * 1024 * 1024)
    assert found.flops == 2 * (1024 * (32 * BLOCK + 1176 * 1280) + 256 * merger + attention)
    assert found.flops == pytest.approx(1.35e12, rel=0.01)
    assert found.bytes == 2 * (32 * BLOCK + 1176 * 1280 + merger)
    video = replace(case, grids=((3, 32, 32),))
    assert bounds_of(video, CONFIG, BF16, RATES)["latency"].flops == 3 * found.flops


def test_a_token_of_7b():
    """In the middle of 3: after a prompt of 100 and one token, itself the 102nd key."""
    case = Case("decoder", "d", batch=1, prompt=100, generate=4)
    found = bounds_of(case, CONFIG, BF16, RATES)["time_between_tokens"]
    weights = 28 * LAYER + VOCABULARY * HIDDEN
    assert found.flops == 2 * weights + 28 * 4 * HIDDEN * 102
    assert found.bytes == 2 * weights + 28 * 2 * 2 * KV * (102 + 1)  # 102 read, one written
    assert found.bytes == pytest.approx(14.1e9, rel=0.01)
    rows = bounds_of(replace(case, batch=3), CONFIG, BF16, RATES)["time_between_tokens"]
    assert rows.bytes - found.bytes == 2 * 28 * 2 * 2 * KV * 103  # weights once, caches each
    fp32 = bounds_of(case, CONFIG, FP32, RATES)["time_between_tokens"]
    assert (fp32.flops, fp32.bytes) == (found.flops, 2 * found.bytes)


def test_a_prompt_is_causal_and_has_the_logits_of_its_last_token():
    found = bounds_of(Case("decoder", "d", prompt=96, generate=1), CONFIG, BF16, RATES)
    assert set(found) == {"prefill"}
    logits, attention = 2 * VOCABULARY * HIDDEN, 28 * 4 * HIDDEN * sum(range(1, 97))
    assert found["prefill"].flops == 2 * 96 * 28 * LAYER + logits + attention


def test_products_of_fp8_numbers_are_those_of_the_blocks():
    vision = Case("vision", "448x448", ((448, 448),), ((1, 32, 32),))
    found = bounds_of(vision, CONFIG, FP8, RATES)["latency"]
    assert found.fp8_flops == 2 * 1024 * 32 * BLOCK
    assert found.bytes == 32 * BLOCK + 2 * (1176 * 1280 + 5120 * 5120 + 5120 * 3584)
    assert bounds_of(vision, CONFIG, replace(FP8, fp8_vision=False), RATES)["latency"].fp8_flops == 0
    decoder = Case("decoder", "d", batch=2, prompt=8, generate=2)
    token = bounds_of(decoder, CONFIG, FP8, RATES)["time_between_tokens"]
    assert token.fp8_flops == 2 * 2 * 28 * LAYER
    assert token.bytes == pytest.approx(28 * LAYER + 2 * VOCABULARY * HIDDEN, rel=0.01)
    unknown = replace(RATES, fp8_gemm=None)
    assert bounds_of(decoder, CONFIG, FP8, unknown) == {"prefill": None, "time_between_tokens": None}


def test_a_request_needs_the_length_of_its_prompt():
    case = Case("pipeline", "p", ((448, 448),), ((1, 32, 32),), batch=2, generate=8)
    assert bounds_of(case, CONFIG, BF16, RATES) == {}
    request = bounds_of(case, CONFIG, BF16, RATES, tokens=290)["latency"]
    states = bounds_of(replace(case, stage="hidden states"), CONFIG, BF16, RATES, tokens=290)["latency"]
    assert request.seconds > states.seconds


def test_weights_of_4_bits_with_their_scales_and_on_a_cpu_lm_head_in_8():
    case = Case("decoder", "d", batch=1, prompt=100, generate=4)
    layers, cache = 28 * LAYER * (0.5 + 2 / 128), 28 * 4 * 2 * KV * 103
    for device, head in (("cpu", 1), ("cuda", 4)):
        found = bounds_of(case, CONFIG, INT4_IN_FP32, RATES, device=device)["time_between_tokens"]
        assert found.bytes == layers + head * VOCABULARY * HIDDEN + cache
        assert found.fp8_flops == 0


def test_the_bound_of_fp8():
    assert Bound.of(RATES, flops=20_000, fp8_flops=16_000).seconds == 4_000 / 1000 + 16_000 / 2000
    unknown = replace(RATES, fp8_gemm=None)
    assert Bound.of(unknown, flops=20_000, fp8_flops=16_000) is None  # not BF16's
    assert Bound.of(unknown, flops=20_000).seconds == 20.0
    assert RATES.best(replace(RATES, fp8_gemm=3000.0)).fp8_gemm == 3000.0
    assert unknown.best(unknown).fp8_gemm is None


def test_the_bound_is_the_slower_of_both():
    memory = Bound.of(RATES, flops=1000, bytes=1000)
    assert (memory.seconds, memory.limit) == (10.0, "memory")
    arithmetic = Bound.of(RATES, flops=20_000, bytes=1000)
    assert (arithmetic.seconds, arithmetic.limit) == (20.0, "arithmetic")


def test_what_fits_a_cache_is_read_at_its_rate():
    rates = Rates(copy=10.0, read={10: 40.0, 100: 60.0, 1000: 20.0}, gemm=1.0, fp8_gemm=None)
    assert rates.memory(5) == 60.0  # the larger one shows what the cache can do
    assert rates.memory(150) == 60.0
    assert rates.memory(5000) == 20.0
    assert Rates(30.0, {1000: 20.0}, 1.0, None).memory(5000) == 30.0
    better = rates.best(Rates(5.0, {10: 80.0, 100: 1.0, 1000: 1.0}, 2.0, None))
    assert better == Rates(10.0, {10: 80.0, 100: 60.0, 1000: 20.0}, 2.0, None)
