"""Video files that mean harm, and things that are no files: one file is opened, and memory has a bound."""

import os
import re
import struct
import threading
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from itertools import count
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.runtime.inputs import clips, video_stream
from qwen2vl_trt.runtime.inputs.clips import VideoLimits
from qwen2vl_trt.runtime.inputs.files import BoundedFile
from qwen2vl_trt.runtime.inputs.frame_sampling import FrameSampling
from qwen2vl_trt.runtime.inputs.video import Video, load_video
from qwen2vl_trt.runtime.media.cached_media import CachedMedia, EmbeddingCache
from tests.support.fake_vision import embedder
from tests.support.media_files import save_video
from tests.support.pictures import natural

PATIENCE = 20


def pictures(count=4, height=32, width=48):
    return [natural(height, width, seed).permute(1, 2, 0).contiguous().numpy() for seed in range(count)]


def external(data, path):
    """An MP4 file whose frames lie in another: QuickTime's alias to ``path`` replaces its data reference."""
    alias = bytes(10) + bytes(28) + bytes(12) + bytes(64) + bytes(16) + struct.pack(">HH", 1, 1) + bytes(16)
    name = path.replace("/", ":").encode()
    name += bytes(len(name) % 2)
    alias += struct.pack(">HH", 2, len(name)) + name + struct.pack(">Hh", 0xFFFF, 0)
    alias += bytes(max(0, 160 - len(alias)))
    box = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    at = data.index(b"url ") - 4
    found = bytearray(data[:at] + box + data[at + 12 :])
    for parent in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):  # moov is last, so no offset moves
        place = found.index(parent) - 4
        struct.pack_into(">I", found, place, struct.unpack_from(">I", found, place)[0] + len(box) - 12)
    return bytes(found)


