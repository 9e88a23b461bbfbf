"""Limits: each bad one is named, with the way out."""

from pathlib import Path

import pytest

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.engines.profile import BuildConfig, BuildProfile, flag, usual_profile
from qwen2vl_trt.errors import BuildError, LimitError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("Qwen*.yaml"))
VISION = VisionConfig(
    depth=1, hidden_size=16, num_heads=2, intermediate_size=24, out_hidden_size=16, fullatt_block_indexes=(0,)
)


def test_defaults_take_a_full_hd_image():
    assert BuildProfile().as_dict() == {
        "min_hw_dims": 16,
        "max_hw_dims": 10816,
        "max_batch_size": 8,
        "max_num_seqs": 8,
        "max_input_len": 6144,
        "max_seq_len": 8192,
    }
    for config in CONFIGS:
        assert BuildProfile.from_dict(BuildConfig.from_yaml(config).limits) == BuildProfile(), config
    assert BuildProfile.names() == list(BuildProfile().as_dict())
    assert BuildProfile.from_dict({"max_batch_size": 2}) == BuildProfile(max_batch_size=2)


@pytest.mark.parametrize("name", ["tiny", "Qwen2.5-VL-3B-Instruct", "Qwen--Qwen2.5-VL-3B-Instruct", "Org--fine-tuned"])
def test_a_models_own_limits_whatever_the_spelling_of_its_name(name, monkeypatch, tmp_path):
    monkeypatch.setattr("qwen2vl_trt.engines.profile._CONFIGS", tmp_path)
    for known in ("tiny", "Qwen2.5-VL-3B"):
        (tmp_path / f"{known}.yaml").write_text(f"model: {known}\nmax_batch_size: 3\n")
    assert usual_profile(name).max_batch_size == (8 if name == "Org--fine-tuned" else 3)


@pytest.mark.parametrize("name", BuildProfile.names())
@pytest.mark.parametrize("value", [0, -1, 2.5, "8", None, True, 1 << 31, 10**30])
def test_a_limit_that_is_no_positive_number_is_named(name, value):
    with pytest.raises(BuildError) as refused:
        BuildProfile.from_dict({name: value})
    assert str(refused.value) == f"{flag(name)} is {value!r}; it must be a whole number from 1 to 2,147,483,647"


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"min_hw_dims": 200, "max_hw_dims": 100}, "--min-hw-dims 200 is larger than --max-hw-dims 100"),
        ({"max_input_len": 8192, "max_seq_len": 8192}, "--max-input-len 8192 leaves no room.*--max-seq-len 8192"),
        ({"max_input_len": 9000}, "--max-input-len 9000 leaves no room.*--max-seq-len 8192"),
        ({"max_images": 3}, "unknown build limit 'max_images'; known: min_hw_dims, max_hw_dims"),
        ({"zzz": 3, 5: 1}, "unknown build limit 5;"),
    ],
)
def test_limits_that_contradict_each_other(limits, said):
    with pytest.raises(BuildError, match=said):
        BuildProfile.from_dict(limits)


def test_equal_bounds_are_a_profile():
    assert BuildProfile(min_hw_dims=64, max_hw_dims=64, max_input_len=1, max_seq_len=2).max_hw_dims == 64


@pytest.mark.parametrize("patches", [(16, 16), (2, 64), (72, 72)])
def test_an_image_within_the_limits_passes(patches):
    BuildProfile(min_hw_dims=128).check_frame((1, *patches), "image 1", "any", VISION)


def test_an_image_too_large_is_named_with_the_way_out():
    with pytest.raises(LimitError) as refused:
        BuildProfile().check_frame((1, 216, 288), "image 3", "4032x3024", VISION)
    assert str(refused.value) == (
        "image 3 (4032x3024) needs 62,208 patches; this engine takes 16 to 10,816 (--max-hw-dims)."
        " Pass --max-pixels 2119936 to shrink it, or rebuild."
    )


def test_an_image_too_small_is_named_with_the_way_out():
    with pytest.raises(LimitError) as refused:
        BuildProfile(min_hw_dims=128).check_frame((1, 4, 4), "video 1", "56x56", VISION)
    assert str(refused.value) == (
        "video 1 (56x56) needs 16 patches; this engine takes 128 to 10,816 (--min-hw-dims)."
        " Pass --min-pixels 25088 to enlarge it, or rebuild."
    )


def test_frames_count_one_by_one():
    """A video has as many attention sequences as frames; none of them may be larger than an image."""
    profile = BuildProfile(min_hw_dims=4, max_hw_dims=64)
    profile.check_frame((100, 8, 8), "video 1", "112x112", VISION)
    with pytest.raises(LimitError):
        profile.check_frame((1, 8, 10), "video 1", "140x112", VISION)


def test_a_configuration_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: Qwen2.5-VL-7B\nmax_batch_size: 3\n")
    assert BuildConfig.from_yaml(path) == BuildConfig("Qwen2.5-VL-7B", {"max_batch_size": 3})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model: [unclosed", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"", "does not name its model"),
        (b"- model: tiny\n", "does not name its model"),
        (b"max_batch_size: 3\n", "does not name its model"),
        (b"model: 7\n", "does not name its model"),
        (b"model: tiny\nmax_batch_size: 0\n", "--max-batch-size is 0"),
        (b"model: tiny\nmax_batch_size: many\n", "--max-batch-size is 'many'"),
        (b"model: tiny\nmax_images: 4\n", "unknown build limit 'max_images'"),
        (b"model: tiny\n1: 4\nmax_images: 2\n", "unknown build limit 1"),
        (b"model: tiny\nmin_hw_dims: 9\nmax_hw_dims: 8\n", "--min-hw-dims 9 is larger than"),
    ],
)
def test_a_bad_configuration_file_is_named(tmp_path, content, said):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(BuildError) as refused:
        BuildConfig.from_yaml(path)
    assert str(refused.value).startswith(str(path))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_configuration_file_is_named(tmp_path):
    with pytest.raises(BuildError, match=r"none\.yaml cannot be read: No such file or directory"):
        BuildConfig.from_yaml(tmp_path / "none.yaml")
