"""Requests whose images and videos are too large, too small or too long for the engines, and what their outputs say."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl_trt import (
    ImageOptions,
    MediaSize,
    Pipeline,
    PipelineOptions,
    Request,
    SamplingParams,
    Video,
    VideoOptions,
)
from qwen2vl_trt.errors import LimitError, MediaError, PromptError
from qwen2vl_trt.runtime.preprocessing import preprocessor as preprocessor_module
from qwen2vl_trt.runtime.preprocessing.settings import PreprocessorSettings
from qwen2vl_trt.runtime.preprocessing.sizes import SizeRules
from qwen2vl_trt.runtime.scheduling.request_queue import MOST_WARNINGS
from tests.support.engine_folders import PROFILE, build
from tests.support.media_files import save_video
from tests.support.requests import answers, picture

ONE = SamplingParams(max_tokens=1)
LARGE = picture(0, 700, 500)  # 252x196 within 180 patches: Transformers, max_pixels 35280


@pytest.fixture
def torch_pipeline(engine_dirs):
    """With no embedding in its cache."""
    return Pipeline.from_engine_dir(engine_dirs["torch"], "cpu")


@pytest.fixture(scope="module")
def default_pipeline(checkpoint, tmp_path_factory):
    """A random model with the limits that are built by default, 16 to 10,816 patches, and the published area."""
    from qwen2vl_trt.engines.profile import BuildProfile

    folder = build(checkpoint, tmp_path_factory.mktemp("default") / "torch", "torch", profile=BuildProfile())
    return Pipeline.from_engine_dir(folder, "cpu", PipelineOptions(min_pixels=3136, max_pixels=12_845_056))


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_outputs_name_sizes_grids_and_tokens(pipeline, tmp_path):
    upright = Image.fromarray(picture(1, 60, 90))
    upright.getexif()[0x0112] = 6  # to be turned by a quarter
    upright.save(tmp_path / "turned.jpg", exif=upright.getexif())
    frames = [picture(seed, 60, 90) for seed in range(4)]
    request = Request("x", [LARGE, tmp_path / "turned.jpg"], [Video(frames, 2.0)])
    output = pipeline.generate([request], ONE)[0]
    assert output.images == [
        MediaSize(500, 700, 140, 196, (1, 14, 10), 35, "max_hw_dims"),
        MediaSize(60, 90, 56, 84, (1, 6, 4), 6),
    ]
    assert output.videos == [MediaSize(90, 60, 84, 56, (2, 4, 6), 12, None, 4, 1.0)]
    assert output.images[0].as_json() == {
        "original_size": [500, 700],
        "resized_size": [140, 196],
        "grid_thw": [1, 14, 10],
        "tokens": 35,
        "limited_by": "max_hw_dims",
    }
    assert output.videos[0].as_json()["frames"] == 4
    again = pipeline.generate([request], ONE)[0]  # from the embedding cache
    assert (again.images, again.videos) == (output.images, output.videos)
    assert pipeline.generate([Request("x")], ONE)[0].images == []


def test_an_image_that_is_shrunk_is_what_max_pixels_makes_of_it(pipeline):
    shrunk = Pipeline(pipeline.engines, PipelineOptions(max_pixels=PROFILE.max_hw_dims * 196))
    assert torch.equal(pipeline.embed_images([LARGE])[0], shrunk.embed_images([LARGE])[0])
    params = SamplingParams(max_tokens=8)
    request = Request("What?", [LARGE, picture(1)])
    assert answers(pipeline.generate([request], params)) == answers(shrunk.generate([request], params))


def test_strict_sizes_are_refused(pipeline, tmp_path):
    strict = Pipeline(pipeline.engines, PipelineOptions(strict_size=True))
    with pytest.raises(LimitError, match=r"image 1 .*this engine takes 4 to 180"):
        strict.embed_images([LARGE])
    clip = Video([picture(seed, 140, 140) for seed in range(40)], 2.0)
    for request, message in (
        (Request("x", [picture(1), LARGE]), r"image 2 \(500x700\) needs 216 patches; this engine takes 4 to 180"),
        (Request("x", videos=[Video([LARGE], 2.0)]), r"video 1 \(500x700\) needs"),
        (Request("x", videos=[clip]), "the prompt has 5.. tokens; these engines take 400"),
    ):
        with pytest.raises(LimitError, match=message):
            strict.generate([request], ONE)[0].text  # noqa: B018


@pytest.mark.parametrize("size", [(3024, 4032), (1080, 1920), (1724, 1362), (100, 100)])
def test_what_people_have_is_answered_with_the_default_limits(default_pipeline, size):
    """A phone's photo, a screen, a page, a thumbnail."""
    height, width = size
    output = default_pipeline.generate([Request("x", [np.zeros((height, width, 3), np.uint8)])], ONE)[0]
    found = output.images[0]
    assert len(output.token_ids) == 1
    assert (found.width, found.height) == (width, height)
    assert found.limited_by == (None if size in ((1080, 1920), (100, 100)) else "max_hw_dims")
    assert default_pipeline.profile.takes(found.grid)


