"""Sizes within the checkpoint's limits and the engines', as Transformers makes them of the limits in force."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as transformers_resize

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.arguments import usual_profile
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import LimitError, MediaError
from qwen2vl_trt.media_options import ImageOptions, VideoOptions
from qwen2vl_trt.runtime.options import PipelineOptions
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor
from qwen2vl_trt.runtime.preprocessing.settings import PixelSettings, PreprocessorSettings
from qwen2vl_trt.runtime.preprocessing.sizes import SizeRules
from tests.support.models import model_config
from tests.support.pictures import merge_order

CONFIG = Qwen2VLConfig.from_dict(model_config().to_dict()).vision
PUBLISHED = PixelSettings(3136, 12_845_056)
MODELS = ("tiny", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen2.5-VL-32B", "Qwen2.5-VL-72B", "a checkpoint of one's own")


def rules(profile=None, image=PUBLISHED, video=PUBLISHED, strict_size=False):
    profile = BuildProfile() if profile is None else profile
    return SizeRules(CONFIG, PreprocessorSettings(image, video, profile=profile, strict_size=strict_size))


class TestImages:
    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("size", [(4032, 3024), (3024, 4032), (1920, 1080), (1362, 1724), (100, 100), (1, 1)])
    def test_what_people_have_is_taken(self, model, size):
        """A phone's photo, a screen, a page, a thumbnail; as Transformers makes it of the limits in common."""
        width, height = size
        profile = usual_profile(model)
        found = rules(profile).image(height, width)
        assert profile.takes(found.grid)
        least, most = max(3136, 196 * profile.min_hw_dims), 196 * profile.max_hw_dims
        resized = transformers_resize(height, width, 28, least, most)
        assert (found.resized_height, found.resized_width) == resized
        assert (found.width, found.height) == size
        assert found.grid == (1, resized[0] // 14, resized[1] // 14)
        assert found.tokens == resized[0] * resized[1] // 784

    def test_a_full_hd_image_passes_as_it_is(self):
        for model in MODELS[1:5]:
            found = rules(usual_profile(model)).image(1080, 1920)
            assert (found.resized_width, found.resized_height, found.limited_by) == (1932, 1092, None)

    @settings(max_examples=500, deadline=None)
    @given(
        st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 9000), st.integers(0, 9000), st.integers(1, 10**6),
        st.integers(0, 10**7),
    )  # fmt: skip
    def test_every_image_fits_and_keeps_its_size_where_it_can(self, height, width, low, more, least, extra):
        assume(max(height, width) <= 200 * min(height, width))
        profile = BuildProfile(low, low + more)
        image = PixelSettings(least, least + extra)
        expected = transformers_resize(height, width, 28, least, least + extra)
        grid = (1, expected[0] // 14, expected[1] // 14)
        if -(-low // 4) > (low + more) // 4:
            assume(not profile.takes(grid))
            with pytest.raises(LimitError, match="a patch count is a multiple of 4"):
                rules(profile, image).image(height, width, name="image 3")
            return
        found = rules(profile, image).image(height, width)
        assert profile.takes(found.grid)
        if profile.takes(grid):
            assert (found.grid, found.limited_by) == (grid, None)
            return
        too_large = grid[1] * grid[2] > profile.max_hw_dims
        assert found.limited_by == ("max_hw_dims" if too_large else "min_hw_dims")
        narrow = image.clamped(196 * low, 196 * (low + more))
        common = transformers_resize(height, width, 28, narrow.min_pixels, narrow.max_pixels)
        if profile.takes((1, common[0] // 14, common[1] // 14)):
            assert (found.resized_height, found.resized_width) == common

    def test_the_nearest_size_where_rounding_leaves_the_limits(self):
        strip = rules(BuildProfile(4, 40)).image(28, 2800)  # Transformers makes 1x31 groups of it, ten are taken
        assert (strip.resized_width, strip.resized_height) == (280, 28)
        narrow = rules(BuildProfile(40, 40), PixelSettings(1, 10**7)).image(500, 510)
        assert {narrow.resized_width // 28, narrow.resized_height // 28} == {2, 5}  # 10 groups are 1x10 or 2x5

    def test_strict_sizes_are_refused_as_the_engine_refuses_them(self):
        strict = rules(strict_size=True)
        with pytest.raises(LimitError, match=r"image 3 \(4032x3024\) needs .* patches; this engine takes 16 to 10,816"):
            strict.image(3024, 4032, name="image 3")
        with pytest.raises(LimitError, match=r"\(100x100\) needs 64 patches.*--min-pixels 25088"):
            rules(BuildProfile(min_hw_dims=128), strict_size=True).image(100, 100)
        assert strict.image(448, 448).limited_by is None
        with pytest.raises(MediaError, match="image 3: 2500x10 has an aspect ratio of 250"):
            rules().image(10, 2500, name="image 3")

    def test_options_of_a_part(self):
        image = rules(BuildProfile(4, 5184)).image
        found = image(100, 300, options=ImageOptions(min_pixels=3136, max_pixels=3136))
        assert found.tokens == 3  # as Transformers makes it: 1 row of 3
        assert image(100, 100, options=ImageOptions(min_pixels=200_000)).tokens == 256
        # One limit that contradicts the checkpoint's moves it.
        assert image(100, 100, options=ImageOptions(max_pixels=784)).tokens == 1
        named = image(1000, 1000, options=ImageOptions(resized_height=290, resized_width=400))
        assert (named.resized_height, named.resized_width) == (280, 392)  # rounded as qwen-vl-utils does
        assert (named.height, named.width) == (1000, 1000)

    def test_a_size_that_is_named_is_not_changed_for_the_engines(self):
        for height, width in ((2800, 2800), (56, 56)):
            with pytest.raises(LimitError, match=rf"^image 2: resized_height {height} .* takes 128 to 5,184"):
                rules(BuildProfile(128, 5184)).image(
                    100, 100, name="image 2", options=ImageOptions(resized_height=height, resized_width=width)
                )


class TestANamedSizeBeyondTheCheckpointsLimits:
    """qwen-vl-utils gives it to Transformers' processor, which resizes once more: the size is the same."""

    @pytest.mark.parametrize(
        ("named", "limit"), [((1400, 1400), "max_pixels"), ((28, 28), "min_pixels"), ((290, 400), None)]
    )
    def test_it_is_resized_and_reported(self, named, limit):
        options = ImageOptions(resized_height=named[0], resized_width=named[1])
        pixels = PixelSettings(3136, 784 * 1280)
        found = rules(BuildProfile(4, 20000), pixels).image(100, 300, options=options)
        rounded = transformers_resize(*named, 28, 3136, 784 * 16384)  # qwen-vl-utils' own limits
        expected = transformers_resize(*rounded, 28, 3136, 784 * 1280)
        assert (found.resized_height, found.resized_width, found.limited_by) == (*expected, limit)
        strict = rules(BuildProfile(4, 20000), pixels, strict_size=True)
        if limit is None:
            assert strict.image(100, 300, options=options) == found
            return
        with pytest.raises(LimitError, match=r"image 2: resized_height .* takes 3,136 to 1,003,520 \(min_pixels"):
            strict.image(100, 300, name="image 2", options=options)

    def test_frames(self):
        options = VideoOptions(resized_height=1400, resized_width=1400)
        video = rules(BuildProfile(4, 20000), video=PixelSettings(100_352, 602_112)).video
        assert video(4, 100, 100, 2.0, options=options).limited_by == "max_pixels"


class TestTheWayOutOfStrictSizes:
    @pytest.mark.parametrize(
        ("profile", "size", "options", "message"),
        [
            (BuildProfile(16, 180), 700, ImageOptions(), "Pass --max-pixels 35280 to shrink it"),
            (BuildProfile(16, 180), 700, ImageOptions(max_pixels=10**6), "Give it max_pixels 35280 to shrink it"),
            (BuildProfile(16, 180), 56, ImageOptions(min_pixels=10**6), "Leave its min_pixels 1000000 out"),
            (BuildProfile(512, 900), 700, ImageOptions(max_pixels=3136), "Leave its max_pixels 3136 out"),
            (BuildProfile(512, 900), 56, ImageOptions(min_pixels=3136), "Give it min_pixels 100352 to enlarge it"),
        ],
    )
    def test_it_is_not_one_that_the_request_overrules(self, profile, size, options, message):
        with pytest.raises(LimitError, match=message):
            rules(profile, strict_size=True).image(size, size, options=options)


def test_the_documentations_sizes_are_those_that_json_prints():
    page = (Path(__file__).parents[3] / "docs" / "guide" / "inputs.md").read_text(encoding="utf-8")
    documented = json.loads(page.split("```json")[1].split("```")[0])
    image = rules().image(3024, 4032)
    video = rules(video=PixelSettings(100_352, 602_112)).video(16, 720, 1280, 2.0)
    assert documented == {"images": [image.as_json()], "videos": [video.as_json()]}


class TestPixels:
    """Bit for bit those of Transformers' processors with the limits in force."""

    def test_an_image_that_is_shrunk_for_the_engine(self):
        image = torch.randint(0, 256, (3, 700, 1000), dtype=torch.uint8)
        for profile, size in (
            (BuildProfile(16, 400), {"shortest_edge": 3136, "longest_edge": 400 * 196}),
            (BuildProfile(4000, 9000), {"shortest_edge": 4000 * 196, "longest_edge": 9000 * 196}),
            (BuildProfile(16, 9000), {"shortest_edge": 3136, "longest_edge": 12_845_056}),
        ):
            packed = Preprocessor(CONFIG, PreprocessorSettings(PUBLISHED, profile=profile)).preprocess([image])
            expected = Qwen2VLImageProcessor(size=size)(images=image, return_tensors="pt")
            assert [list(grid) for grid in packed.grids] == expected["image_grid_thw"].tolist()
            assert torch.equal(merge_order(packed), expected["pixel_values"])

    def test_frames_that_are_shrunk_for_the_engine(self):
        frames = torch.randint(0, 256, (2, 3, 300, 500), dtype=torch.uint8)
        settings = PreprocessorSettings(video=PUBLISHED, profile=BuildProfile(16, 400))
        packed = Preprocessor(CONFIG, settings).preprocess(videos=[frames])
        size = {"shortest_edge": 3136, "longest_edge": 400 * 196}
        reference = Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False)
        assert torch.equal(merge_order(packed), reference(videos=[frames], return_tensors="pt")["pixel_values_videos"])


class TestVideos:
    def test_a_full_hd_video_is_taken_by_every_configuration(self):
        for model in MODELS:
            profile = usual_profile(model)
            found = rules(profile).video(16, 1080, 1920, 2.0)
            assert profile.takes(found.grid)
            assert (found.frames, found.grid[0], found.second_per_grid) == (16, 8, 1.0)

    def test_total_pixels_are_shared_out_as_in_qwen_vl_utils(self):
        """``max(min(VIDEO_MAX_PIXELS, total_pixels / nframes * FRAME_FACTOR), int(min_pixels * 1.05))``."""
        video = rules(BuildProfile(4, 5184), video=PixelSettings(100_352, 602_112)).video
        for total, most in ((10_000_000, 602_112), (4_000_000, 400_000), (100, int(100_352 * 1.05))):
            found = video(20, 720, 1280, 2.0, options=VideoOptions(total_pixels=total))
            resized = transformers_resize(720, 1280, 28, 100_352, most)
            assert (found.resized_height, found.resized_width) == resized

    def test_pixels_go_before_frames(self):
        shorten = rules(BuildProfile(4, 5184), video=PixelSettings(100_352, 602_112))
        whole = shorten.video(32, 720, 1280, 2.0)
        assert whole.tokens == 16 * 720
        smaller, kept = shorten.video_within(8000, whole)
        assert (smaller.frames, list(kept), smaller.second_per_grid) == (32, list(range(32)), 1.0)
        assert 7000 < smaller.tokens <= 8000
        assert (smaller.resized_height, smaller.resized_width) == transformers_resize(720, 1280, 28, 100_352, 392_000)
        fewer, kept = shorten.video_within(1000, whole)
        assert fewer.grid[1] * fewer.grid[2] // 4 <= 128  # of a frame, the floor
        assert (fewer.frames, list(kept)) == (16, list(range(0, 32, 2)))
        assert (fewer.second_per_grid, fewer.limited_by) == (2.0, "max_input_len")
        assert fewer.tokens <= 1000
        assert shorten.video_within(200, whole) is None  # fewer than 4 frames
        assert shorten.video_within(200, whole, options=VideoOptions(min_frames=2))[0].frames == 2
        assert shorten.video_within(-5, whole) is None
        exact = VideoOptions(nframes=32)
        assert shorten.video_within(8000, whole, options=exact)[0] == smaller
        assert shorten.video_within(1000, whole, options=exact) is None
        named = VideoOptions(resized_height=720, resized_width=1288)
        found = shorten.video_within(8000, shorten.video(32, 720, 1280, 2.0, options=named), options=named)[0]
        assert (found.resized_height, found.resized_width) == transformers_resize(720, 1288, 28, 100_352, 602_112)
        assert found.frames < 32

    @settings(max_examples=300, deadline=None)
    @given(
        st.integers(1, 40), st.integers(20, 900), st.integers(20, 900), st.integers(1, 6000), st.integers(4, 100),
        st.sampled_from([VideoOptions(), VideoOptions(max_pixels=50_000), VideoOptions(min_pixels=200_000),
                         VideoOptions(resized_height=280, resized_width=500), VideoOptions(min_frames=1)]),
    )  # fmt: skip
    def test_a_shorter_video_is_within_its_tokens(self, frames, height, width, tokens, low, options):
        shorten = rules(BuildProfile(low, 2000))
        whole = shorten.video(frames, height, width, 2.0, options=options)
        assume(whole.tokens > tokens)
        found = shorten.video_within(tokens, whole, options=options)
        if found is None:
            return
        size, kept = found
        assert size.tokens <= tokens
        assert len(kept) == len(set(kept)) == size.frames <= frames
        assert kept[-1] < frames
        assert size.frames >= min(options.min_frames or 4, frames)
        assert 2000 >= size.grid[1] * size.grid[2] >= low
        assert size.second_per_grid == pytest.approx(frames / size.frames)


def test_the_settings_of_engines(tmp_path):
    options = PipelineOptions(max_pixels=50_000, strict_size=True)
    profile = BuildProfile(16, 200)
    found = options.preprocessor_settings(tmp_path, profile)
    assert (found.image.max_pixels, found.profile, found.strict_size) == (50_000, profile, True)
    narrowed = found.narrowed(14)
    assert (narrowed.image.min_pixels, narrowed.image.max_pixels) == (3136, 200 * 196)
