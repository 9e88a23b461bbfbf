"""config.json in both layouts, checked against Transformers' reading of it."""

import copy
import json
from dataclasses import replace

import pytest
from transformers import Qwen2_5_VLConfig

from qwen2vl_trt.config import Qwen2VLConfig, VisionConfig
from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.vision import VisionTransformer

VISION = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
SHARED = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
}
PUBLISHED = {  # as Transformers 4 wrote them: the decoder's fields at the top level
    "3B": SHARED
    | {
        "hidden_size": 2048,
        "max_window_layers": 70,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "vision_config": VISION | {"out_hidden_size": 2048},
    },
    "7B": SHARED
    | {
        "hidden_size": 3584,
        "max_window_layers": 28,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "vision_config": VISION | {"out_hidden_size": 3584},
    },
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configurations_are_read_whole(size):
    raw = PUBLISHED[size]
    config = Qwen2VLConfig.from_dict(raw)
    assert config.text.hidden_size == raw["hidden_size"]
    assert config.text.head_dim == 128
    assert config.text.mrope_section == (16, 24, 24)
    assert config.text.rope_theta == 1e6
    assert config.text.tie_word_embeddings is raw["tie_word_embeddings"]
    assert config.vision.out_hidden_size == raw["hidden_size"]
    assert config.vision.head_dim == 80
    assert config.vision.qwen2_vl_dim == 1176
    assert config.vision.window_slots == 64
    assert config.vision.window_groups == 4
    assert config.vision.image_factor == 28
    assert config.vision.fullatt_block_indexes == (7, 15, 23, 31)
    assert config.vision.tokens_per_second == 2
    assert (config.image_token_id, config.video_token_id) == (151655, 151656)
    assert (config.vision_start_token_id, config.vision_end_token_id) == (151652, 151653)


@pytest.mark.parametrize("size", PUBLISHED)
def test_flat_and_nested_layouts_are_one_configuration(size, tmp_path):
    Qwen2_5_VLConfig(**copy.deepcopy(PUBLISHED[size])).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())
    assert "hidden_size" not in nested
    assert nested["text_config"]["hidden_size"] == PUBLISHED[size]["hidden_size"]
    assert Qwen2VLConfig.from_folder(tmp_path) == Qwen2VLConfig.from_dict(PUBLISHED[size])


def test_every_number_comes_from_the_file():
    raw = copy.deepcopy(PUBLISHED["7B"])
    raw["vision_config"] |= {"patch_size": 16, "in_chans": 1, "temporal_patch_size": 4, "window_size": 96}
    vision = Qwen2VLConfig.from_dict(raw).vision
    assert vision.qwen2_vl_dim == 16 * 16 * 4
    assert (vision.window_groups, vision.window_slots) == (3, 36)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl'"),
        ({"num_key_value_heads": 3}, "28 attention heads do not share 3 key-value heads"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 25]}}, r"mrope_section \[16, 24, 25\]"),
        ({"vision_config": VISION | {"out_hidden_size": 3584, "num_heads": 17}}, "hidden_size 1280 .* 17 heads"),
        ({"vision_config": VISION | {"out_hidden_size": 3584, "window_size": 100}}, "window_size 100"),
    ],
)
def test_contradictions_are_named(change, message):
    with pytest.raises(CheckpointError, match=message):
        Qwen2VLConfig.from_dict(copy.deepcopy(PUBLISHED["7B"]) | change)


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "image_token_id", "vision_config"])
def test_missing_field_is_named(field):
    raw = {name: value for name, value in PUBLISHED["7B"].items() if name != field}
    with pytest.raises(CheckpointError, match=f"field '{field}' is missing"):
        Qwen2VLConfig.from_dict(raw)


def test_unreadable_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Qwen2VLConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5')
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        Qwen2VLConfig.from_folder(tmp_path)


def test_json_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        Qwen2VLConfig.from_folder(tmp_path)


# What other releases and tools write, and what would be ignored


