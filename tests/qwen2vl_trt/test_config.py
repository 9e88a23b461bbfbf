"""config.json in both layouts, checked against Transformers' reading of it."""

import copy
import json

import pytest
from transformers import Qwen2_5_VLConfig

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.errors import CheckpointError

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
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
PUBLISHED = {  # as Transformers 4 wrote them: the decoder's fields at the top level
    "3B": SHARED
    | {
        "hidden_size": 2048,
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
