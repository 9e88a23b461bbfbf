"""Plans against cases worked out by hand, and what cannot be planned."""

import dataclasses
import math

import pytest

from qwen2vl_trt.errors import CheckpointError, PlanError
from qwen2vl_trt.planning.capacity import Assumptions, Load, plan
from qwen2vl_trt.planning.tables import find_config, find_gpu

FULL = Assumptions(vision=1, prefill=1, decode=1, tp=1, reserve=0)
LOAD = Load(rows=32, columns=32, text_tokens=30, output_tokens=128, images_per_second=100)


def of(model, gpu="H200", load=LOAD, assumptions=FULL, **options):
    return plan(find_config(f"Qwen2.5-VL-{model}"), find_gpu(gpu), load, assumptions=assumptions, **options)


def test_the_bounds_of_an_h200():
    """790 TFLOP/s and 4.3 TB/s: an image in 1.70 ms, a token of 7B in 3.29 ms (304 a second)."""
    features = of("3B", load=dataclasses.replace(LOAD, output_tokens=0))
    assert features.vision_seconds == pytest.approx(1.342911e12 / 790e12, rel=1e-6)
    assert round(features.vision_seconds * 1e3, 2) == 1.70
    alone = of("7B", load=dataclasses.replace(LOAD, max_num_seqs=1, text_tokens=0, output_tokens=1), tp_size=1)
    cache = (258 + 0.5) * 57_344
    assert alone.step_seconds == pytest.approx((14_140_571_648 + cache) / 4.3e12, rel=1e-9)
    assert round(14_140_571_648 / 4.3e12 * 1e3, 1) == 3.3
    assert round(4.3e12 / 14_140_571_648) == 304


def test_features_need_no_decoder():
    found = of("7B", load=dataclasses.replace(LOAD, output_tokens=0, images_per_second=1157))
    assert (found.tp_size, found.batch, found.kv_bytes, found.step_seconds, found.prefill_seconds) == (1, 0, 0, 0, 0)
    # 790e12 / 1.347e12 = 586.6 images/s a GPU
    assert found.groups == found.gpus == 2
    assert found.images_per_second == pytest.approx(2 * 586.6, rel=1e-3)


def test_7b_by_hand():
    """Batch 256 in 448 slots, decoding bound by arithmetic; one GPU."""
    found = of("7B", tp_size=1)
    assert (found.prompt_tokens, found.slot_tokens, found.batch) == (288, 448, 256)
    assert found.kv_bytes_per_slot == 448 * 57_344
    vision = 1176 * 1280 + 32 * 19_686_400 + 5120 * 5120 + 5120 * 3584
    assert found.weight_bytes == 14_140_571_648 + 2 * 544_997_376 + 2 * vision
    prefill = (2 * 288 * 28 * 233_046_016 + 2 * 544_997_376 + 28 * 4 * 3584 * 288 * 289 / 2) / 790e12
    assert found.prefill_seconds == pytest.approx(prefill, rel=1e-9)
    context = 288 + 64
    reading = (14_140_571_648 + 256 * context * 57_344) / 4.3e12
    computing = 256 * (2 * (28 * 233_046_016 + 544_997_376) + 28 * 4 * 3584 * context) / 790e12
    assert found.step_seconds == pytest.approx(max(reading, computing), rel=1e-9)
    each = found.vision_seconds + prefill + 128 * max(reading, computing) / 256
    assert found.groups == math.ceil(100 * each)
    assert found.images_per_second == pytest.approx(found.groups / each)


def test_weights_of_4_bits_are_read_faster_and_computed_as_fast():
    load = dataclasses.replace(LOAD, max_num_seqs=1)
    plain, found = (of("7B", load=load, tp_size=1, precision=precision) for precision in ("bf16", "int4"))
    layers = 28 * 233_046_016
    assert plain.weight_bytes - found.weight_bytes == layers * (2 - 0.5 - 2 / 128)
    assert (plain.step_seconds - found.step_seconds) * 4.3e12 == pytest.approx(layers * (2 - 0.5 - 2 / 128))
    assert plain.prefill_seconds == found.prefill_seconds
    assert plain.vision_seconds == found.vision_seconds


def test_fractions_divide_the_rates():
    full = of("72B", tp_size=4)
    found = of("72B", tp_size=4, assumptions=Assumptions(vision=0.5, prefill=0.25, decode=0.8, tp=0.9, reserve=0.1))
    assert found.vision_seconds == pytest.approx(full.vision_seconds / 0.5)
    assert found.prefill_seconds == pytest.approx(full.prefill_seconds / 0.25 / 0.9**2)
    assert full.kv_available - found.kv_available == pytest.approx(14.1e9)
    one = dataclasses.replace(LOAD, max_num_seqs=1)
    reading = of("72B", tp_size=4, load=one).step_seconds
    assert of("72B", tp_size=4, load=one, assumptions=Assumptions()).step_seconds == pytest.approx(reading / 0.8 / 0.81)