def nested(raw):
    """The layout of Transformers 5, and what 4.52 to 4.57 wrote: the decoder's fields in both places."""
    outer = {name: value for name, value in raw.items() if name not in TEXT_FIELDS}
    text = {name: value for name, value in raw.items() if name in TEXT_FIELDS}
    return outer | {"text_config": text}, raw | {"text_config": text | {"model_type": "qwen2_5_vl_text"}}


TEXT_FIELDS = set(Qwen2_5_VLConfig().text_config.to_dict()) | {"rope_theta", "rope_scaling"}
TEXT_FIELDS -= {"model_type", "architectures", "tie_word_embeddings"}


def test_a_vision_config_of_transformers_4_49_has_its_defaults():
    """It left out what its class has by default."""
    raw = copy.deepcopy(PUBLISHED["7B"])
    raw["vision_config"] = {
        "hidden_size": 1280,
        "in_chans": 3,
        "model_type": "qwen2_5_vl",
        "spatial_patch_size": 14,
        "tokens_per_second": 2,
        "torch_dtype": "bfloat16",
    }
    assert Qwen2VLConfig.from_dict(raw) == Qwen2VLConfig.from_dict(PUBLISHED["7B"])
    defaults = Qwen2_5_VLConfig().vision_config
    for name in ("depth", "hidden_size", "num_heads", "intermediate_size", "out_hidden_size", "patch_size"):
        assert getattr(VisionConfig(), name) == getattr(defaults, name)
    for name in ("temporal_patch_size", "spatial_merge_size", "window_size", "tokens_per_second"):
        assert getattr(VisionConfig(), name) == getattr(defaults, name)
    assert VisionConfig().fullatt_block_indexes == tuple(defaults.fullatt_block_indexes)


@pytest.mark.parametrize(
    "extra",
    [
        {"unsloth_version": "2025.3.19", "unsloth_fixed": True, "_name_or_path": "/data/sft", "pad_token_id": 151643},
        {"_attn_implementation_autoset": True, "temperature": 0.1, "do_sample": True, "dtype": "float16"},
        {"attention_dropout": 0.1, "use_cache": False, "quantization_config": {"quant_method": "modelopt"}},
        {"layer_types": ["full_attention"] * 28},
        {"use_sliding_window": True, "max_window_layers": 28},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"hidden_act": "swish", "id2label": {"0": "LABEL_0"}, "is_encoder_decoder": False, "pruned_heads": {}},
    ],
)
@pytest.mark.parametrize("layout", range(3))
def test_what_leaves_the_answer_alone_is_passed_over(extra, layout):
    raw = PUBLISHED["7B"] | extra
    assert Qwen2VLConfig.from_dict([raw, *nested(raw)][layout]) == Qwen2VLConfig.from_dict(PUBLISHED["7B"])


