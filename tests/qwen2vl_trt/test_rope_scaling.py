"""Linear scaling and YaRN in every spelling, to the last bit as Transformers computes them; other types are refused."""

import copy
import json

import pytest
import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.mrope import mrope_config, rotary_cos_sin, rotary_frequencies
from tests.qwen2vl_trt.test_config import PUBLISHED

SECTION = {"mrope_section": [16, 24, 24]}
QWENS_RECIPE = {"type": "yarn", **SECTION, "factor": 4, "original_max_position_embeddings": 32768}
SCALINGS = {
    "the published": {"type": "mrope", **SECTION},
    "of Transformers 4": {"type": "default", "rope_type": "default", **SECTION},
    "Qwen's recipe": QWENS_RECIPE,
    "rope_type": {"rope_type": "yarn", **SECTION, "factor": 4.0, "original_max_position_embeddings": 32768},
    "both types": QWENS_RECIPE | {"rope_type": "yarn"},
    "its own theta": QWENS_RECIPE | {"rope_theta": 1000000.0},
    "original positions left out": {"type": "yarn", **SECTION, "factor": 2.5},
    "factor null": QWENS_RECIPE | {"factor": None},
    "attention_factor": QWENS_RECIPE | {"attention_factor": 1.3},
    "betas": QWENS_RECIPE | {"beta_fast": 20, "beta_slow": 2.5},
    "mscale": QWENS_RECIPE | {"mscale": 0.7, "mscale_all_dim": 1.2},
    "mscale alone": QWENS_RECIPE | {"mscale": 0.7},
    "not truncated": QWENS_RECIPE | {"truncate": False},
    "betas alike": QWENS_RECIPE | {"beta_fast": 3, "beta_slow": 3, "truncate": False},
    "factor of 1": QWENS_RECIPE | {"factor": 1.0},
    "linear": {"type": "linear", "factor": 4.0, **SECTION},
    "linear in words of 5": {"rope_type": "linear", "factor": 3, **SECTION},
    "no sections": {"type": "linear", "factor": 2.0},
}


def layouts(scaling):
    """``config.json`` of 7B with a ``rope_scaling``, in all places that it may have."""
    flat = copy.deepcopy(PUBLISHED["7B"])
    nested = {name: flat.pop(name) for name in list(flat) if name in TEXT_FIELDS}
    theta = nested.pop("rope_theta")
    del nested["rope_scaling"]
    inside = {"rope_theta": theta} | scaling
    return {
        "flat": flat | nested | {"rope_theta": theta, "rope_scaling": scaling},
        "flat, of 5": flat | nested | {"rope_parameters": inside},
        "nested": flat | {"text_config": nested | {"rope_theta": theta, "rope_scaling": scaling}},
        "nested, of 5": flat | {"text_config": nested | {"rope_parameters": inside}},
    }


TEXT_FIELDS = Qwen2_5_VLConfig().text_config.to_dict().keys() | {"rope_theta", "rope_scaling"}
TEXT_FIELDS -= {"model_type", "architectures", "tie_word_embeddings"}


def transformers_rotary(raw):
    return Qwen2_5_VLRotaryEmbedding(Qwen2_5_VLConfig(**copy.deepcopy(raw)).text_config)


@pytest.mark.parametrize("layout", layouts(QWENS_RECIPE))
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_transformers(name, layout):
    raw = layouts(SCALINGS[name])[layout]
    reference = transformers_rotary(raw)
    found, scale = rotary_frequencies(Qwen2VLConfig.from_dict(raw).text)
    assert torch.equal(found, reference.inv_freq)
    assert scale == reference.attention_scaling


def test_scalings_differ_from_each_other():
    """What is compared above is not one and the same thing."""
    found = {name: rotary_frequencies(Qwen2VLConfig.from_dict(layouts(s)["flat"]).text) for name, s in SCALINGS.items()}
    plain, _ = found["the published"]
    yarn, scale = found["Qwen's recipe"]
    assert not torch.equal(plain, yarn)
    assert scale == pytest.approx(1 + 0.1 * 1.3862943611)
    assert torch.equal(found["linear"][0], plain / 4)
    different = ("attention_factor", "betas", "mscale", "not truncated", "betas alike", "factor null", "linear")
    assert all(scale != found[name][1] or not torch.equal(yarn, found[name][0]) for name in different)


