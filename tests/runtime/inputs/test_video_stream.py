"""Real files of every container: times come from the timestamps of the frames that are shown."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.media_options import VideoOptions
from qwen2vl_trt.runtime.inputs.video import load_video
from qwen2vl_trt.runtime.inputs.video_stream import VideoStream
from tests.support.media_files import edited, save_video, without_rate

H264 = {"codec": "libx264", "codec_options": {"g": "250"}}  # one group of pictures, with B-frames
RATE = 30


def greys(count, height=64, width=64):
    """Frame n is grey of level 2 n."""
    return [np.full((height, width, 3), 2 * number, np.uint8) for number in range(count)]


def numbers(video):
    """Of the frames kept, to the nearest that their grey tells."""
    return [round(frame.float().mean().item() / 2) for frame in video.frames]


def close(found, expected, slack=1):
    return len(found) == len(expected) and all(abs(a - b) <= slack for a, b in zip(found, expected))


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    """Four seconds."""
    return Path(save_video(str(tmp_path_factory.mktemp("video") / "a.mp4"), greys(120), RATE, **H264)).read_bytes()


CONTAINERS = [
    ("a.mp4", "libx264", {}),
    ("fragmented.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    ("a.mov", "mpeg4", {}),
    ("a.mkv", "libx264", {}),
    ("a.webm", "libvpx-vp9", {}),
    ("vp8.webm", "libvpx", {}),
    ("a.avi", "mpeg4", {}),
    ("b_frames.avi", "libx264", {}),
    ("a.ts", "libx264", {}),
    ("a.mpg", "mpeg2video", {}),
    ("a.flv", "libx264", {}),
    ("a.h264", "libx264", {}),
    ("a.hevc", "libx265", {}),
]


@pytest.mark.parametrize(("name", "codec", "options"), CONTAINERS, ids=[name for name, _, _ in CONTAINERS])
def test_a_constant_rate(name, codec, options, tmp_path):
    codec_options = {"x265-params": "log-level=none"} if codec == "libx265" else None
    path = save_video(str(tmp_path / name), greys(120), RATE, codec=codec, codec_options=codec_options, options=options)
    for source in (path, Path(path).read_bytes()):
        video = load_video(source)
        # An MPEG program stream has a timestamp a packet of its own, so that those of some frames are a frame off.
        assert close(numbers(video), [0, 15, 30, 45, 60, 75, 90, 105], slack=2 if name == "a.mpg" else 1)
        assert video.fps == 2


class TestEditLists:
    """What a player does not show is not sampled, and its absence is no damage."""

    def test_trimmed_without_encoding_again(self, mp4):
        video = load_video(edited(mp4, 2.7, 0.4))
        assert close(numbers(video), [81, 84, 87, 90])
        assert 2 / video.fps == pytest.approx(0.2)

    def test_the_first_or_the_last_half(self, mp4):
        assert close(numbers(load_video(edited(mp4, 2.0, 2.0))), [60, 75, 90, 105])
        assert close(numbers(load_video(edited(mp4, 0.0, 2.0))), [0, 15, 30, 45])

    def test_frames_behind_the_end_that_the_index_leaves_out(self, tmp_path):
        """In short groups of pictures those hidden are not even read."""
        path = save_video(str(tmp_path / "a.mp4"), greys(120), RATE, codec="libx264", codec_options={"g": "10"})
        data = edited(Path(path).read_bytes(), 1.0, 1.0)
        with av.open(path) as container:
            assert container.streams.video[0].frames == 120
        video = load_video(data)
        assert close(numbers(video), [30, 37, 45, 52])
        assert video.fps == 4

    def test_all_hidden(self, mp4):
        with pytest.raises(MediaError, match="no frames"):
            load_video(edited(mp4, 100.0, 1.0))

    def test_a_truncated_one(self, tmp_path):
        options = {"movflags": "+faststart"}
        noise = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
        path = save_video(str(tmp_path / "a.mp4"), list(noise), RATE, codec="libx264", options=options)
        data = edited(Path(path).read_bytes(), 0.5, 1.0)
        assert len(load_video(data).frames) == 4
        with pytest.raises(MediaError, match=r"truncated or corrupt: \d+ of 60 frames can be decoded"):
            load_video(data[: len(data) // 2])


class TestHeadersThatLie:
    """A rate, a duration or a number of frames in a header changes nothing."""

    def test_durations(self, mp4):
        data = bytearray(mp4)
        for box in (b"mvhd", b"mdhd", b"tkhd"):
            place = data.index(box) + (24 if box == b"tkhd" else 20)
            assert struct.unpack_from(">I", data, place)[0] in (4000, 61440, 61952)
            struct.pack_into(">I", data, place, 0x0FFFFFFF)
        assert load_video(bytes(data)).fps == 2

    def test_a_browsers_webm(self, tmp_path):
        """59 frames over 3.96 s, a rate of 1000 in the header or none at all."""
        times = [round(number * 67 + 8 * (number % 3 == 1)) for number in range(59)]
        for rate in (1000, 30):
            path = save_video(str(tmp_path / "a.webm"), greys(59), rate, codec="libvpx", times=times)
            for data in (Path(path).read_bytes(), without_rate(Path(path).read_bytes())):
                video = load_video(data)
                assert len(video.frames) == 6
                assert 2 / video.fps == pytest.approx(1.32, abs=0.005)

    @pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx"), ("a.mp4", "libx264"), ("a.mkv", "libx264")])
    def test_a_variable_rate(self, name, codec, tmp_path):
        """30 frames in the first second, then 2 a second."""
        times = [round(1000 * number / 30) for number in range(30)] + list(range(1000, 4000, 500))
        video = load_video(save_video(str(tmp_path / name), greys(36), RATE, codec=codec, times=times))
        assert close(numbers(video), [0, 15, 30, 31, 32, 33, 34, 35])
        assert video.fps == 2


class TestTheStream:
    """Of several, the one that shows the most frames."""

    @pytest.mark.parametrize("default", [True, False])
    def test_a_picture_before_the_video(self, default, tmp_path):
        path = str(tmp_path / "a.mkv")
        with av.open(path, "w") as container:
            streams = container.add_stream("mjpeg", rate=1), container.add_stream("libx264", rate=RATE)
            for stream, form in zip(streams, ("yuvj420p", "yuv420p")):
                stream.width = stream.height = 64
                stream.pix_fmt = form
            if default:
                streams[0].disposition = av.stream.Disposition.default
            for stream, pictures in zip(streams, ([greys(128)[-1]], greys(120))):
                for picture in pictures:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                container.mux(stream.encode())
        video = load_video(path)
        assert close(numbers(video), [0, 15, 30, 45, 60, 75, 90, 105])


class TestAnotherDecoding:
    """A decoder that shows other frames than the packets promise is believed."""

    @pytest.mark.parametrize("lost", [1, 30])
    def test_frames_that_a_decoder_leaves_out(self, lost, mp4, monkeypatch):
        """The first of a broadcast that begins amid a group of pictures, for one."""
        whole = VideoStream.timeline

        def promised(self):
            timeline = whole(self)
            step = timeline.ticks[1]
            self._packets += lost
            ticks = tuple(step * number for number in range(120 + lost))
            end, before = Fraction(step * (120 + lost)), -lost * step
            return type(timeline)(ticks, end, timeline.tick, timeline.rate, before)

        expected = load_video(mp4, VideoOptions(video_start=1.0))
        monkeypatch.setattr(VideoStream, "timeline", promised)
        found = load_video(mp4, VideoOptions(video_start=1.0))
        assert numbers(found) == numbers(expected)
        assert found.fps == expected.fps

    def test_most_frames_lost(self, mp4, monkeypatch):
        whole = VideoStream.timeline

        def promised(self):
            timeline = whole(self)
            self._packets = 500
            return type(timeline)(tuple(range(500)), Fraction(500), timeline.tick)

        monkeypatch.setattr(VideoStream, "timeline", promised)
        with pytest.raises(MediaError, match=r"truncated or corrupt: 120 of 500 frames can be decoded"):
            load_video(mp4)


def test_the_end_is_not_decoded_where_it_is_not_kept(mp4, monkeypatch):
    """A long file of which the beginning is asked costs its beginning."""
    decoded = []
    pixels = VideoStream._pixels
    monkeypatch.setattr(VideoStream, "_pixels", lambda self, frame: decoded.append(frame.pts) or pixels(self, frame))
    load_video(mp4, VideoOptions(video_end=1.0))
    assert max(decoded) * Fraction(1, 15360) < 1
