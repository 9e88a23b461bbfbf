"""Videos to frames ``[3, H, W]`` of one size, and their rate.

Letters: T frames, C channels, H and W the sides in pixels.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.media_options import VideoOptions

from .clips import Animation, Clip, VideoFile, VideoLimits, is_image_file, sample_clip
from .files import MAX_VIDEO_BYTES, BoundedFile, labelled, opened, too_large
from .frame_sampling import DEFAULT_FPS, FILE_OPTIONS, FrameSampling, requested_rate, requested_sampling
from .images import ImageLimits, ImageSource, channels_first, load_image, rgb
from .video_stream import VideoStream

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Video:
    """Frames of one size, in order, and their rate.

    Attributes:
        frames: images (see :data:`~qwen2vl_trt.runtime.inputs.images.ImageSource`).
        fps: frames per second, after sampling.
    """

    frames: Sequence[ImageSource]
    fps: float


@dataclass(frozen=True)
class LoadedVideo(Video):
    """Frames as ``[3, H, W]`` tensors.

    Attributes:
        source_size: height and width of the original; frames of a very large video are shrunk.
    """

    frames: Sequence[Tensor]
    source_size: tuple[int, int]


VideoSource = Video | str | Path | bytes | BoundedFile | np.ndarray | Tensor | Sequence[ImageSource]
"""A :class:`Video`, a file (path, bytes or :func:`opened_video`), ``[T, C, H, W]``, ``[T, H, W, C]``, or images."""


def options_for(source: VideoSource, own: VideoOptions, common: VideoOptions) -> VideoOptions:
    """A video's own options, completed by those of the ``common`` ones that apply to it.

    Sampling options apply to files, ``sample_fps`` to frames in memory; a :class:`Video` has its own rate.
    """
    if isinstance(source, (str, Path, bytes, bytearray, memoryview)):
        return own.over(replace(common, sample_fps=None))
    rate = None
    if not isinstance(source, Video) and own.fps is None and own.sample_fps is None:
        rate = common.sample_fps or common.fps
    return own.over(replace(common, **dict.fromkeys((*FILE_OPTIONS, "fps")), sample_fps=rate))


def load_video(
    source: VideoSource,
    options: VideoOptions | None = None,
    *,
    sampling: FrameSampling | None = None,
    name: str | None = None,
    limits: VideoLimits | None = None,
    image_limits: ImageLimits | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> LoadedVideo:
    """Read one video.

    Files are MP4, MOV, 3GP, Matroska, WebM, AVI, MPEG, FLV, ASF, Ogg, raw H.264 or HEVC, and animated GIF, WebP or
    PNG. They are sampled, see :mod:`qwen2vl_trt.runtime.inputs.frame_sampling`. As in Transformers and qwen-vl-utils,
    frames in memory are not; :meth:`FrameSampling.indices` can choose them beforehand.

    Args:
        source: see :data:`VideoSource`.
        options: of this video; sizes are ignored here. Without a rate, a :class:`Video` has its own, and other frames
            in memory have :data:`DEFAULT_FPS`, with a warning.
        sampling: defaults for files, ``FrameSampling()`` if not given.
        name: for error messages, such as ``"video 1"``; a path is always named.
        limits: of what is decoded, ``VideoLimits()`` by default.
        image_limits: of each frame that is an image file or a Pillow image, ``ImageLimits()`` by default.
        clock: seconds, for the time that decoding may take.

    Returns:
        Frames as from :func:`~qwen2vl_trt.runtime.inputs.images.load_image`, and their rate.

    Raises:
        MediaError: no such file, not regular, no video stream, no frame, truncated or corrupt, frames of different
            sizes or kinds, not decoded in time, or options that are out of range, contradict each other or do not
            apply.
        MissingDependencyError: a file, and PyAV is not installed.
    """
    options = options or VideoOptions()
    label = labelled(source, name) if isinstance(source, (str, Path)) else name or "video"
    most = limits or VideoLimits()
    check_time = most.timer(label, clock)

    def from_file(file: VideoFile) -> LoadedVideo:
        given = file, label, most, check_time
        clip: Clip = Animation(*given) if is_image_file(file) else VideoStream(*given)
        return _sampled(clip, options, sampling or FrameSampling(), label)

    if isinstance(source, (str, Path)):
        with opened_video(source, label) as file:
            return from_file(file)
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise MediaError(f"{label}: empty (0 bytes)")
        return from_file(BytesIO(source))
    if isinstance(source, BoundedFile):
        return from_file(source)
    if not isinstance(source, (Video, np.ndarray, Tensor, Sequence)):
        raise MediaError(
            f"{label}: a {type(source).__name__} is no video; give a path, bytes, an array or a list of frames"
        )
    return _from_memory(source, options, most, check_time, image_limits, label)


@contextmanager
def opened_video(path: str | Path, label: str) -> Iterator[BoundedFile]:
    """Open a video file for :func:`load_video`. Raises MediaError as ``opened``, or above ``MAX_VIDEO_BYTES``."""
    with opened(path, label, "a video") as file:
        if os.fstat(file.fileno()).st_size > MAX_VIDEO_BYTES:
            raise too_large(label, MAX_VIDEO_BYTES, "a video")
        yield BoundedFile(file)


def _sampled(clip: Clip, options: VideoOptions, sampling: FrameSampling, label: str) -> LoadedVideo:
    sampling = requested_sampling(options, sampling, label)
    frames, fps = sample_clip(clip, sampling, options.video_start, options.video_end, label)
    return LoadedVideo(list(_same_size(frames, label)), fps, clip.size)


def _from_memory(
    source: Video | np.ndarray | Tensor | Sequence[Any],
    options: VideoOptions,
    limits: VideoLimits,
    check_time: Callable[[], None],
    image_limits: ImageLimits | None,
    label: str,
) -> LoadedVideo:
    size = None
    fps = requested_rate(options, label)
    if isinstance(source, Video):
        try:
            own = VideoOptions(fps=source.fps).fps
        except MediaError as error:
            raise MediaError(f"{label}: {error}") from None
        size = source.source_size if isinstance(source, LoadedVideo) else None
        fps, source = fps or own, source.frames
    if not len(source):
        raise MediaError(f"{label}: no frames")
    frames = []
    for frame, given in zip(_same_size(_frames(source, label, image_limits), label), source):
        check_time()
        size = size or (frame.shape[1], frame.shape[2])
        # Arrays are in the caller's memory already; frames that are decoded here are limited as a file's.
        frames.append(frame if isinstance(given, (np.ndarray, Tensor)) else limits.shrunk(frame, len(source), label))
    assert size is not None  # there are frames
    if fps is None:
        _logger.warning("%s: no rate given for its frames; %g a second are assumed (sample_fps)", label, DEFAULT_FPS)
    return LoadedVideo(frames, fps or DEFAULT_FPS, size)


def _frames(source: np.ndarray | Tensor | Sequence[Any], label: str, limits: ImageLimits | None) -> Iterable[Tensor]:
    if not isinstance(source, (np.ndarray, Tensor)):
        floats = [frame for frame in source if isinstance(frame, Tensor) and frame.is_floating_point()]
        group_max = max((float(frame.max()) for frame in floats if frame.numel()), default=0)
        return (
            load_image(frame, name=f"{label}, frame {number}", limits=limits, group_max=group_max)
            for number, frame in enumerate(source, start=1)
        )
    if source.ndim != 4:
        raise MediaError(f"{label}: shape {list(source.shape)} is not [T, C, H, W] or [T, H, W, C]")
    first, last = source.shape[1] in (1, 3, 4), source.shape[3] in (1, 3, 4)
    if isinstance(source, np.ndarray):
        if first and not last:
            source = np.moveaxis(source, 1, 3)
        source = channels_first(source, label)
    elif last and not first:
        source = source.movedim(3, 1)
    return rgb(source, label).unbind(0)


def _same_size(frames: Iterable[Tensor], label: str) -> Iterator[Tensor]:
    first = None
    for number, frame in enumerate(frames, start=1):
        first = frame if first is None else first
        height, width = first.shape[1:]
        if frame.shape[1:] != (height, width):
            raise MediaError(
                f"{label}: frame {number} is {frame.shape[2]}x{frame.shape[1]}, frame 1 is {width}x{height};"
                " all frames must have one size"
            )
        if frame.dtype != first.dtype:
            raise MediaError(f"{label}: frame {number} is {frame.dtype}, frame 1 is {first.dtype}")
        yield frame
