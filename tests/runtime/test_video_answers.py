"""Video files that show 3, 7, 1 and 4 for a second each, asked of the tiny model: the answer is 3714."""

import struct
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from qwen2vl_trt import Pipeline, Request
from qwen2vl_trt.hub import resolve_model
from tests.support.engine_folders import build
from tests.support.media_files import digit_pictures, edited, save_video

H264 = {"codec": "libx264", "codec_options": {"g": "250"}}  # one group of pictures, with B-frames
VP8 = {"codec": "libvpx"}
CONSTANT = [round(1000 * number / 30) for number in range(120)]
VARIABLE = CONSTANT[:30] + list(range(1000, 4000, 500))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = build(resolve_model("tiny").folder, tmp_path_factory.mktemp("tiny") / "engines", "torch")
    return Pipeline.from_engine_dir(folder, "cpu")


@pytest.fixture(scope="module")
def digits():
    return digit_pictures()


@pytest.fixture
def read(tiny):
    def answer(video):
        prompt = "What digits does the video show?"
        return tiny.generate([Request(prompt, videos=[video])])[0].text.rstrip(".")

    return answer


def shown(digits, times):
    return [digits[time // 1000] for time in times]


def clip(path, digits, times, **options):
    return save_video(str(path), shown(digits, times), 30, times=times, **options)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.avi", "a.ts", "a.flv"])
def test_a_constant_rate_in_every_container(name, digits, read, tmp_path):
    path = save_video(str(tmp_path / name), shown(digits, CONSTANT), 30, **H264)
    assert read(path) == read(Path(path).read_bytes()) == "3714"


@pytest.mark.parametrize(("name", "codec"), [("a.h264", "libx264"), ("a.hevc", "libx265"), ("a.webm", "libvpx-vp9")])
def test_other_codecs_and_raw_streams(name, codec, digits, read, tmp_path):
    path = save_video(str(tmp_path / name), shown(digits, CONSTANT), 30, codec=codec)
    assert read(path) == read(Path(path).read_bytes()) == "3714"


@pytest.mark.parametrize("codec", [("a.mp4", H264), ("a.webm", VP8)], ids=["mp4", "webm"])
def test_a_variable_rate(codec, digits, read, tmp_path):
    name, options = codec
    assert read(clip(tmp_path / name, digits, VARIABLE, **options)) == "3714"


def test_trimmed_without_encoding_again(digits, read, tmp_path):
    data = Path(save_video(str(tmp_path / "a.mp4"), shown(digits, CONSTANT), 30, **H264)).read_bytes()
    assert read(edited(data, 2.0, 2.0)) == "14"
    assert read(edited(data, 0.0, 2.0)) == "37"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_by_its_own_delays(kind, digits, read):
    """Delays of 0.1 to 1 s: a second a digit."""
    frames, delays = [], []
    for picture, parts in zip(digits, ([1000], [500, 500], [100] * 10, [300, 700])):
        for number, delay in enumerate(parts):
            marked = picture.copy()
            marked[0, number] = 0  # writers join frames that are equal
            frames.append(Image.fromarray(marked))
            delays.append(delay)
    file = BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=delays)
    assert read(file.getvalue()) == "3714"


def test_the_video_and_not_the_picture_before_it(digits, read, tmp_path):
    path = str(tmp_path / "a.mkv")
    with av.open(path, "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        stream = container.add_stream("libx264", rate=30)
        cover.width = cover.height = stream.width = stream.height = 84
        cover.pix_fmt, stream.pix_fmt = "yuvj420p", "yuv420p"
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((84, 84, 3), np.uint8), format="rgb24")))
        for picture in shown(digits, CONSTANT):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux([*stream.encode(), *cover.encode()])
    assert read(path) == "3714"


def test_a_header_that_lies_about_the_duration(digits, read, tmp_path):
    data = bytearray(Path(save_video(str(tmp_path / "a.mp4"), shown(digits, CONSTANT), 30, **H264)).read_bytes())
    for box in (b"mvhd", b"mdhd"):
        struct.pack_into(">I", data, data.index(box) + 20, 400_000)
    assert read(bytes(data)) == "3714"