def test_everything_that_this_transformers_writes_is_known():
    config = Qwen2_5_VLConfig(**copy.deepcopy(PUBLISHED["7B"]))
    assert Qwen2VLConfig.from_dict(config.to_dict()) == Qwen2VLConfig.from_dict(PUBLISHED["7B"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True, "max_window_layers": 20}, "use_sliding_window is true.* 32768 from layer 20 on"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' or 'swish' is supported"),
        ({"attention_bias": False}, "attention_bias is not known and may change the answer; remove it if it does not"),
        ({"num_experts": 8}, "num_experts is not known"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not known"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True; only False is supported"),
        ({"pruned_heads": {"1": [0]}}, "pruned_heads is"),
        ({"use_sliding_window": "no"}, "use_sliding_window is 'no'"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers is 1000.*expected `int` <= 1024"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; expected `int`, got `bool`"),
        ({"num_hidden_layers": float("inf")}, "num_hidden_layers is inf; expected `int`"),
        ({"hidden_size": "x"}, "hidden_size is 'x'; expected `int`, got `str`"),
        ({"hidden_size": -1}, "hidden_size is -1; expected `int` >= 1"),
        ({"rope_scaling": 5}, "rope_scaling is 5; expected `object`"),
        ({"rms_norm_eps": None, "tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected `bool"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'; only"),
        ({"unheard_of": {}}, "unheard_of is not known and may change the answer"),
        ({"hidden_size": 3585}, "hidden_size 3585 does not split into 28 heads"),
    ],
)
@pytest.mark.parametrize("layout", range(3))
def test_what_would_be_ignored_or_has_no_meaning_is_named(change, message, layout):
    raw = PUBLISHED["7B"] | change
    with pytest.raises(CheckpointError, match=message) as raised:
        Qwen2VLConfig.from_dict([raw, *nested(raw)][layout])
    assert str(raised.value).startswith("config.json: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "vision_config.hidden_act is 'gelu'"),
        ({"patch_size": []}, "vision_config.patch_size is ..; expected `int`, got `array`"),
        ({"fullatt_block_indexes": 5}, "vision_config.fullatt_block_indexes is 5; expected `array`"),
        ({"fullatt_block_indexes": [7, -1]}, r"vision_config.fullatt_block_indexes\[1\] is -1; expected `int` >= 0"),
        ({"fullatt_block_indexes": [7, 32]}, "fullatt_block_indexes has 32; there are 32 blocks"),
        ({"tokens_per_second": 0}, "vision_config.tokens_per_second is 0; expected"),
        ({"torch_dtype": "float8_e4m3fn"}, "vision_config.torch_dtype is 'float8_e4m3fn'; only"),
        ({"in_channels": 1}, "in_channels and in_chans differ"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "vision_config.rope_parameters.rope_type is 'yarn'"),
        ({"deepstack_visual_indexes": [5]}, "vision_config.deepstack_visual_indexes is not known"),
        ({"out_hidden_size": 2048}, "out_hidden_size 2048 is not the decoder's hidden_size 3584"),
        ({"depth": 10**9}, "vision_config.depth is 1000000000; expected `int` <= 1024"),
    ],
)
def test_the_same_of_the_vision_tower(change, message):
    raw = copy.deepcopy(PUBLISHED["7B"])
    raw["vision_config"] |= change
    with pytest.raises(CheckpointError, match=message):
        Qwen2VLConfig.from_dict(raw)


def test_the_vision_towers_rotary_base_is_read():
    raw = copy.deepcopy(PUBLISHED["7B"])
    raw["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": 500.0}
    vision = Qwen2VLConfig.from_dict(raw).vision
    assert vision.rope_theta == 500
    assert VisionTransformer(replace(vision, depth=1)).inv_freq[1] == pytest.approx(500 ** (-2 / 40))


def test_no_key_value_heads_are_as_many_as_there_are_heads():
    assert Qwen2VLConfig.from_dict(PUBLISHED["7B"] | {"num_key_value_heads": None}).text.num_key_value_heads == 28


def test_a_field_that_differs_in_two_places_is_named():
    """Transformers 5 reads the inner one alone, 4 wrote both."""
    both = nested(PUBLISHED["7B"])[1]
    for name, value in (("rope_theta", 10000.0), ("rms_norm_eps", 1e-5), ("num_hidden_layers", 27)):
        with pytest.raises(CheckpointError, match=f"{name} at the top level differs from text_config's; keep one"):
            Qwen2VLConfig.from_dict(both | {name: value})


@pytest.mark.parametrize(("name", "token"), [("image_token_id", 152064), ("vision_start_token_id", 10**6)])
def test_a_token_outside_the_vocabulary_is_named(name, token):
    with pytest.raises(CheckpointError, match=f"{name} is {token}; the vocabulary has 152064 tokens"):
        Qwen2VLConfig.from_dict(PUBLISHED["7B"] | {name: token})
    with pytest.raises(CheckpointError, match="image_token_id and video_token_id are both 151655"):
        Qwen2VLConfig.from_dict(PUBLISHED["7B"] | {"video_token_id": 151655})


def test_a_file_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "config.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: it is nested too deeply"):
        Qwen2VLConfig.from_folder(tmp_path)
