"""What a video file is to the rest: a clip, which says when its frames are shown and decodes those that are kept."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from torch.nn.functional import interpolate

from qwen2vl_trt.errors import MediaError

from .frame_sampling import FrameSampling, Timeline

MAX_FRAME_PIXELS = 139264 * 256
"""Largest frame that is decoded: that of the highest level of H.264 and HEVC, 6.2; 8192x4320 is within it."""

MAX_BYTES = 768 * 3 * 1920 * 1080
"""Most bytes of decoded frames that are held of a video: as many frames as are ever kept by default, in full HD."""

VideoFile = io.RawIOBase | io.BufferedIOBase
"""Open for reading, and able to seek."""

_logger = logging.getLogger(__name__)


class Clip(Protocol):
    """A file that can be read from its beginning as often as needed.

    Attributes:
        size: height and width of its frames, upright, once one is decoded.
    """

    size: tuple[int, int]

    def timeline(self) -> Timeline:
        """When its frames are shown, as far as that is known without decoding them.

        Raises:
            MediaError: there are none, or the file is truncated or corrupt.
        """

    def decode(self, kept: Sequence[int], timeline: Timeline) -> tuple[dict[int, Tensor], Timeline]:
        """Decode some frames.

        Args:
            kept: their numbers.
            timeline: as :meth:`timeline` gave it.

        Returns:
            Each frame ``[3, H, W]``, upright, by its number; and the timeline that decoding showed, which is another
            where the decoder shows other frames than the file has.

        Raises:
            MediaError: a frame is too large, or the file is truncated or corrupt.
        """


def sample(
    clip: Clip, sampling: FrameSampling, start: float | None, end: float | None, label: str
) -> tuple[list[Tensor], float]:
    """Frames to keep, and how many of them there are a second.

    Args:
        clip: of a file.
        sampling: how many are kept.
        start: seconds, before which none is; None from the beginning.
        end: seconds, after which none is; None to the end.
        label: what error messages call the video.

    Raises:
        MediaError: what the clip or the sampling refuses, or nothing is shown between ``start`` and ``end``.
    """
    timeline = clip.timeline()
    for _ in range(3):
        first, part = _between(timeline, start, end, label)
        kept = [first + number for number in sampling.choose(part, label)]
        frames, decoded = clip.decode(kept, timeline)
        if (decoded.first, decoded.ticks) == (timeline.first, timeline.ticks):
            return [frames[number] for number in kept], len(kept) / float(part.duration)
        timeline = decoded  # a sound file decodes to the same frames the next time
    raise MediaError(f"{label}: corrupt: it decodes to other frames each time")


def _between(timeline: Timeline, start: float | None, end: float | None, label: str) -> tuple[int, Timeline]:
    if start is None and end is None:
        return 0, timeline
    length = float(timeline.duration)
    first, last = start or 0.0, length if end is None else min(end, length)
    if not first < last:
        raise MediaError(
            f"{label}: nothing is shown from {first:g} to {last:g} s (video_start, video_end); it lasts {length:.4g} s"
        )
    return timeline.between(first, last)


def check_frame(width: int, height: int, label: str) -> None:
    """Refuse a size before it takes memory.

    Raises:
        MediaError: above :data:`MAX_FRAME_PIXELS`.
    """
    if width * height > MAX_FRAME_PIXELS:
        raise MediaError(f"{label}: frames of {width}x{height} are over {MAX_FRAME_PIXELS:,} pixels; scale it down")


def held(frame: Tensor, count: int, label: str) -> Tensor:
    """A frame ``[3, H, W]``, shrunk if ``count`` of them would take more than :data:`MAX_BYTES`.

    Of the frames kept by default each then still has more pixels than a model is shown of it.
    """
    height, width = frame.shape[1:]
    if count * frame.nbytes <= MAX_BYTES:
        return frame
    scale = math.sqrt(MAX_BYTES / (count * frame.nbytes))
    size = max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
    _logger.info("%s: %d frames of %dx%d are held as %dx%d", label, count, width, height, size[1], size[0])
    return interpolate(frame[None], size, mode="bilinear", antialias=True)[0]
