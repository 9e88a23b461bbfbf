"""A video becomes a list of frames ``[3, H, W]`` of one size, and the rate at which they follow each other.

Letters: T frames, C channels, H and W the sides in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen2vl_trt.errors import MediaError, MissingDependencyError

from .images import ImageSource, channels_first, load_image, opened, rgb

if TYPE_CHECKING:
    import av

DEFAULT_FPS = 24.0
"""Rate of frames given without one; Transformers 5 assumes the same."""

_COMPLETE = 0.9
"""Share of the frames a file claims that it must hold; headers are often off by a few, a truncated file by more."""


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are kept; the fields are those of ``video_preprocessor_config.json``.

    Attributes:
        fps: frames kept of each second.
        min_frames: fewest frames kept, if the video has so many.
        max_frames: most frames kept.
        temporal_patch_size: the number kept is a multiple of this, if the video has so many.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    temporal_patch_size: int = 2

    def indices(self, total: int, fps: float) -> list[int]:
        """Frames to keep of ``total`` at ``fps``: those Transformers' video processor keeps, evenly spaced."""
        unit = self.temporal_patch_size
        most = min(self.max_frames, total) // unit * unit
        count = math.floor(min(max(total / fps * self.fps, self.min_frames), most, total) / unit) * unit
        if count <= 0:  # shorter than a temporal patch, where Transformers divides by zero
            return list(range(min(total, unit)))
        # The step is rounded, so now and then one index too many comes out, the end itself.
        return [index for index in torch.arange(0, total, total / count).int().tolist() if index < total]


@dataclass(frozen=True)
class Video:
    """Frames of one size, in order, and their rate.

    Attributes:
        frames: images (see :data:`~runtime.inputs.images.ImageSource`); ``[3, H, W]`` tensors once loaded.
        fps: frames per second of these frames, that is, after sampling.
    """

    frames: Sequence[ImageSource]
    fps: float = DEFAULT_FPS


VideoSource = Video | str | Path | bytes | np.ndarray | Tensor | Sequence[ImageSource]
"""A :class:`Video`, a path, the bytes of a video file, ``[T, C, H, W]``, ``[T, H, W, C]``, or a list of images."""


def load_video(
    source: VideoSource,
    *,
    fps: float | None = None,
    sampling: FrameSampling | None = None,
    name: str | None = None,
) -> Video:
    """Read one video.

    Args:
        source: see :data:`VideoSource`.
        fps: frames per second of the source, before sampling. By default what the file or the :class:`Video` says,
            :data:`DEFAULT_FPS` where neither does.
        sampling: which frames of a file are kept, by default ``FrameSampling()``. Frames given in memory are all
            kept, as in Transformers: whoever has them has chosen them (or does, by :meth:`FrameSampling.indices`).
        name: what error messages call it, such as ``"video 1"``; a path is always named.

    Returns:
        A video whose frames are ``[3, H, W]`` tensors, uint8 or float32 as in
        :func:`~runtime.inputs.images.load_image`, and whose rate is that of the frames kept.

    Raises:
        MediaError: no such file, no video stream, no frame, truncated or corrupt, frames of different sizes or kinds,
            or a rate that is not above 0.
        MissingDependencyError: a file, and PyAV is not installed.
    """
    label = name or "video"
    if isinstance(source, (str, Path)):
        label = f"{name} ({source})" if name else str(source)
    if fps is not None:
        _check_rate(fps, label)
    if isinstance(source, (str, Path, bytes)):
        return _from_file(source, fps, sampling or FrameSampling(), label)
    if isinstance(source, Video):
        _check_rate(source.fps, label)
        fps, source = fps or source.fps, source.frames
    fps = fps or DEFAULT_FPS
    if not len(source):
        raise MediaError(f"{label}: no frames")
    return Video(_same_size(_frames(source, label), label), fps)


