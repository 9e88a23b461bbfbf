"""From images and videos to embeddings: preprocessor and vision engine, within the engine's limits."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.profile import BuildProfile
from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.windows import Grid, window_layout

from ..backends.runners import VisionRunner
from ..inputs.files import labelled
from ..inputs.images import ImageSource, file_bytes, load_image
from ..inputs.video import FrameSampling, Video, VideoSource, load_video
from ..preprocessing.preprocessor import PackedPixels, Preprocessor


@dataclass(frozen=True)
class LoadedImage:
    """Decoded pixels ``[3, H, W]`` and the grid that they will have."""

    pixels: Tensor
    grid: Grid

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes


@dataclass(frozen=True)
class LoadedVideo:
    """Sampled frames, the grid that they will have, and seconds between temporal patches."""

    video: Video
    grid: Grid
    second_per_grid: float

    @property
    def nbytes(self) -> int:
        return sum(load_image(frame).nbytes for frame in self.video.frames)


@dataclass
class StageTimes:
    """Seconds spent in the preprocessor and in the vision engine."""

    preprocess: float = 0.0
    vision: float = 0.0


class MediaEmbedder:
    """Loads, checks and embeds.

    Args:
        preprocessor: makes the pixels.
        runner: the vision engine.
        profile: its limits.
        config: the vision tower.
    """

    def __init__(
        self, preprocessor: Preprocessor, runner: VisionRunner, profile: BuildProfile, config: VisionConfig
    ) -> None:
        self._preprocessor, self._runner, self._profile, self._config = preprocessor, runner, profile, config
        self._pixels: Tensor | None = None  # of the largest batch so far: free again once its engine call has returned

    @property
    def sampling(self) -> FrameSampling:
        """Which frames of a video file are kept where a request does not say."""
        return self._preprocessor.settings.sampling

    def file_bytes(self, source: ImageSource, name: str) -> bytes | None:
        """What an image file holds, see :func:`runtime.inputs.images.file_bytes`."""
        return file_bytes(source, name=name, limits=self._preprocessor.image_limits)

    def load_image(self, source: ImageSource, name: str, contents: bytes | None = None) -> LoadedImage:
        """Decode an image and check its size.

        Args:
            source: see :data:`runtime.inputs.images.ImageSource`.
            name: what error messages call it.
            contents: of the file, where somebody has read it already.

        Raises:
            MediaError: it cannot be read.
            LimitError: it is outside the engine's profile.
        """
        if contents is None:
            (pixels,) = self._preprocessor.load_images([source], [name])
        else:
            (pixels,) = self._preprocessor.load_images([contents], [labelled(source, name)])
        name = _with_path(name, source)
        height, width = pixels.shape[1:]
        grid = self._preprocessor.image_grid(height, width, name=name)
        self._profile.check_frame(grid, name, f"{width}x{height}", self._config)
        return LoadedImage(pixels, grid)

    def load_video(self, source: VideoSource, name: str, fps: float | None = None) -> LoadedVideo:
        """Decode and sample a video and check its frames' size; raises as :meth:`load_image`.

        Args:
            source: see :data:`runtime.inputs.video.VideoSource`.
            name: what error messages call it.
            fps: what a message's part says, as in qwen-vl-utils: of a file, the frames to keep of each second; of
                frames in memory, the rate that they have.
        """
        sampling = self.sampling
        if isinstance(source, (str, Path, bytes)) and fps is not None:
            sampling, fps = _sampling(sampling, fps, name), None
        elif not isinstance(source, (Video, str, Path, bytes, np.ndarray, Tensor, Sequence)):
            raise MediaError(
                f"{name}: a {type(source).__name__} is no video; give a path, bytes, an array or a list of frames"
            )
        video = load_video(source, fps=fps, sampling=sampling, name=name)
        height, width = load_image(video.frames[0], name=name).shape[1:]
        name = _with_path(name, source)
        grid = self._preprocessor.video_grid(len(video.frames), height, width, name=name)
        self._profile.check_frame(grid, name, f"{width}x{height}", self._config)
        return LoadedVideo(video, grid, self._config.temporal_patch_size / video.fps)

    def embed(
        self, images: Sequence[LoadedImage], videos: Sequence[LoadedVideo] = ()
    ) -> tuple[list[Tensor], list[Tensor], StageTimes]:
        """Embed any mix of sizes, as few engine calls as the profile's ``max_batch_size`` allows.

        Returns:
            ``[tokens, C]`` of each image and of each video, and the time spent.
        """
        times = StageTimes()
        limit = self._profile.max_batch_size
        image_embeds: list[Tensor] = []
        for first in range(0, len(images), limit):
            pixels = [image.pixels for image in images[first : first + limit]]
            packed = self._timed_preprocess(times, images=pixels)
            image_embeds += self._run(packed, times).split(packed.layout.tokens_per_item)
        video_embeds = [self._run(self._timed_preprocess(times, videos=[video.video]), times) for video in videos]
        return image_embeds, video_embeds, times

    def _timed_preprocess(
        self, times: StageTimes, images: Sequence[Tensor] = (), videos: Sequence[Video] = ()
    ) -> PackedPixels:
        began = time.perf_counter()
        packed = self._preprocessor.preprocess(images, videos, out=self._pixels)
        if self._pixels is None or packed.pixel_values.numel() > self._pixels.numel():
            self._pixels = packed.pixel_values.view(-1)
        times.preprocess += time.perf_counter() - began
        return packed

    def _run(self, packed: PackedPixels, times: StageTimes) -> Tensor:
        """One call, or several where the frames of a video are more than a call takes: they do not see each other."""
        began = time.perf_counter()
        frames = [(1, h, w) for t, h, w in packed.grids for _ in range(t)]
        limit = self._profile.max_batch_size
        if len(frames) <= limit:
            embeds = self._runner(packed.pixel_values, packed.layout)
        else:
            parts, window = [], 0
            for first in range(0, len(frames), limit):
                layout = window_layout(tuple(frames[first : first + limit]), self._config)
                windows = len(layout.window_lengths)
                parts.append(self._runner(packed.pixel_values[window : window + windows], layout))
                window += windows
            embeds = torch.cat(parts)
        times.vision += time.perf_counter() - began
        return embeds


def _with_path(name: str, source: Any) -> str:
    return f"{name}, {source}" if isinstance(source, (str, Path)) else name


def _sampling(sampling: FrameSampling, fps: float, name: str) -> FrameSampling:
    if not (isinstance(fps, (int, float)) and math.isfinite(fps) and fps > 0):
        raise MediaError(f"{name}: fps {fps} is not a number above 0")
    return replace(sampling, fps=fps)
