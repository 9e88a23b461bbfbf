"""Options of a part: what is out of range is named, and a part's own win over its request's."""

from fractions import Fraction

import numpy as np
import pytest

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.media_options import ImageOptions, VideoOptions

COUNTS = ("min_pixels", "max_pixels", "nframes", "min_frames", "max_frames", "total_pixels")


@pytest.mark.parametrize("name", [*COUNTS, "fps", "sample_fps", "video_start", "video_end"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 10**400, "9", True, [1], {}])
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(MediaError, match=f"^{name} is .*; it must be") as caught:
        VideoOptions(**{name: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", [*COUNTS, "fps", "sample_fps"])
def test_zero_is_too_little(name):
    with pytest.raises(MediaError, match=f"{name} is 0"):
        VideoOptions(**{name: 0})
    assert VideoOptions(video_start=0, video_end=0.5).video_start == 0


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_whole(name):
    with pytest.raises(MediaError, match=f"{name} is 2.5; it must be a whole number"):
        VideoOptions(**{name: 2.5})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_pixels": 9, "max_pixels": 8}, "min_pixels 9 is above max_pixels 8"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames 9 is above max_frames 8"),
        ({"video_start": 2.5, "video_end": 1}, "video_start 2.5 is above video_end 1"),
        ({"resized_height": 56}, "resized_height and resized_width go together"),
        ({"resized_width": 56}, "resized_height and resized_width go together"),
        ({"fps": 2, "nframes": 8}, "fps 2 and nframes 8 both say"),
        ({"max_frames": 9, "nframes": 8}, "max_frames 9 and nframes 8 both say"),
        (
            {"max_pixels": 1003520, "resized_height": 56, "resized_width": 28},
            "max_pixels 1003520 and resized_h",
        ),
        ({"total_pixels": 9, "resized_height": 56, "resized_width": 28}, "total_pixels 9 and resized_height 56 both"),
    ],
)
def test_what_contradicts_itself(values, message):
    with pytest.raises(MediaError, match=message):
        VideoOptions(**values)


def test_numbers_of_other_libraries_are_taken_as_pythons_own():
    options = VideoOptions(fps=Fraction(3, 2), nframes=None, max_frames=np.int64(8), video_start=np.float32(0.5))
    assert options == VideoOptions(fps=1.5, max_frames=8, video_start=0.5)
    assert [type(value) for value in (options.fps, options.max_frames, options.video_start)] == [float, int, float]
    with pytest.raises(MediaError, match="max_pixels is"):
        ImageOptions(max_pixels=np.float64(9))


def test_a_part_wins_over_its_request():
    request = VideoOptions(min_pixels=5000, max_pixels=9000, fps=2.0, max_frames=16, total_pixels=10**6)
    assert VideoOptions().over(request) == request
    assert request.over(VideoOptions(fps=1.0, min_pixels=1)) == request
    assert VideoOptions(fps=3.0).over(request) == VideoOptions(
        min_pixels=5000, max_pixels=9000, fps=3.0, max_frames=16, total_pixels=10**6
    )
    exact = VideoOptions(resized_height=56, resized_width=84, nframes=8)
    assert exact.over(request) == exact
    assert request.over(exact) == request
    for area in ("min_pixels", "max_pixels", "total_pixels"):
        part = VideoOptions(**{area: 5000})
        assert part.over(exact) == VideoOptions(**{area: 5000}, nframes=8)
    for frames in ("fps", "min_frames", "max_frames"):
        part = VideoOptions(**{frames: 4})
        assert part.over(exact) == VideoOptions(**{frames: 4}, resized_height=56, resized_width=84)
    # A limit of the request that contradicts the part's is left out.
    assert ImageOptions(max_pixels=4000).over(ImageOptions(min_pixels=5000)) == ImageOptions(max_pixels=4000)
    assert ImageOptions(min_pixels=5000).over(ImageOptions(max_pixels=4000)) == ImageOptions(min_pixels=5000)
    assert VideoOptions(min_frames=20).over(request).max_frames is None
