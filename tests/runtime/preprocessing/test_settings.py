"""Limits, normalisation and sizes as Transformers reads and computes them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl import image_processing_qwen2_vl
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from qwen2vl_trt.errors import CheckpointError, LimitError, MediaError
from qwen2vl_trt.runtime.inputs.video import FrameSampling
from qwen2vl_trt.runtime.preprocessing.settings import PixelSettings, PreprocessorSettings, smart_resize
from tests.support.models import MINIMAL_CONFIG

DEFAULT = image_processing_qwen2_vl.Qwen2VLImageProcessor


class TestSmartResize:
    """The same answer as Transformers, which has no limit below the aspect ratio."""

    sides = st.integers(1, 6000)

    @settings(max_examples=500, deadline=None)
    @given(sides, sides, st.sampled_from([4, 28, 32]), st.integers(1, 10**6), st.integers(0, 10**7))
    def test_equals_transformers(self, height, width, factor, low, extra):
        try:
            expected = image_processing_qwen2_vl.smart_resize(height, width, factor, low, low + extra)
        except ValueError:
            with pytest.raises(MediaError, match=f"{width}x{height}"):
                smart_resize(height, width, factor, low, low + extra)
            return
        assert smart_resize(height, width, factor, low, low + extra) == expected

    @settings(max_examples=300, deadline=None)
    @given(sides, sides)
    def test_invariants(self, height, width):
        if max(height, width) > 200 * min(height, width):
            return
        rows, columns = smart_resize(height, width, 28, 3136, 1003520)
        assert rows % 28 == columns % 28 == 0
        assert min(rows, columns) >= 28
        assert 3136 <= rows * columns <= 1003520
        assert max(rows, columns) > 5600 or smart_resize(rows, columns, 28, 3136, 1003520) == (rows, columns)

    def test_an_area_at_its_limit_stays(self):
        assert smart_resize(50, 60, 28, 3136, 1003520) == (56, 56)
        assert smart_resize(50, 60, 28, 100, 3136) == (56, 56)

    def test_aspect_ratio_of_200_is_the_last(self):
        assert smart_resize(10, 2000, 28, 3136, 1003520)[0] == 28
        with pytest.raises(MediaError, match=r"2001x10 has an aspect ratio of 200\.1"):
            smart_resize(10, 2001, 28, 3136, 1003520)

    @pytest.mark.parametrize("size", [(0, 5), (5, 0)])
    def test_no_pixels(self, size):
        with pytest.raises(MediaError, match="no pixels"):
            smart_resize(*size, 28, 3136, 1003520)


class TestSettings:
    """``from_folder`` reads what Transformers reads."""

    def write(self, folder, name, **content):
        (folder / name).write_text(json.dumps(content))

    def test_defaults_are_transformers(self, tmp_path):
        settings = PreprocessorSettings.from_folder(tmp_path)
        assert settings == PreprocessorSettings()
        # The class attributes are shared and mutable, so the sizes are written out.
        assert (settings.image.min_pixels, settings.image.max_pixels) == (56 * 56, 28 * 28 * 1280)
        assert (settings.video.min_pixels, settings.video.max_pixels) == (128 * 28 * 28, 28 * 28 * 768)
        for pixels, reference in ((settings.image, DEFAULT()), (settings.video, Qwen2VLVideoProcessor())):
            assert list(pixels.image_mean) == list(reference.image_mean)
            assert list(pixels.image_std) == list(reference.image_std)
            assert pixels.rescale_factor == reference.rescale_factor
        reference = Qwen2VLVideoProcessor()
        assert settings.sampling == FrameSampling(
            2.0, reference.min_frames, reference.max_frames, reference.temporal_patch_size
        )

    def test_published_checkpoint(self, tmp_path):
        """One file with the old keys serves images and videos; frames have qwen-vl-utils' limits."""
        mean = [0.1, 0.2, 0.3]
        self.write(tmp_path, "preprocessor_config.json", min_pixels=3136, max_pixels=12845056, image_mean=mean)
        settings = PreprocessorSettings.from_folder(tmp_path)
        own = PixelSettings(3136, 12845056, image_mean=(0.1, 0.2, 0.3))
        assert settings.image == own
        assert settings.video == PixelSettings(128 * 28 * 28, 768 * 28 * 28, image_mean=(0.1, 0.2, 0.3))
        assert PreprocessorSettings.from_folder(tmp_path, cap_pixels_per_frame=False).video == own

    @pytest.mark.parametrize(("cap", "grid"), [(True, (40, 72)), (False, (52, 92))])
    def test_a_frame_of_720p_on_a_published_checkpoint(self, cap, grid, tmp_path):
        self.write(tmp_path, "preprocessor_config.json", min_pixels=3136, max_pixels=12845056)
        video = PreprocessorSettings.from_folder(tmp_path, cap_pixels_per_frame=cap).video
        height, width = smart_resize(720, 1280, 28, video.min_pixels, video.max_pixels)
        assert (height // 14, width // 14) == grid

    @pytest.mark.parametrize(
        "size",
        [{"shortest_edge": 4000, "longest_edge": 90000}, {"min_pixels": 4000, "max_pixels": 90000}],
    )
    def test_size_forms_and_own_video_file(self, size, tmp_path):
        self.write(tmp_path, "preprocessor_config.json", size=size)
        self.write(tmp_path, "video_preprocessor_config.json", max_pixels=200000, fps=4, max_frames=16)
        settings = PreprocessorSettings.from_folder(tmp_path)
        assert (settings.image.min_pixels, settings.image.max_pixels) == (4000, 90000)
        assert (settings.video.min_pixels, settings.video.max_pixels) == (128 * 28 * 28, 200000)
        assert settings.sampling == FrameSampling(fps=4, max_frames=16)

    def test_saved_by_transformers(self, tmp_path):
        size = {"shortest_edge": 4000, "longest_edge": 90000}
        DEFAULT(size=size, image_std=[0.5, 0.5, 0.5]).save_pretrained(tmp_path)
        settings = PreprocessorSettings.from_folder(tmp_path)
        assert settings.image == PixelSettings(4000, 90000, image_std=(0.5, 0.5, 0.5))

    def test_nested_file_wins(self, tmp_path):
        self.write(tmp_path, "preprocessor_config.json", min_pixels=1, max_pixels=2)
        self.write(
            tmp_path,
            "processor_config.json",
            image_processor={"size": {"shortest_edge": 5000, "longest_edge": 6000}},
            video_processor={"size": {"shortest_edge": 7000, "longest_edge": 8000}},
        )
        settings = PreprocessorSettings.from_folder(tmp_path)
        assert (settings.image.min_pixels, settings.image.max_pixels) == (5000, 6000)
        assert (settings.video.min_pixels, settings.video.max_pixels) == (7000, 8000)

    def test_overrides(self):
        settings = PreprocessorSettings().with_limits(max_pixels=50_000)
        assert (settings.image.min_pixels, settings.image.max_pixels) == (3136, 50_000)
        assert (settings.video.min_pixels, settings.video.max_pixels) == (50_000, 50_000)
        settings = PreprocessorSettings().with_limits(min_pixels=50_000, max_pixels=10**7)
        assert settings.video == PreprocessorSettings().video
        assert PreprocessorSettings().with_limits() == PreprocessorSettings()

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            ({"min_pixels": 0}, "min_pixels is 0; it must be at least 1"),
            ({"max_pixels": 0}, "max_pixels is 0; it must be at least 1"),
            ({"min_pixels": 10, "max_pixels": 9}, "min_pixels 10 and max_pixels 9"),
        ],
    )
    def test_impossible_limits(self, limits, message):
        with pytest.raises(LimitError, match=message):
            PreprocessorSettings().with_limits(**limits)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "cannot be read"),
            ("[]", "no JSON object"),
            ('{"do_resize": false}', "do_resize"),
            ('{"do_rescale": false}', "do_rescale is False; only None or True is supported"),
            ('{"do_normalize": false}', "do_normalize"),
            ('{"do_convert_rgb": false}', "do_convert_rgb"),
            ('{"do_center_crop": true}', "do_center_crop"),
            ('{"resample": 2}', "resample is 2; only None or 3 is supported"),
            ('{"num_frames": 8}', "num_frames is 8"),
            ('{"min_pixels": 0}', "min_pixels is 0; expected `int` >= 1"),
            ('{"min_pixels": []}', "min_pixels is ..; expected `int"),
            ('{"max_pixels": 1e9}', "max_pixels is 1000000000.0; expected `int"),
            ('{"max_pixels": 99999999999}', "max_pixels is 99999999999; expected `int` <= 1073741824"),
            ('{"min_pixels": 9000, "max_pixels": 8000}', "min_pixels 9000 and max_pixels 8000"),
            ('{"size": {"height": 448, "width": 448}}', "size.height is 448"),
            ('{"size": {"shortest": 448}}', "size.shortest is not known and may change the answer"),
            ('{"size": 448}', "size is 448; expected `object"),
            ('{"image_mean": [0.5, 0.5]}', "image_mean is .*length 3"),
            ('{"image_std": [0.5, 0.5, 0]}', r"image_std\[2\] is 0; expected `float` > 0"),
            ('{"rescale_factor": "1/255"}', "rescale_factor is '1/255'"),
            ('{"fps": 0}', "fps is 0"),
            ('{"do_sharpen": true}', "do_sharpen is not known and may change the answer"),
        ],
    )
    def test_bad_files(self, content, message, tmp_path):
        (tmp_path / "preprocessor_config.json").write_text(content)
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
            (tmp_path / name).write_text(content)
            with pytest.raises(CheckpointError, match=message) as raised:
                PreprocessorSettings.from_folder(tmp_path)
            assert name in str(raised.value)
            (tmp_path / name).unlink()
        if content in ("{", "[]"):
            return
        for name in ("image_processor", "video_processor"):
            (tmp_path / "processor_config.json").write_text(f'{{"{name}": {content}}}')
            with pytest.raises(CheckpointError, match=message) as raised:
                PreprocessorSettings.from_folder(tmp_path)
            assert f"processor_config.json: {name}" in str(raised.value)

    def test_everything_that_this_transformers_writes_is_known(self, tmp_path):
        image, video = DEFAULT(), Qwen2VLVideoProcessor()
        self.write(tmp_path, "processor_config.json", image_processor=image.to_dict(), video_processor=video.to_dict())
        assert PreprocessorSettings.from_folder(tmp_path).image == PixelSettings(3136, 28 * 28 * 1280)

    def test_everything_that_transformers_4_57_wrote_is_known(self, tmp_path):
        unset = ["crop_size", "device", "disable_grouping", "do_center_crop", "do_pad", "input_data_format", "pad_size"]
        own = {
            "default_to_square": True,
            "data_format": "channels_first",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        }
        size = {"longest_edge": 12845056, "shortest_edge": 3136}
        both = dict.fromkeys([*unset, "return_tensors", "min_pixels", "max_pixels"]) | own | {"size": size}
        self.write(tmp_path, "preprocessor_config.json", **both)
        extra = {
            "num_frames": None,
            "fps": None,
            "size_divisor": None,
            "video_metadata": None,
            "return_metadata": False,
        }
        self.write(tmp_path, "video_preprocessor_config.json", **both, **extra)
        settings = PreprocessorSettings.from_folder(tmp_path)
        assert (settings.image.max_pixels, settings.video.max_pixels) == (12845056, 12845056)

    @pytest.mark.parametrize("name", ["patch_size", "merge_size", "temporal_patch_size"])
    def test_patches_of_another_size_than_the_models(self, name, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(MINIMAL_CONFIG))
        self.write(tmp_path, "preprocessor_config.json", patch_size=14, merge_size=2, temporal_patch_size=2)
        PreprocessorSettings.from_folder(tmp_path)
        self.write(tmp_path, "video_preprocessor_config.json", **{name: 7})
        with pytest.raises(CheckpointError, match=f"video_preprocessor_config.json: {name} is 7; the model's"):
            PreprocessorSettings.from_folder(tmp_path)
