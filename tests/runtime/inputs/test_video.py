"""Every form of video, and every bad one."""

import contextlib
import math
from functools import partial
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.video_utils import load_video as transformers_load_video

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.media_options import VideoOptions
from qwen2vl_trt.runtime.inputs.files import MAX_VIDEO_BYTES
from qwen2vl_trt.runtime.inputs.images import ImageLimits
from qwen2vl_trt.runtime.inputs.video import DEFAULT_FPS, FrameSampling, Video, load_video
from tests.support.media_files import save_video


def frames(count=6, height=32, width=48):
    """Frame n is grey of level 10 n, its left half brighter."""
    video = np.zeros((count, height, width, 3), np.uint8)
    video += np.arange(count, dtype=np.uint8)[:, None, None, None] * 10
    video[:, :, : width // 2] += 90
    return video


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds at 10 frames a second."""
    return save_video(str(tmp_path_factory.mktemp("video") / "clip.mp4"), frames(20))


def noise():
    return np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def noise_clip(tmp_path_factory):
    """Noise does not compress, so the frames are most of the file and the header, at its end, is little."""
    return save_video(str(tmp_path_factory.mktemp("video") / "noise.mp4"), noise())


class TestMemory:
    """Frames given in memory are all kept."""

    def test_a_dark_frame_has_the_range_of_the_others(self):
        video = torch.randint(2, 256, (3, 3, 8, 8)).float()
        video[1] = torch.rand(3, 8, 8)
        video[2] *= 0
        video[2, 0, 0, 0] = 1.5  # between the ranges by itself
        for form in (list(video), Video(list(video), 2.0)):
            loaded = load_video(form)
            assert torch.equal(torch.stack(loaded.frames), video / 255)
            assert all(map(torch.equal, load_video(loaded).frames, loaded.frames))

    def test_image_limits_are_those_of_frames(self):
        small = Image.new("RGB", (20, 10))
        with pytest.raises(MediaError, match="frame 1: 20x10 is 200 pixels; at most 199"):
            load_video([small], image_limits=ImageLimits(pixels=199))

    def test_every_form_agrees(self):
        video = frames()
        tensor = torch.from_numpy(video).permute(0, 3, 1, 2)
        forms = [video, np.moveaxis(video, 3, 1), tensor, tensor.permute(0, 2, 3, 1), list(video), list(tensor)]
        forms += [tuple(Image.fromarray(frame) for frame in video)]
        for form in forms:
            loaded = load_video(form, VideoOptions(fps=3))
            assert loaded.fps == 3
            assert len(loaded.frames) == 6
            assert all(torch.equal(frame, expected) for frame, expected in zip(loaded.frames, tensor, strict=True))

    def test_mixed_sources(self, tmp_path):
        path = tmp_path / "a.png"
        image = Image.fromarray(frames()[2])
        image.save(path)
        loaded = load_video([path, image, path.read_bytes()])
        assert torch.equal(loaded.frames[0], loaded.frames[1])
        assert torch.equal(loaded.frames[0], loaded.frames[2])

    def test_rates(self):
        video = list(frames())
        assert load_video(Video(video, fps=5)).fps == 5
        assert load_video(Video(video, fps=5), VideoOptions(fps=2)).fps == 2
        assert load_video(video, VideoOptions(sample_fps=8)).fps == 8

    def test_no_rate(self, caplog):
        """qwen-vl-utils' 2 a second, and a line that says so."""
        assert load_video(list(frames()), name="video 2").fps == DEFAULT_FPS == 2
        assert [record.getMessage() for record in caplog.records] == [
            "video 2: no rate given for its frames; 2 a second are assumed (sample_fps)"
        ]
        caplog.clear()
        load_video(Video(list(frames()), 2.0))
        assert not caplog.records

    def test_grey_and_transparent_arrays(self):
        grey = frames()[..., :1]
        assert load_video(grey).frames[0].shape == (3, 32, 48)
        clear = np.zeros((2, 4, 6, 4), np.uint8)
        assert load_video(clear).frames[1].unique().tolist() == [255]

    def test_float_tensor(self):
        video = torch.rand(2, 3, 8, 8)
        assert torch.equal(torch.stack(list(load_video(video).frames)), video)

    def test_float_tensor_of_8_bit_values(self):
        """As qwen-vl-utils returns a video."""
        video = torch.from_numpy(frames()).permute(0, 3, 1, 2)
        loaded = torch.stack(list(load_video(video.float()).frames))
        assert torch.equal((loaded * 255).round().to(torch.uint8), video)


class TestFiles:
    """Real files, through PyAV."""

    def test_as_transformers(self, clip):
        sampling = FrameSampling(fps=4, min_frames=2)
        loaded = load_video(clip, sampling=sampling)
        choose = partial(Qwen2VLVideoProcessor().sample_frames, fps=4, min_frames=2)
        expected, metadata = transformers_load_video(
            clip, backend="pyav", sample_indices_fn=lambda metadata: choose(metadata)
        )
        assert np.array_equal(torch.stack(list(loaded.frames)).permute(0, 2, 3, 1).numpy(), expected)
        assert loaded.fps == pytest.approx(metadata.sampled_fps)
        assert len(loaded.frames) == 8

    def test_default_sampling_and_content(self, clip):
        loaded = load_video(clip)
        assert loaded.fps == pytest.approx(2)
        levels = [frame[:, 16, 40].float().mean().item() for frame in loaded.frames]
        assert levels == pytest.approx([0, 50, 100, 150], abs=6)

    def test_bytes_and_path_objects(self, clip, tmp_path):
        path = tmp_path / "copy.mp4"
        path.write_bytes(Path(clip).read_bytes())
        from_path, from_bytes = load_video(path), load_video(path.read_bytes())
        assert all(torch.equal(a, b) for a, b in zip(from_path.frames, from_bytes.frames, strict=True))

    def test_container_without_a_frame_count(self, tmp_path):
        path = save_video(str(tmp_path / "a.mkv"), frames(20))
        with av.open(path) as container:
            assert container.streams.video[0].frames == 0
        assert len(load_video(path).frames) == 4

    @pytest.mark.parametrize("rotation", [90, 180, 270])
    def test_rotation(self, rotation, tmp_path):
        upright = frames(4)
        stored = np.ascontiguousarray(np.rot90(upright, -rotation // 90, axes=(1, 2)))
        loaded = load_video(save_video(str(tmp_path / "a.mp4"), stored, rotation=rotation))
        difference = loaded.frames[0].permute(1, 2, 0).numpy().astype(int) - upright[0]
        assert abs(difference).mean() < 5

    def test_one_frame(self, tmp_path):
        assert len(load_video(save_video(str(tmp_path / "a.mp4"), frames(1))).frames) == 1


class TestBadInput:
    """Each is one line that names the thing."""

    def refused(self, source, *words, **options):
        with pytest.raises(MediaError) as caught:
            load_video(source, **options)
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert word in message, message

    @pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf, "2"])
    def test_rate(self, fps):
        self.refused(Video(frames(), fps), "video 1: fps is", "above 0", name="video 1")

    def test_no_frames(self):
        self.refused([], "video: no frames")
        self.refused(np.zeros((0, 4, 4, 3), np.uint8), "no frames")

    def test_what_is_no_video(self):
        self.refused(BytesIO(b"x"), "video 1: a BytesIO is no video", name="video 1")

    def test_sizes_differ(self):
        self.refused([np.zeros((4, 6, 3), np.uint8), np.zeros((4, 8, 3), np.uint8)], "frame 2 is 8x4", "frame 1 is 6x4")

    def test_kinds_differ(self):
        self.refused([torch.rand(3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)], "frame 2 is torch.uint8")

    def test_a_bad_frame_is_named(self, tmp_path):
        self.refused([np.zeros((4, 6, 3), np.uint8), tmp_path / "b.png"], "video 2, frame 2", "b.png", name="video 2")

    @pytest.mark.parametrize("shape", [(4, 4, 3), (2, 5, 4, 6)])
    def test_shape(self, shape):
        self.refused(np.zeros(shape, np.uint8), str(list(shape)))
        self.refused(torch.zeros(shape, dtype=torch.uint8), str(list(shape)))

    def test_values(self):
        for value in (1.02, 256.0, -1.0, math.nan):  # a resize in floats overshoots 1
            self.refused(torch.full((2, 3, 4, 4), value), "0..1", "0..255")
        self.refused(np.zeros((2, 4, 4, 3)), "float64")

    def test_no_such_file(self, tmp_path):
        self.refused(tmp_path / "none.mp4", "none.mp4: no such file")
        self.refused(str(tmp_path / "none.mp4"), "video 3 (", "none.mp4): no such file", name="video 3")

    def test_directory_address_and_empty(self, tmp_path):
        self.refused(tmp_path, "directory")
        self.refused("https://example.org/a.mp4", "not fetched")
        self.refused("a\0b", "cannot be read")
        path = tmp_path / "empty.mp4"
        path.touch()
        self.refused(path, "empty.mp4: empty (0 bytes)")
        self.refused(b"", "empty (0 bytes)")

    def test_not_a_video(self, tmp_path):
        path = tmp_path / "notes.mp4"
        path.write_text("no video at all " * 100)
        self.refused(path, "notes.mp4", "not a video, truncated or corrupt")
        self.refused(path.read_bytes(), "not a video, truncated or corrupt")

    def test_no_video_stream(self, tmp_path):
        path = str(tmp_path / "sound.wav")
        with av.open(path, "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
            sound.sample_rate = 8000
            container.mux(stream.encode(sound))
            container.mux(stream.encode())
        self.refused(path, "sound.wav: no video stream")

    @pytest.mark.parametrize(("name", "codec"), [("a.mp3", "libmp3lame"), ("a.mp4", "aac")])
    def test_cover_art(self, name, codec, tmp_path):
        path = str(tmp_path / name)
        with av.open(path, "w") as container:
            stream = container.add_stream(codec, rate=44100, layout="mono")
            cover = container.add_stream("mjpeg", rate=1)
            cover.width = cover.height = 32
            cover.pix_fmt = "yuvj420p"
            cover.disposition = Disposition.attached_pic
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 44100
            packets = [*stream.encode(sound), *stream.encode()]
            packets += cover.encode(av.VideoFrame.from_ndarray(frames(1)[0][:, :32].copy(), format="rgb24"))
            container.mux([*packets, *cover.encode()])
        self.refused(path, f"{name}: no video stream, only cover art")

    def test_a_still_image(self, tmp_path):
        for kind in ("gif", "webp", "png", "jpg", "bmp", "tiff"):
            path = tmp_path / f"a.{kind}"
            Image.fromarray(frames(1)[0]).save(path)
            self.refused(path, f"a.{kind}: a still image, not a video; give it as an image")

    def test_a_picture_beside_the_frames_of_a_png_file_is_none_of_them(self):
        shades = [Image.new("RGB", (40, 30), (shade, 0, 0)) for shade in (200, 10, 20, 30, 40)]
        file = BytesIO()
        shades[0].save(file, "PNG", save_all=True, append_images=shades[1:], duration=500, default_image=True)
        assert [int(frame[0, 0, 0]) for frame in load_video(file.getvalue()).frames] == [10, 20, 30, 40]

    def test_more_bytes_than_are_read(self, tmp_path):
        path = tmp_path / "a.mp4"
        with path.open("wb") as file:
            file.truncate(MAX_VIDEO_BYTES + 1)  # takes no space
        self.refused(path, r"a.mp4: more than 68,719,476,736 bytes, the most that are read of a video file")

    def test_damaged_animations_give_frames_or_media_errors(self):
        generator = np.random.default_rng(0)
        pictures = [Image.fromarray(frame) for frame in noise()[:4]]
        for kind in ("GIF", "WEBP", "PNG"):
            file = BytesIO()
            pictures[0].save(file, kind, save_all=True, append_images=pictures[1:], duration=100)
            assert len(load_video(file.getvalue()).frames) == 4
            for _ in range(40):
                damaged = bytearray(file.getvalue())
                for position in generator.integers(12, len(damaged), 6):
                    damaged[position] = generator.integers(0, 256)
                with contextlib.suppress(MediaError):  # anything else fails the test
                    assert load_video(bytes(damaged[: generator.integers(40, len(damaged))])).frames

    @pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
    def test_truncated(self, share, noise_clip):
        data = Path(noise_clip).read_bytes()
        self.refused(data[: int(len(data) * share)], "truncated or corrupt")

    @pytest.mark.parametrize("share", [0.4, 0.7])
    def test_truncated_behind_its_header(self, share, tmp_path):
        """A file made for streaming has its header in front, so it opens, and ends too early."""
        path = save_video(str(tmp_path / "a.mp4"), noise(), options={"movflags": "+faststart"})
        data = Path(path).read_bytes()
        load_video(data)
        self.refused(data[: int(len(data) * share)], "truncated or corrupt")

    def test_damaged_bytes_give_frames_or_media_errors(self, clip):
        data = Path(clip).read_bytes()
        generator = np.random.default_rng(0)
        for _ in range(40):
            damaged = bytearray(data)
            for position in generator.integers(0, len(data), 6):
                damaged[position] = generator.integers(0, 256)
            with contextlib.suppress(MediaError):  # anything else fails the test
                assert load_video(bytes(damaged)).frames
