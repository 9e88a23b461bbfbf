"""What a message says about the frames of its video, as qwen-vl-utils 0.0.14 takes it."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.media_options import VideoOptions
from qwen2vl_trt.runtime.inputs.frame_sampling import FrameSampling, requested_rate, requested_sampling
from qwen2vl_trt.runtime.inputs.video import Video, load_video
from tests.support.media_files import save_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Ten seconds of 10 frames, frame n grey of level 2 n."""
    frames = [np.full((32, 32, 3), 2 * number, np.uint8) for number in range(100)]
    return save_video(str(tmp_path_factory.mktemp("video") / "a.mp4"), frames)


# What smart_nframes says of 100 frames at 10 a second
COUNTS = [
    ({}, 20),
    ({"fps": 1.0}, 10),
    ({"fps": 0.1}, 4),
    ({"fps": 3.3}, 32),
    ({"fps": 100}, 100),
    ({"fps": 100, "max_frames": 33}, 32),
    ({"fps": 0.1, "min_frames": 7}, 8),
    ({"min_frames": 31}, 32),
    ({"max_frames": 2}, 2),
    ({"nframes": 2}, 2),
    ({"nframes": 7}, 8),
    ({"nframes": 5}, 4),  # rounded to the even half
    ({"nframes": 100}, 100),
]


@pytest.mark.parametrize(("options", "count"), COUNTS)
def test_how_many_frames(options, count, clip):
    video = load_video(clip, VideoOptions(**options))
    assert len(video.frames) == count
    assert video.fps == pytest.approx(count / 10)


def test_what_is_not_said_is_the_checkpoints(clip):
    sampling = FrameSampling(fps=1, min_frames=6, max_frames=12)
    load = partial(load_video, clip, sampling=sampling)
    assert len(load(None).frames) == len(load(VideoOptions()).frames) == 10
    assert len(load(VideoOptions(fps=5)).frames) == 12
    assert len(load(VideoOptions(fps=0.1)).frames) == 6
    assert len(load(VideoOptions(nframes=50)).frames) == 50


@pytest.mark.parametrize(
    ("start", "end", "first", "count", "seconds"),
    [
        (2, 6, 20, 8, 41 / 80),  # 41 frames, the one at 6 s included
        (None, 6, 0, 12, 61 / 120),
        (7.5, None, 75, 4, 25 / 40),
        (2, 600, 20, 16, 0.5),
        (0, 0.2, 0, 2, 3 / 20),
    ],
)
def test_a_part_of_a_file(start, end, first, count, seconds, clip):
    video = load_video(clip, VideoOptions(video_start=start, video_end=end))
    assert len(video.frames) == count
    assert abs(video.frames[0].float().mean().item() - 2 * first) < 3
    assert 1 / video.fps == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nframes": 102}, "nframes 102 is not within 2 to 100"),
        ({"nframes": 1}, "nframes 1 is not within 2 to 100"),
        ({"max_frames": 1}, "max_frames is 1; a temporal patch has 2 frames"),
        ({"min_frames": 9, "max_frames": 9}, "min_frames 9 is above max_frames 9"),
        ({"min_frames": 1000}, "min_frames 1000 is above max_frames 768"),
        ({"video_start": 10.0}, "nothing is shown from 10 to 10 s"),
        ({"sample_fps": 2.0}, "sample_fps is the rate of frames in memory"),
    ],
)
def test_a_file_refuses(options, message, clip):
    with pytest.raises(MediaError, match=r"^video 1 \(") as caught:
        load_video(Path(clip), VideoOptions(**options), name="video 1")
    assert message in str(caught.value)


def test_frames_in_memory_have_a_rate_and_are_all_kept():
    frames = np.zeros((6, 8, 8, 3), np.uint8)
    for options in ({"fps": 3.0}, {"sample_fps": 3.0}, {"fps": 3.0, "sample_fps": 3.0}):
        for source in (frames, Video(frames, 24.0)):
            video = load_video(source, VideoOptions(**options))
            assert (len(video.frames), video.fps) == (6, 3)
    for key in ("nframes", "min_frames", "max_frames", "video_start", "video_end"):
        with pytest.raises(MediaError, match=f"video: {key} is for a file"):
            load_video(frames, VideoOptions(**{key: 2}))
    with pytest.raises(MediaError, match="fps 3 and sample_fps 2 are two rates of the same frames"):
        load_video(frames, VideoOptions(fps=3.0, sample_fps=2.0))
    assert requested_rate(VideoOptions(), "video") is None


def test_sizes_are_left_to_others():
    sampling = FrameSampling()
    for options in (
        VideoOptions(min_pixels=1, max_pixels=2, total_pixels=3),
        VideoOptions(resized_height=28, resized_width=28),
    ):
        assert requested_sampling(options, sampling, "video") == sampling
        assert requested_rate(options, "video") is None