class TestSecondFiles:
    """What makes FFmpeg open another file does not here."""

    @pytest.fixture
    def hostile(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        data = Path(save_video(str(tmp_path / "a.mp4"), pictures())).read_bytes()
        save_video(str(tmp_path / "a.ts"), pictures(), codec="libx264")
        playlist = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\na.ts\n#EXT-X-ENDLIST\n"
        return {
            "ffconcat": b"ffconcat version 1.0\nfile 'a.mp4'\n",
            "m3u8": playlist.encode(),
            "alias": external(data, str(tmp_path / "a.mp4")),
        }

    @pytest.mark.parametrize("kind", ["ffconcat", "m3u8", "alias"])
    def test_none_is_opened(self, kind, hostile, tmp_path, monkeypatch):
        asked = []

        def refuse(url, flags, options):
            asked.append(url)
            raise PermissionError(url)

        def packets(container):
            return sum(packet.size > 0 for packet in container.demux())

        path = tmp_path / f"hostile.{kind}"
        path.write_bytes(hostile[kind])
        permissive = {"enable_drefs": "1", "use_absolute_path": "1"}
        try:
            with path.open("rb") as file, av.open(file, options=permissive, io_open=refuse) as container:
                opens = bool(asked) or packets(container) == 4
        except (av.FFmpegError, OSError):
            opens = bool(asked)
        assert opens, "FFmpeg as it comes does not open another file for this one: the test tests nothing"
        asked.clear()
        monkeypatch.setattr(av, "open", partial(av.open, io_open=refuse))
        for source in (hostile[kind], path):
            with pytest.raises(MediaError, match="truncated or corrupt"):
                load_video(source)
        assert not asked

    def test_no_protocol_even_if_a_format_asked(self, hostile, monkeypatch):
        monkeypatch.delitem(video_stream._OPTIONS, "format_whitelist")
        with pytest.raises(MediaError):
            load_video(hostile["m3u8"])


class TestNoFiles:
    """A pipe or a device is refused at once, wherever it is opened."""

    @pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "/dev/tty", "/proc/self"])
    def test_refused(self, kind, tmp_path):
        path = Path(kind)
        if kind == "fifo":
            path = tmp_path / "fifo"
            os.mkfifo(path)
        errors = []

        def load():
            media = embedder()[0]
            cached = CachedMedia(media, EmbeddingCache(1 << 20))
            for read in (
                load_video,
                partial(media.preprocessor.load_video, name="1"),
                partial(cached.load_video, name="1"),
            ):
                try:
                    read(path)
                except MediaError as error:
                    errors.append(str(error))

        thread = threading.Thread(target=load, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert len(errors) == 3
        assert all(str(path) in error and "\n" not in error for error in errors)

    def test_a_file_that_grows_ends_where_it_was(self, tmp_path):
        path = tmp_path / "a"
        path.write_bytes(bytes(range(100)))
        with path.open("rb") as file, path.open("ab") as writer:
            bounded = BoundedFile(file)
            assert bounded.read(40) == bytes(range(40))
            writer.write(bytes(100_000))
            writer.flush()
            assert bounded.read() == bytes(range(40, 100))
            assert bounded.read(1) == b""
            assert bounded.seek(-1, os.SEEK_END) == 99
            assert bounded.read() == b"\x63"
            assert bounded.seek(200) == 200
            assert bounded.read(1) == b""


class TestMemory:
    """Frames have a largest size, and those held a largest sum."""

    def test_a_frame_that_is_too_large(self, tmp_path, monkeypatch):
        monkeypatch.setattr(clips, "MAX_FRAME_PIXELS", 1000)
        files = [save_video(str(tmp_path / "a.mp4"), pictures())]
        for kind in ("gif", "webp"):
            files.append(tmp_path / f"a.{kind}")
            images = [Image.fromarray(picture) for picture in pictures()]
            images[0].save(files[-1], save_all=True, append_images=images[1:], duration=100)
        for file in files:
            with pytest.raises(MediaError, match=r"frames of 48x32 are over 1,000 pixels"):
                load_video(file)

    def test_a_size_that_grows_in_the_stream(self, tmp_path, monkeypatch):
        """The decoder is bound too, not only what the header says."""
        small, large = pictures(2, 32, 32), pictures(2, 256, 256)
        raw = b""
        for number, part in enumerate((small, large)):
            raw += Path(save_video(str(tmp_path / f"{number}.h264"), part, codec="libx264")).read_bytes()
        assert len({frame.shape for frame in decoded(raw)}) == 2
        monkeypatch.setattr(clips, "MAX_FRAME_PIXELS", 10_000)
        monkeypatch.setitem(video_stream._OPTIONS, "max_pixels", "10000")
        with pytest.raises(MediaError):
            load_video(raw)

    def test_frames_that_take_too_much_are_held_smaller(self, tmp_path):
        path = save_video(str(tmp_path / "a.mp4"), pictures(20, 64, 96))
        sampling = FrameSampling(fps=10)
        whole = load_video(path, sampling=sampling)
        most = 20 * 64 * 96
        enough = load_video(path, sampling=sampling, limits=VideoLimits(most))
        assert [frame.shape for frame in enough.frames] == [(3, 64, 96)] * 20
        held = load_video(path, sampling=sampling, limits=VideoLimits(most // 4))
        assert [frame.shape for frame in held.frames] == [(3, 32, 48)] * 20
        assert held.fps == whole.fps
        for frame, small in zip(whole.frames, held.frames):
            mean = torch.nn.functional.avg_pool2d(frame.float(), 2)
            assert (mean - small.float()).abs().mean() < 3

    def test_frames_that_are_files_are_held_smaller_too(self, tmp_path):
        """Those that the caller has in memory stay as they are."""
        given = pictures(4, 64, 96)
        files = []
        for number, frame in enumerate(given):
            files.append(tmp_path / f"{number}.png")
            Image.fromarray(frame).save(files[-1])
        for frames, size in ((files, (32, 48)), ([Image.open(file) for file in files], (32, 48)), (given, (64, 96))):
            video = load_video(Video(frames, 2.0), limits=VideoLimits(4 * 32 * 48))
            assert [frame.shape for frame in video.frames] == [(3, *size)] * 4
            assert video.source_size == (64, 96)

    def test_a_long_clip_of_full_hd_is_held_whole(self):
        frame = torch.zeros(3, 1080, 1920, dtype=torch.uint8)
        assert VideoLimits().shrunk(frame, FrameSampling().max_frames, "") is frame

    def test_frames_of_a_file_are_counted(self, tmp_path, monkeypatch):
        files = [save_video(str(tmp_path / "a.mp4"), pictures(9)), animation("GIF", 9), animation("WEBP", 9)]
        for most, refused in ((9, False), (8, True)):
            monkeypatch.setattr(clips, "MAX_FRAMES", most)
            for file in files:
                if refused:
                    with pytest.raises(MediaError, match=r"video 1\b.*: more than 8 frames, the most"):
                        load_video(file, name="video 1")
                else:
                    assert load_video(file).frames


def animation(kind, count, height=32, width=48):
    file = BytesIO()
    first, *others = map(Image.fromarray, pictures(count, height, width))
    first.save(file, kind, save_all=True, append_images=others, duration=100)
    return file.getvalue()


class TestTime:
    """Decoding has a time, which is looked at between frames and between packets without a frame."""

    @pytest.fixture(params=["mp4", "GIF", "WEBP", "PNG", "frames"])
    def source(self, request, tmp_path):
        if request.param == "mp4":
            return Path(save_video(str(tmp_path / "a.mp4"), pictures(40)))
        if request.param == "frames":
            return Video([png(picture) for picture in pictures(40)], 2.0)
        return animation(request.param, 40)

    def test_it_ends_once_the_time_is_over(self, source):
        """The clock goes on by a second each time that it is looked at."""
        for seconds in (1.0, 20.0):
            ticks = count()
            with pytest.raises(MediaError) as caught:
                load_video(source, name="video 1", limits=VideoLimits(seconds=seconds), clock=ticks.__next__)
            assert re.fullmatch(
                rf"video 1.*: not decoded within {seconds:g} s \(--video-decode-seconds\)\. .*raise the limit\.",
                str(caught.value),
            )
            assert next(ticks) == seconds + 2  # at once, whatever is left of it
        ticks = count()
        assert load_video(source, limits=VideoLimits(seconds=1000.0), clock=ticks.__next__).frames
        assert next(ticks) > 20

    def test_packets_that_give_no_frame(self, tmp_path, monkeypatch):
        class Silent:
            """A decoder that takes all packets and gives nothing."""

            def __init__(self, container):
                self.streams = container.streams

            def demux(self, **streams):
                return (self for _ in range(1000))

            def decode(self):
                return []

        stream = video_stream.VideoStream
        opened = stream._opened

        @contextmanager
        def silent(clip):
            with opened(clip) as container:
                yield Silent(container)

        decode = stream.decode

        def decode_silently(clip, *given):
            monkeypatch.setattr(stream, "_opened", silent)
            return decode(clip, *given)

        monkeypatch.setattr(stream, "decode", decode_silently)
        ticks = count()
        with pytest.raises(MediaError, match="not decoded within 500 s"):
            load_video(
                save_video(str(tmp_path / "a.mp4"), pictures()),
                limits=VideoLimits(seconds=500.0),
                clock=ticks.__next__,
            )


def png(picture):
    file = BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def decoded(raw):
    with av.open(BytesIO(raw)) as container:
        return [np.empty((frame.height, frame.width)) for frame in container.decode(video=0)]