def test_a_full_hd_video_is_answered_with_the_default_limits(default_pipeline, tmp_path):
    path = save_video(tmp_path / "hd.mp4", [picture(seed, 1080, 1920) for seed in range(5)], rate=2)
    output = default_pipeline.generate([Request("x", videos=[path])], ONE)[0]
    assert len(output.token_ids) == 1
    assert (output.videos[0].width, output.videos[0].height, output.videos[0].frames) == (1920, 1080, 4)


def test_each_is_told_of_in_one_line_and_many_in_few(torch_pipeline, caplog, tmp_path):
    Image.fromarray(LARGE).save(tmp_path / "large.png")
    torch_pipeline.generate([Request("x", [picture(1), tmp_path / "large.png"])], ONE)
    (line,) = warnings_of(caplog)
    assert line == (
        f"image 2 ({tmp_path}/large.png) (500x700) is resized to 140x196 to fit the engines (--max-hw-dims 180);"
        " --strict-size refuses it"
    )
    torch_pipeline.generate([Request("x", [LARGE])] * (2 * MOST_WARNINGS), ONE)
    lines = warnings_of(caplog)
    assert len(lines) == MOST_WARNINGS + 1
    assert "Output.images" in lines[-1]


# Videos that are too long


def long_clip(frames=40, side=140):
    return Video([picture(seed, side, side) for seed in range(frames)], 2.0)


def test_a_long_clip_loses_frames_and_says_so(torch_pipeline, caplog):
    """140x140 is below the smallest size that frames are shrunk to."""
    output = torch_pipeline.generate([Request("x", videos=[long_clip()])], ONE)[0]
    (found,) = output.videos
    assert output.prompt_tokens <= PROFILE.max_input_len
    assert output.prompt_tokens > PROFILE.max_input_len - 25
    assert found.limited_by == "max_input_len"
    assert (found.resized_width, found.resized_height) == (140, 140)
    assert found.frames == found.grid[0] * 2
    assert found.second_per_grid == pytest.approx(40 / found.frames)
    (line,) = warnings_of(caplog)
    assert line.startswith(
        f"video 1 (140x140) is resized to {found.frames} frames of 140x140 in place of 40 of 140x140 to fit the"
        f" engines (--max-input-len 400, --max-seq-len {PROFILE.max_seq_len})"
    )


def test_a_clip_loses_pixels_before_frames(torch_pipeline):
    options = VideoOptions(min_pixels=28 * 28)
    request = Request("x", videos=[long_clip()], video_options=options)
    (found,) = torch_pipeline.generate([request], ONE)[0].videos
    assert (found.frames, found.second_per_grid) == (40, 1.0)
    assert found.resized_width < 140
    parts = [{"type": "video", "video": long_clip()}, {"type": "text", "text": "x"}]
    message = replace(request, prompt=[{"role": "user", "content": parts}], videos=())
    (beside,) = torch_pipeline.generate([message], ONE)
    assert beside.videos == [found]


def test_several_clips_share_what_text_and_images_leave(torch_pipeline):
    """A short one keeps what it has; the longer ones get equal shares; images stay."""
    clips = [long_clip(40), long_clip(4), long_clip(60)]
    output = torch_pipeline.generate([Request("x", [picture(1, 140, 140)], clips)], ONE)[0]
    assert output.images[0].tokens == 25
    assert output.prompt_tokens <= PROFILE.max_input_len
    first, short, last = output.videos
    assert (short.frames, short.limited_by) == (4, None)
    assert abs(first.frames - last.frames) <= 2
    assert first.limited_by == last.limited_by == "max_input_len"