def _check_rate(fps: float, label: str) -> None:
    if not (isinstance(fps, (int, float)) and math.isfinite(fps) and fps > 0):
        raise MediaError(f"{label}: fps {fps} is not a number above 0")


def _frames(source: np.ndarray | Tensor | Sequence[ImageSource], label: str) -> list[Tensor]:
    if not isinstance(source, (np.ndarray, Tensor)):
        return [load_image(frame, name=f"{label}, frame {number}") for number, frame in enumerate(source, start=1)]
    if source.ndim != 4:
        raise MediaError(f"{label}: shape {list(source.shape)} is not [T, C, H, W] or [T, H, W, C]")
    first, last = source.shape[1] in (1, 3, 4), source.shape[3] in (1, 3, 4)
    if isinstance(source, np.ndarray):
        if first and not last:
            source = np.moveaxis(source, 1, 3)
        source = channels_first(source, label)
    elif last and not first:
        source = source.movedim(3, 1)
    return list(rgb(source, label).unbind(0))


def _same_size(frames: list[Tensor], label: str) -> list[Tensor]:
    height, width = frames[0].shape[1:]
    for number, frame in enumerate(frames, start=1):
        if frame.shape[1:] != (height, width):
            raise MediaError(
                f"{label}: frame {number} is {frame.shape[2]}x{frame.shape[1]}, frame 1 is {width}x{height};"
                " all frames must have one size"
            )
        if frame.dtype != frames[0].dtype:
            raise MediaError(f"{label}: frame {number} is {frame.dtype}, frame 1 is {frames[0].dtype}")
    return frames


def _from_file(source: str | Path | bytes, fps: float | None, sampling: FrameSampling, label: str) -> Video:
    try:
        import av
    except ImportError:
        raise MissingDependencyError(f"{label}: reading a video file needs PyAV; pip install av") from None
    if isinstance(source, bytes):
        if not source:
            raise MediaError(f"{label}: empty (0 bytes)")
    else:
        with opened(source, label, "a video"):  # PyAV's own words are for those who know it
            pass
    try:
        with av.open(BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
            if not container.streams.video:
                raise MediaError(f"{label}: no video stream")
            return _from_container(container, fps, sampling, label)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{label}: not a video, truncated or corrupt: {getattr(error, 'strerror', error)}") from None


def _from_container(
    container: av.container.InputContainer, fps: float | None, sampling: FrameSampling, label: str
) -> Video:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rate = fps or float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
    claimed = stream.frames
    if not claimed:  # some containers do not say; packets are counted without decoding
        claimed = sum(1 for packet in container.demux(stream) if packet.size)
        container.seek(0)
    if not claimed:
        raise MediaError(f"{label}: no frames")
    kept = sampling.indices(claimed, rate)
    frames, decoded = _decode(container, kept, label)
    if len(frames) < len(kept):
        if decoded < _COMPLETE * claimed:
            raise MediaError(f"{label}: truncated or corrupt: {decoded} of {claimed} frames can be decoded")
        container.seek(0)
        claimed, kept = decoded, sampling.indices(decoded, rate)
        frames, _ = _decode(container, kept, label)
    return Video(_same_size(frames, label), len(kept) / claimed * rate)


def _decode(container: av.container.InputContainer, kept: Sequence[int], label: str) -> tuple[list[Tensor], int]:
    """Frames ``kept``, upright, and how many were decoded to reach the last of them."""
    wanted, frames, decoded = set(kept), [], 0
    for index, frame in enumerate(container.decode(video=0)):
        decoded = index + 1
        if index in wanted:
            if frame.is_corrupt:
                raise MediaError(f"{label}: frame {decoded} is corrupt")
            frames.append(rgb(channels_first(_upright(frame), label), label))
        if decoded > kept[-1]:
            break
    return frames, decoded


def _upright(frame: Any) -> np.ndarray:
    """``[H, W, 3]``, turned as the file says: phones store a portrait video as landscape with a rotation."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(getattr(frame, "rotation", 0) / 90))