def test_the_batch_is_what_the_memory_holds():
    """3B on a 24 GB card with a long cache: weights 7.5 GB, 36,864 bytes a token."""
    found = of("3B", "RTX-4090", dataclasses.replace(LOAD, max_seq_len=32_768), tp_size=1)
    assert found.weight_bytes == 2 * (36 * 77_070_336 + 151_936 * 2048 + 668_170_240) == 7_507_734_528
    assert found.kv_bytes_per_slot == 32_768 * 36_864
    assert found.batch == int((24e9 - 7_507_734_528) / (32_768 * 36_864)) == 13
    assert found.kv_bytes <= found.kv_available


def test_more_gpus_than_key_value_heads_keep_copies():
    two, four = of("3B", tp_size=2), of("3B", tp_size=4)
    assert of("3B", tp_size=1).kv_bytes_per_slot == 2 * two.kv_bytes_per_slot
    assert two.kv_bytes_per_slot == four.kv_bytes_per_slot


def test_fp8_halves_the_weights_but_not_the_head():
    bf16, fp8 = of("72B", tp_size=8), of("72B", tp_size=8, precision="fp8")
    layers = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 29_568)
    vision = bf16.weight_bytes - (2 * layers + 4 * 152_064 * 8192) / 8
    assert fp8.weight_bytes == pytest.approx((layers + 4 * 152_064 * 8192) / 8 + vision / 2)
    assert fp8.kv_bytes_per_slot == bf16.kv_bytes_per_slot
    assert fp8.prefill_seconds < bf16.prefill_seconds


def test_the_fewest_gpus_win():
    chosen = of("72B", assumptions=Assumptions())
    assert chosen.gpus == min(of("72B", assumptions=Assumptions(), tp_size=size).gpus for size in (2, 4, 8))
    for load in (1, 10, 1000):
        found = of("72B", load=dataclasses.replace(LOAD, images_per_second=load), assumptions=Assumptions())
        assert found.images_per_second >= load
        assert (found.groups - 1) * found.group_images_per_second < load


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("tp_size 8 does not divide the decoder's 28 attention heads", {"model": "7B", "tp_size": 8}),
        ("tp_size 1 does not fit: 1.* GB of weights a GPU and", {"model": "72B", "tp_size": 1}),
        (
            "no plan for a group of 1, 2, 4 or 8 GPUs: tp_size 1 does not fit.*tp_size 8 does not fit",
            {"model": "72B", "gpu": "L4", "load": dataclasses.replace(LOAD, max_seq_len=1_000_000)},
        ),
        ("A100-80GB has no FP8", {"model": "7B", "gpu": "a100-80gb", "precision": "fp8"}),
        (
            "--max-seq-len 300 is too small: the prompt has 288 tokens, its answer 128",
            {"model": "7B", "load": dataclasses.replace(LOAD, max_seq_len=300), "tp_size": 1},
        ),
        (  # said once, though no group fits
            "GPUs: --max-seq-len 300 is too small: the prompt has 288 tokens, its answer 128$",
            {"model": "3B", "load": dataclasses.replace(LOAD, max_seq_len=300)},
        ),
    ],
)
def test_what_cannot_be_planned(message, arguments):
    with pytest.raises(PlanError, match=message):
        of(**arguments)


def test_the_least_load_needs_a_gpu():
    assert of("3B", load=dataclasses.replace(LOAD, images_per_second=1e-12)).gpus == 1


def test_impossible_figures_are_refused():
    for wrong in ({"vision": 0}, {"decode": 1.1}, {"reserve": 1}, {"reserve": -0.1}, {"tp": float("nan")}):
        with pytest.raises(PlanError, match="fraction is"):
            Assumptions(**wrong)
    for rate in (0, -1, float("nan"), float("inf")):
        with pytest.raises(PlanError, match="--images-per-second is"):
            dataclasses.replace(LOAD, images_per_second=rate)


def test_gpus_and_models_go_by_any_spelling(tmp_path):
    assert find_gpu("h200").bandwidth == 4.3e12
    assert find_gpu("h200").sources["bf16"] == "measured on one (data sheet 989 TFLOP/s)"
    assert find_gpu("rtx 4090").bf16 == pytest.approx(0.8 * 165.2e12)
    assert find_gpu("H100").sources["fp8"].startswith("assumed 0.8 of the data sheet's 1979")
    with pytest.raises(PlanError, match="unknown GPU 'H300'; known: H200, H100, "):
        find_gpu("H300")
    with pytest.raises(PlanError, match=r"unknown model 'x'; known: tiny, Qwen2\.5-VL-3B, "):
        find_config("x")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        find_config(str(tmp_path))
    assert find_config("qwen2vl_trt/tiny/checkpoint").text.hidden_size == 128


def test_a_folder_that_is_no_checkpoint_does_not_stand_in_the_way_of_tiny(monkeypatch, tmp_path):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_config("tiny").text.hidden_size == 128
