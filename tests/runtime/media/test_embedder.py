"""Media within the engine's limits: names, sizes, rates, and how many frames an engine call takes."""

import math

import pytest
import torch
from PIL import Image

from qwen2vl_trt import Video
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import LimitError, MediaError
from qwen2vl_trt.media_options import VideoOptions
from qwen2vl_trt.runtime.inputs.clips import VideoLimits
from tests.support.fake_vision import embedder, picture
from tests.support.media_files import save_video


def test_images_are_embedded_as_many_at_a_time_as_the_engine_takes():
    media, engine = embedder()
    images = [media.preprocessor.load_image(picture(n, 56 + 28 * n, 84), f"image {n}") for n in range(7)]
    together, times = media.embed(images)
    assert engine.calls == [3, 2, 2], "three at a time, and those together that are of like size"
    assert times.preprocess > 0
    assert times.vision > 0
    for image, embedding in zip(images, together):
        assert len(embedding) == image.size.tokens
        assert torch.equal(embedding, media.embed([image])[0][0])


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 7, 14])
def test_a_long_video_takes_several_calls(frames):
    media, engine = embedder()
    video = media.preprocessor.load_video([picture(n) for n in range(frames)], "video 1", VideoOptions(fps=2.0))
    [embedding], _ = media.embed([video])
    patches = -(-frames // 2)
    assert video.size.grid == (patches, 4, 6)
    assert sorted(engine.calls) == [patches % 3] * (patches % 3 > 0) + [3] * (patches // 3)
    assert len(embedding) == patches * 6
    packed = media.preprocessor.pack([video])
    assert torch.equal(embedding, media._runner(packed.pixel_values, packed.layout))


def test_images_and_videos_together():
    media, _ = embedder()
    images = [media.preprocessor.load_image(picture(n), "image") for n in range(2)]
    videos = [media.preprocessor.load_video([picture(n)] * 4, "video", VideoOptions(fps=4.0)) for n in range(2)]
    embeds, _ = media.embed([images[0], *videos, images[1]])
    assert [len(embedding) for embedding in embeds] == [6, 12, 12, 6]
    assert [video.size.second_per_grid for video in videos] == [0.5, 0.5]
    assert media.embed([])[0] == []


def test_what_the_engine_does_not_take_is_named():
    media, _ = embedder(min_pixels=1, max_pixels=10**6, strict_size=True)
    with pytest.raises(LimitError, match=r"image 3 \(700x600\) needs .*16 to 400 .*--max-pixels 78400"):
        media.preprocessor.load_image(picture(0, 600, 700), "image 3")
    with pytest.raises(LimitError, match=r"image 1 \(28x28\) needs 4 patches.*--min-pixels 3136"):
        media.preprocessor.load_image(picture(0, 28, 28), "image 1")
    with pytest.raises(LimitError, match=r"video 2 \(700x600\)"):
        media.preprocessor.load_video([picture(0, 600, 700)] * 2, "video 2")


def test_the_rate_of_a_message_samples_a_file_and_describes_frames(tmp_path):
    path = save_video(tmp_path / "clip.mp4", [picture(number) for number in range(60)])
    media, _ = embedder()
    for source in (path, str(path), path.read_bytes()):
        assert len(media.preprocessor.load_video(source, "video 1").frames) == 12  # 6 s at 2 frames/s
        assert len(media.preprocessor.load_video(source, "video 1", VideoOptions(fps=1.0)).frames) == 6
        assert media.preprocessor.load_video(
            source, "video 1", VideoOptions(fps=1.0)
        ).size.second_per_grid == pytest.approx(2.0)
    frames = [picture(number) for number in range(6)]
    assert len(media.preprocessor.load_video(frames, "video 1", VideoOptions(fps=1.0)).frames) == 6
    assert media.preprocessor.load_video(frames, "video 1", VideoOptions(fps=1.0)).size.second_per_grid == 2.0
    assert media.preprocessor.load_video(Video(frames, fps=4.0), "video 1").size.second_per_grid == 0.5


def test_what_is_no_video():
    media, _ = embedder()
    for source in (None, 3, Image.fromarray(picture(0))):
        with pytest.raises(MediaError, match=r"video 1: a .* is no video"):
            media.preprocessor.load_video(source, "video 1")


def test_a_call_sees_no_more_pairs_of_patches_than_the_largest_image():
    """Full attention, its mask and, where there is no fused kernel, its scores take memory for each of them."""
    media, engine = embedder()
    images = [
        media.preprocessor.load_image(picture(n, side, side), "image")
        for n, side in enumerate((280, 280, 140, 140, 140))
    ]
    media.embed(images)
    assert engine.calls == [3, 1, 1]  # of 100 patches as many as there are; 400 patches alone
    clip = media.preprocessor.load_video([picture(n, 280, 280) for n in range(6)], "video", VideoOptions(fps=2.0))
    media.embed([clip])
    assert engine.calls == [3, 1, 1, 1, 1, 1]


LARGE = BuildProfile(min_hw_dims=16, max_hw_dims=50_000, max_batch_size=64)


@pytest.fixture
def mixed(monkeypatch):
    """An embedder as on a GPU, its engine, and one image of 5,184 patches among 63 of 144."""
    monkeypatch.setattr("qwen2vl_trt.runtime.media.embedder._MOST_CPU_PATCHES", math.inf)
    media, engine = embedder(max_pixels=10**7, profile=LARGE)
    sides = [1008 if number == 20 else 168 for number in range(64)]
    return media, engine, [media.preprocessor.load_image(picture(n, s, s), "image") for n, s in enumerate(sides)]


def test_a_large_image_does_not_pad_the_small_ones(mixed):
    """64 sequences of 5,184 would be 35 TFLOP of attention at the published widths, where 0.6 are of use."""
    media, engine, images = mixed
    embeds, _ = media.embed(images)
    assert engine.calls == [63, 1]
    assert engine.pairs == 5184**2 + 63 * 144**2
    assert [len(embedding) for embedding in embeds] == [image.size.tokens for image in images]
    assert torch.equal(embeds[20], media.embed([images[20]])[0][0])


def test_an_engine_that_does_not_pad_takes_all_in_one_call(mixed):
    media, engine, images = mixed
    media._padded = False
    media.embed(images)
    assert engine.calls == [64]


def test_padding_that_costs_less_than_a_call_is_no_reason_for_one(mixed):
    media, engine, images = mixed
    close = [image for image in images if image.size.grid[1] == 12][:5]
    close.append(media.preprocessor.load_image(picture(9, 224, 224), "image"))
    media.embed(close)
    assert engine.calls == [6]


def test_a_cpu_takes_few_patches_at_a_time():
    """More are slower together than one by one."""
    media, engine = embedder()
    images = [media.preprocessor.load_image(picture(n, 280, 196), "image") for n in range(3)]
    media.embed(images)
    assert [image.size.grid for image in images] == [(1, 20, 14)] * 3
    assert engine.calls == [1, 1, 1]


def test_a_video_that_is_held_smaller_keeps_its_original_size(tmp_path):
    path = save_video(tmp_path / "clip.mp4", [picture(n, 112, 168) for n in range(4)])
    media, _ = embedder()
    media.preprocessor.video_limits = VideoLimits(4 * 56 * 84)
    loaded = media.preprocessor.load_video(path, "video 1")
    assert loaded.frames[0].shape == (3, 56, 84)
    assert (loaded.size.width, loaded.size.height) == (168, 112)
    assert loaded.nbytes == len(loaded.frames) * 3 * 56 * 84


def test_a_bytearray_is_a_file(tmp_path):
    path = tmp_path / "clip.mp4"
    save_video(path, [picture(n) for n in range(4)])
    media, _ = embedder()
    assert (
        media.preprocessor.load_video(bytearray(path.read_bytes()), "video 1").size
        == media.preprocessor.load_video(path, "video 1").size
    )