def test_a_clip_that_fits_in_no_way_is_refused(torch_pipeline):
    request = Request("word " * 90, videos=[long_clip()])
    with pytest.raises(LimitError, match=r"the prompt has [\d,]+ tokens; these engines take 400"):
        torch_pipeline.generate([request], ONE)[0].text  # noqa: B018


def test_what_is_too_long_is_told_the_way_out_that_helps(torch_pipeline):
    strict = Pipeline(torch_pipeline.engines, PipelineOptions(strict_size=True))
    clips, images = Request("x", videos=[long_clip()]), Request("x", [picture(1, 140, 140)] * 20)
    for pipeline, request, message, other in (
        (strict, clips, r"leave --strict-size out, .* ask for fewer frames", "images"),
        (torch_pipeline, replace(clips, prompt="word " * 90), r"Shorten the text, ask for fewer", "strict"),
        (strict, images, r"Shorten the text, shrink the images \(max_pixels\), or", "videos"),
        (torch_pipeline, Request("word " * 600), r"Shorten the text, or rebuild", "images"),
    ):
        with pytest.raises(LimitError, match=message) as refused:
            pipeline.generate([request], ONE)[0].text  # noqa: B018
        assert other not in str(refused.value)


def test_frames_are_limited_to_128_tokens_before_any_is_lost(torch_pipeline):
    """Sides are rounded down, as qwen-vl-utils does: 120 of 16:9 and no less."""
    rules = SizeRules(torch_pipeline.engines.checkpoint.config.vision, PreprocessorSettings())
    size = rules.video(40, 720, 1280, 2.0)
    shorter, kept = rules.video_within(20 * 120, size)
    assert (shorter.tokens // shorter.grid[0], len(kept)) == (120, 40)
    fewer, kept = rules.video_within(20 * 120 - 1, size)
    assert (fewer.tokens // fewer.grid[0], len(kept)) == (120, 38)


def test_a_size_beyond_the_checkpoints_limits_is_told_of(torch_pipeline, caplog):
    pipeline = Pipeline(torch_pipeline.engines, PipelineOptions(max_pixels=7840))
    options = ImageOptions(resized_height=140, resized_width=140)
    pipeline.generate([Request("x", [picture(1)], image_options=options)], ONE)
    (line,) = warnings_of(caplog)
    assert "in place of the size that is asked for, by the checkpoint's max_pixels; --strict-size" in line


def test_a_clip_leaves_room_for_the_answer_that_is_asked_for(torch_pipeline):
    request = Request("x", videos=[long_clip()])
    asked = torch_pipeline.generate([request], SamplingParams(max_tokens=PROFILE.max_seq_len - 200))[0]
    assert 175 < asked.prompt_tokens <= 200
    assert torch_pipeline.generate([request])[0].prompt_tokens > 375


def test_explicit_frames_and_sizes_stay_and_are_refused_where_they_do_not_fit(torch_pipeline, tmp_path):
    path = save_video(tmp_path / "clip.mp4", [picture(seed, 140, 140) for seed in range(40)], rate=2)
    for options in (VideoOptions(nframes=40), VideoOptions(resized_height=140, resized_width=140, min_frames=40)):
        with pytest.raises(LimitError, match=r"the prompt has [\d,]+ tokens; these engines take 400"):
            torch_pipeline.generate([Request("x", videos=[path], video_options=options)], ONE)[0].text  # noqa: B018


def test_a_clip_in_the_cache_as_a_whole_is_shortened_where_the_text_is_longer(torch_pipeline, tmp_path):
    path = save_video(tmp_path / "clip.mp4", [picture(seed, 140, 140) for seed in range(26)], rate=2)
    whole = torch_pipeline.generate([Request("x", videos=[path])], ONE)[0]
    assert whole.videos[0].limited_by is None
    longer = Request("word " * 40, videos=[path])
    shorter = torch_pipeline.generate([longer], SamplingParams(max_tokens=6))[0]
    assert shorter.videos[0].limited_by == "max_input_len"
    assert shorter.videos[0].frames < whole.videos[0].frames
    fresh = Pipeline(torch_pipeline.engines)
    assert answers(fresh.generate([longer], SamplingParams(max_tokens=6))) == answers([shorter])
    assert torch_pipeline.generate([Request("x", videos=[path])], ONE)[0].videos == whole.videos


# Options of a part and of a request


def test_options_of_parts_and_requests_reach_their_media(torch_pipeline):
    image = picture(3, 150, 150)
    plain = Request("x", [image, image], image_options=ImageOptions(min_pixels=784, max_pixels=784))
    assert [size.tokens for size in torch_pipeline.generate([plain], ONE)[0].images] == [1, 1]
    other = replace(plain, image_options=ImageOptions(resized_height=56, resized_width=112))
    found = torch_pipeline.generate([other], ONE)[0].images[0]
    assert (found.resized_height, found.resized_width, found.tokens) == (56, 112, 8)
    file = Request("x", videos=[Video([image] * 4, 2.0)], video_options=VideoOptions(max_pixels=784, fps=4.0))
    (clip,) = torch_pipeline.generate([file], ONE)[0].videos
    assert (clip.tokens, clip.second_per_grid) == (2, 1.0)  # its own rate


def test_options_of_frames_are_for_files_alone(torch_pipeline, tmp_path):
    frames = [picture(seed, 56, 56) for seed in range(6)]
    path, array = save_video(tmp_path / "clip.mp4", frames, rate=2), np.stack(frames)
    part = {"type": "video", "video": array, "sample_fps": 4}
    content = [*({"type": "video", "video": each} for each in (path, Video(frames, 3.0), array)), part]
    for options, expected in (
        (VideoOptions(fps=1, max_frames=4), [(4, 4 / 3), (6, 3.0), (6, 1.0), (6, 4.0)]),
        (VideoOptions(nframes=4, sample_fps=5), [(4, 4 / 3), (6, 3.0), (6, 5.0), (6, 4.0)]),
    ):
        request = Request([{"role": "user", "content": content}], video_options=options)
        videos = torch_pipeline.generate([request], ONE)[0].videos
        assert [(video.frames, pytest.approx(2 / video.second_per_grid)) for video in videos] == expected


def test_a_picture_in_two_sizes_is_not_taken_for_the_other(torch_pipeline):
    """By its options in the embedding cache, and by its content in kept prefixes."""
    image, params = picture(3, 150, 150), SamplingParams(max_tokens=6)
    sizes = [ImageOptions(), ImageOptions(max_pixels=9408), ImageOptions(resized_height=84, resized_width=112)]
    sizes += [ImageOptions(resized_height=112, resized_width=84)]  # as many tokens
    requests = [Request("What?", [image], image_options=options) for options in sizes]
    together = torch_pipeline.generate(requests, params)
    apart = [Pipeline(torch_pipeline.engines).generate([request], params)[0] for request in requests]
    assert answers(together) == answers(apart)


def test_wrong_options_are_named_with_their_part(torch_pipeline):
    part = {"type": "video", "video": [picture(1)] * 2, "fps": 0}
    output = torch_pipeline.generate([Request([{"role": "user", "content": [part]}])], ONE)[0]
    with pytest.raises((MediaError, PromptError), match="1: fps is 0; it must be a number above 0"):
        output.text  # noqa: B018


def test_a_clip_that_is_shortened_again_is_not_decoded_again(torch_pipeline, tmp_path, monkeypatch):
    path = save_video(tmp_path / "clip.mp4", [picture(seed, 140, 140) for seed in range(40)], rate=2)
    first = torch_pipeline.generate([Request("x", videos=[path])], ONE)[0]
    assert first.videos[0].limited_by == "max_input_len"
    decoded, load = [], preprocessor_module.load_video
    monkeypatch.setattr(preprocessor_module, "load_video", lambda *args, **kw: decoded.append(1) or load(*args, **kw))
    again = torch_pipeline.generate([Request("x", videos=[path])], ONE)[0]
    assert (again.videos, again.token_ids, decoded) == (first.videos, first.token_ids, [])
    torch_pipeline.clear_caches()  # the size is known, and nothing of its pixels
    assert torch_pipeline.generate([Request("x", videos=[path])], ONE)[0].videos == first.videos
    assert decoded == [1]
