"""What is over a limit and what is not, and limits that a user changes."""

import math
from dataclasses import replace

import pytest

from qwen2vl_trt.accuracy.figures import Agreement, Figures
from qwen2vl_trt.accuracy.tolerance import TOLERANCES, Tolerance, model_order, tolerance_of
from qwen2vl_trt.errors import LimitError

GOOD = Figures(1e-6, 1e-7, 1e-6, 1e-7, 1.0, 1.0, 10)
BASELINE = replace(GOOD, mean_relative=1e-3)


@pytest.mark.parametrize(
    ("precision", "name", "change", "reason"),
    [
        ("fp32", "image_embeds", {"max_relative": 2e-5}, "maximum relative error 2.00e-05 is over 1e-05"),
        ("fp32", "visual.blocks.3", {"max_relative": 2e-5}, "maximum relative"),
        ("fp32", "hidden_states", {"max_relative": 2e-5}, "maximum relative"),
        ("fp32", "model.layers.3", {"max_relative": 2e-5}, "maximum relative"),
        ("fp32", "logits", {"max_relative": 2e-5}, None),
        ("fp32", "decode_logits", {"max_relative": 2e-4}, "maximum relative"),
        ("bf16", "image_embeds", {"cosine": 0.9998}, "cosine 0.999800 is below 0.9999"),
        ("bf16", "image_embeds", {"mean_relative": 1.2e-3}, "over 1.15 times that of PyTorch's BF16"),
        ("bf16", "image_embeds", {"mean_relative": 1.1e-3}, None),
        ("bf16", "hidden_states", {"mean_relative": 1.2e-3, "max_relative": 1.0}, "over 1.15 times"),
        ("bf16", "logits", {"mean_relative": 2.9e-3}, None),
        ("bf16", "logits", {"mean_relative": 3.1e-3}, "over 3 times"),
        ("fp8", "hidden_states", {"cosine": 0.98}, "cosine 0.980000 is below 0.99"),
        ("fp8", "hidden_states", {"mean_relative": 0.5}, None),
        ("int8", "image_embeds", {"cosine": 0.9998}, "cosine 0.999800 is below 0.9999"),
        ("int8", "logits", {"cosine": 0.9989}, "cosine 0.998900 is below 0.999"),
        ("int4", "hidden_states", {"cosine": 0.96, "mean_relative": 0.2}, None),
        ("nvfp4", "hidden_states", {"cosine": 0.94}, "cosine 0.940000 is below 0.95"),
        ("fp8", "logits", {"max_absolute": math.inf}, "not finite"),
        ("fp32", "model.layers.0", {"max_absolute": math.nan}, "not finite"),
        ("fp32", "pixel_values", {"max_absolute": 0.031}, "differs by 3.10e-02"),
        ("fp32", "pixel_values", {"max_absolute": 0.02}, None),
        ("fp8", "input_ids", {"max_absolute": 1.0}, "differs by"),
        ("bf16", "image_embeds", {"max_relative": math.nan, "cosine": math.nan}, "cosine nan"),
    ],
)
def test_a_figure_beyond_its_limit_is_a_departure(precision, name, change, reason):
    found = TOLERANCES[precision].departure(name, replace(GOOD, **change), BASELINE)
    assert (found is None) if reason is None else (reason in found)


def test_a_precision_decides_how_many_tokens_may_differ():
    assert TOLERANCES["fp32"].token_departure(Agreement(10, 10, None)) is None
    assert "9 of 10" in TOLERANCES["fp32"].token_departure(Agreement(9, 10, 3))
    assert TOLERANCES["bf16"].token_departure(Agreement(0, 10, 0)) is None
    assert TOLERANCES["fp8"].token_departure(Agreement(9, 10, 3)) is None
    assert "fewer than 90%" in TOLERANCES["fp8"].token_departure(Agreement(8, 10, 3))


def test_the_coarser_precision_sets_the_limits():
    assert tolerance_of("bf16", "fp32") is tolerance_of("fp16") is TOLERANCES["bf16"]
    assert tolerance_of("fp8", "fp32") is tolerance_of("fp32", "fp8") is TOLERANCES["fp8"]
    assert tolerance_of("fp32") is TOLERANCES["fp32"]


def test_a_rounded_reference_makes_no_baseline():
    limits = tolerance_of("fp32", "bf16")
    assert limits == tolerance_of("bf16", "bf16")
    assert (limits.baseline, limits.vision_cosine, limits.decoder_cosine) == (None, 0.9999, 0.999)


def test_limits_can_be_changed_and_lifted():
    changed = TOLERANCES["bf16"].override(["baseline=none", "vision-cosine=0.9", "logits=1e-2"])
    assert changed == replace(TOLERANCES["bf16"], baseline=None, vision_cosine=0.9, logits=0.01)


@pytest.mark.parametrize(
    ("setting", "message"),
    [("cosine=1", "unknown limit 'cosine'"), ("logits=much", "'much' is neither"), ("logits", "'' is neither")],
)
def test_settings_that_mean_nothing(setting, message):
    with pytest.raises(LimitError, match=message):
        Tolerance().override([setting])


def test_outputs_are_listed_as_the_model_computes_them():
    names = ["pixel_values", "input_ids", "visual.patch_embed", "visual.blocks.2", "visual.blocks.10", "image_embeds"]
    names += ["model.layers.0", "model.layers.9", "model.layers.11", "hidden_states", "logits", "decode_logits"]
    assert sorted(sorted(names), key=model_order) == names
