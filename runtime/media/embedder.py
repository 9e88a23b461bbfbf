"""From images and videos to embeddings: preprocessor and vision engine, within the engine's limits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.media_options import ImageOptions, VideoOptions
from qwen2vl_trt.windows import Grid, WindowLayout, window_layout

from ..backends.runners import VisionRunner
from ..inputs.files import labelled
from ..inputs.images import ImageSource, file_bytes
from ..inputs.video import FrameSampling, Video, VideoSource, load_video
from ..observer import Observer, Stage, unobserved
from ..preprocessing.preprocessor import PackedPixels, Preprocessor
from ..preprocessing.sizes import MediaSize


@dataclass(frozen=True)
class LoadedImage:
    """Decoded pixels ``[3, H, W]`` and the size that they will have."""

    pixels: Tensor
    size: MediaSize

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes


@dataclass(frozen=True)
class LoadedVideo:
    """Sampled frames and the size that they will have."""

    video: Video
    size: MediaSize

    @property
    def nbytes(self) -> int:
        # load_video leaves tensors as frames
        frames: Sequence[Tensor] = self.video.frames  # type: ignore[assignment]
        return sum(frame.nbytes for frame in frames)


@dataclass
class StageTimes:
    """Seconds spent in the preprocessor and in the vision engine."""

    preprocess: float = 0.0
    vision: float = 0.0


class MediaEmbedder:
    """Loads, checks and embeds.

    Args:
        preprocessor: makes the pixels, of sizes that the engine takes.
        runner: the vision engine.
        profile: its limits.
        config: the vision tower.
        observe: surrounds every ``preprocess`` and ``vision``.
    """

    def __init__(
        self,
        preprocessor: Preprocessor,
        runner: VisionRunner,
        profile: BuildProfile,
        config: VisionConfig,
        observe: Observer = unobserved,
    ) -> None:
        self._preprocessor, self._runner, self._profile, self._config = preprocessor, runner, profile, config
        self._observe = observe
        self._pixels: Tensor | None = None  # of the largest batch so far: free again once its engine call has returned

    @property
    def sampling(self) -> FrameSampling:
        """Which frames of a video file are kept where a request does not say."""
        return self._preprocessor.settings.sampling

    def file_bytes(self, source: ImageSource, name: str) -> bytes | None:
        """What an image file holds, see :func:`qwen2vl_trt.runtime.inputs.images.file_bytes`."""
        return file_bytes(source, name=name, limits=self._preprocessor.image_limits)

    def load_image(
        self, source: ImageSource, name: str, options: ImageOptions = ImageOptions(), contents: bytes | None = None
    ) -> LoadedImage:
        """Decode an image and decide its size.

        Args:
            source: see :data:`qwen2vl_trt.runtime.inputs.images.ImageSource`.
            name: what error messages call it.
            options: of its size.
            contents: of the file, where somebody has read it already.

        Raises:
            MediaError: it cannot be read.
            LimitError: it does not fit the engine, and sizes are strict.
        """
        if contents is None:
            (pixels,) = self._preprocessor.load_images([source], [name])
        else:
            (pixels,) = self._preprocessor.load_images([contents], [labelled(source, name)])
        height, width = pixels.shape[1:]
        size = self._preprocessor.sizes.image(height, width, name=labelled(source, name), options=options)
        return LoadedImage(pixels, size)

    def load_video(self, source: VideoSource, name: str, options: VideoOptions = VideoOptions()) -> LoadedVideo:
        """Decode and sample a video and decide its frames' size; raises as :meth:`load_image`.

        Args:
            source: see :data:`qwen2vl_trt.runtime.inputs.video.VideoSource`.
            name: what error messages call it.
            options: of its frames and their size.
        """
        video = load_video(source, options, sampling=self.sampling, name=name, limits=self._preprocessor.image_limits)
        assert video.source_size is not None  # as load_video gives it
        height, width = video.source_size
        size = self._preprocessor.sizes.video(
            len(video.frames), height, width, video.fps, name=labelled(source, name), options=options
        )
        return LoadedVideo(video, size)

    def shorten(self, loaded: LoadedVideo, tokens: int, name: str, options: VideoOptions) -> LoadedVideo | None:
        """A video of at most so many tokens, by smaller frames and then by fewer; None where neither is enough."""
        shorter = self._preprocessor.sizes.video_within(tokens, loaded.size, name=name, options=options)
        if shorter is None:
            return None
        size, kept = shorter
        video = loaded.video
        frames = [video.frames[index] for index in kept]
        return LoadedVideo(replace(video, frames=frames, fps=video.fps * len(frames) / len(video.frames)), size)

    def embed(
        self, images: Sequence[LoadedImage], videos: Sequence[LoadedVideo] = ()
    ) -> tuple[list[Tensor], list[Tensor], StageTimes]:
        """Embed any mix of sizes, as few engine calls as the profile allows, see :meth:`_groups`.

        Returns:
            ``[tokens, C]`` of each image and of each video, and the time spent.
        """
        times = StageTimes()
        image_embeds: list[Tensor] = []
        for group in self._groups([image.size.grid for image in images]):
            packed = self._timed_preprocess(times, images=images[group])
            image_embeds += self._run(packed, times).split(packed.layout.tokens_per_item)
        video_embeds = [self._run(self._timed_preprocess(times, videos=[video]), times) for video in videos]
        return image_embeds, video_embeds, times

    def _groups(self, grids: Sequence[Grid]) -> Iterator[slice]:
        """Neighbours of one engine call: up to ``max_batch_size``, with no more pairs of patches than one image has.

        Full attention takes memory for the square of the longest of them, times their number, wherever it is not one
        fused kernel, and for its mask. Together they take no more of it than the largest image alone.
        """
        most, start, longest = self._profile.max_hw_dims**2, 0, 0
        for number, (_, rows, columns) in enumerate(grids):
            longest = max(longest, rows * columns)
            count = number - start + 1
            if count > 1 and (count > self._profile.max_batch_size or count * longest**2 > most):
                yield slice(start, number)
                start, longest = number, rows * columns
        if grids:
            yield slice(start, len(grids))

    def _timed_preprocess(
        self, times: StageTimes, images: Sequence[LoadedImage] = (), videos: Sequence[LoadedVideo] = ()
    ) -> PackedPixels:
        began = time.perf_counter()
        with self._observe(Stage("preprocess")):
            packed = self._preprocessor.preprocess(
                [image.pixels for image in images],
                [video.video for video in videos],
                grids=[image.size.grid for image in images] + [video.size.grid for video in videos],
                out=self._pixels,
            )
        if self._pixels is None or packed.pixel_values.numel() > self._pixels.numel():
            self._pixels = packed.pixel_values.view(-1)
        times.preprocess += time.perf_counter() - began
        return packed

    def _run(self, packed: PackedPixels, times: StageTimes) -> Tensor:
        """One call, or several where the frames of a video are more than a call takes: they do not see each other."""
        began = time.perf_counter()
        frames = [(1, h, w) for t, h, w in packed.grids for _ in range(t)]
        groups = list(self._groups(frames))
        if len(groups) == 1:
            embeds = self._call(packed.pixel_values, packed.layout)
        else:
            parts, window = [], 0
            for group in groups:
                layout = window_layout(tuple(frames[group]), self._config)
                windows = len(layout.window_lengths)
                parts.append(self._call(packed.pixel_values[window : window + windows], layout))
                window += windows
            embeds = torch.cat(parts)
        times.vision += time.perf_counter() - began
        return embeds

    def _call(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        with self._observe(Stage("vision")):
            return self._runner(pixel_values, layout)