@pytest.mark.parametrize("name", ["Qwen's recipe", "linear"])
def test_cosines_and_sines_far_beyond_the_trained_positions(name):
    raw = layouts(SCALINGS[name])["flat"]
    config = Qwen2VLConfig.from_dict(raw).text
    positions = torch.randint(0, 128000, (3, 1, 500), generator=torch.Generator().manual_seed(0))
    inv_freq, scale = rotary_frequencies(config)
    expected = transformers_rotary(raw)(torch.zeros(1), positions)
    for found, reference in zip(rotary_cos_sin(positions, inv_freq, config.mrope_section, scale), expected):
        assert torch.allclose(found, reference[..., :64], rtol=0, atol=1e-6)


def test_tensorrt_llms_table_has_the_scaled_angles():
    """In the form that its releases before 1.1 take."""
    raw = layouts(QWENS_RECIPE)["flat"] | {"max_position_embeddings": 50}
    positions = torch.arange(9).expand(3, -1)
    table = mrope_config(positions, 0, Qwen2VLConfig.from_dict(raw).text)["mrope_rotary_cos_sin"].view(50, 64, 2)
    cos, sin = transformers_rotary(raw)(torch.zeros(1), torch.arange(50).expand(3, 1, -1))
    assert torch.allclose(table, torch.stack([cos[0, :, :64], sin[0, :, :64]], dim=-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", layouts(QWENS_RECIPE))
@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "dynamic", "factor": 2.0, **SECTION}, "rope_type is 'dynamic'; default, linear, yarn are supported"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}, "rope_type is 'longrope'"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "rope_type is 'llama3'"),
        ({"rope_type": "proportional"}, "rope_type is 'proportional'"),
        ({"type": "mrope", "rope_type": "yarn", "factor": 4}, "rope_type is 'yarn' and type 'mrope'; keep one"),
        ({"type": "mrope", "factor": 4, **SECTION}, r"\.factor is not known"),
        ({"type": "linear", "factor": 4, "beta_fast": 3}, r"\.beta_fast is not known"),
        ({"type": "linear"}, "field 'factor' is missing"),
        ({"type": "yarn"}, "field 'factor' is missing"),
        (QWENS_RECIPE | {"factor": 0}, r"\.factor is 0; expected `float` > 0"),
        (QWENS_RECIPE | {"factor": "4"}, r"\.factor is '4'; expected `float"),
        (QWENS_RECIPE | {"factor": True}, r"\.factor is True"),
        (QWENS_RECIPE | {"original_max_position_embeddings": 10**30}, "original_max_position_embeddings is 1000"),
        (QWENS_RECIPE | {"truncate": 1}, r"\.truncate is 1"),
        (QWENS_RECIPE | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1 or None"),
        (QWENS_RECIPE | {"mrope_interleaved": True}, "mrope_interleaved is not known"),
        (QWENS_RECIPE | {"mrope_section": [16, 24, 25]}, "must add up to half the head size 128"),
        (QWENS_RECIPE | {"mrope_section": [16, [24], 24]}, r"mrope_section\[1\] is \[24\]"),
        (QWENS_RECIPE | {"mrope_section": [64, 64]}, "mrope_section is .*length 3"),
        (QWENS_RECIPE | {"type": 5}, r"\.type is 5"),
    ],
)
def test_what_would_be_ignored_is_refused(scaling, message, layout):
    with pytest.raises(CheckpointError, match=message) as raised:
        Qwen2VLConfig.from_dict(layouts(scaling)[layout])
    assert "\n" not in str(raised.value)
    assert "rope_" in str(raised.value) or "mrope_section" in str(raised.value)


def test_two_places_that_differ_are_refused():
    flat = layouts(QWENS_RECIPE)["flat"]
    both = flat | {"rope_parameters": SCALINGS["the published"] | {"rope_theta": 1e6}}
    with pytest.raises(CheckpointError, match="rope_scaling and rope_parameters differ"):
        Qwen2VLConfig.from_dict(both)
    with pytest.raises(CheckpointError, match=r"rope_theta is 10000\.0 in it and 1000000\.0 beside it"):
        Qwen2VLConfig.from_dict(flat | {"rope_scaling": QWENS_RECIPE | {"rope_theta": 10000.0}})
    nested = layouts(SCALINGS["the published"])["nested"]  # Transformers 5 would drop what stands at the top
    with pytest.raises(CheckpointError, match="rope_scaling at the top level differs from text_config's"):
        Qwen2VLConfig.from_dict(nested | {"rope_scaling": QWENS_RECIPE})


def test_saved_again_by_transformers_it_stays(tmp_path):
    Qwen2_5_VLConfig(**layouts(QWENS_RECIPE)["flat"]).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["rope_parameters"]["rope_type"] == "yarn"
    assert Qwen2VLConfig.from_folder(tmp_path) == Qwen2VLConfig.from_dict(layouts(QWENS_RECIPE)["flat"])
