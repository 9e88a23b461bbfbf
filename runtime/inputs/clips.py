"""Video files as clips: the protocol, sampling of frames, and animated GIF, WebP and PNG files by Pillow."""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, islice
from typing import BinaryIO, Protocol, cast

from PIL import Image, ImageSequence
from torch import Tensor
from torch.nn.functional import interpolate

from qwen2vl_trt.errors import MediaError

from .frame_sampling import FrameSampling, Timeline
from .image_formats import decode_errors, open_image
from .images import load_image

MAX_FRAME_PIXELS = 139264 * 256
"""Of a frame that is decoded: as in level 6.2, the highest of H.264 and HEVC; 8192x4320 is within it."""

MAX_FRAMES = 1 << 22
"""Of a file: 38 hours at 30 a second. The timeline that is read first takes up to 150 bytes a frame."""

VideoFile = io.RawIOBase | io.BufferedIOBase
"""Open for reading, and seekable."""

_SIGNATURE_BYTES = 12
_IMAGE_SIGNATURES = (b"GIF87a", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
_ANIMATED = ("GIF", "WEBP", "PNG")
_MIN_DELAY, _DEFAULT_DELAY = 10, 100
"""Milliseconds. As in browsers, a delay of up to the first becomes the second."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoLimits:
    """Maxima of one video.

    Attributes:
        pixels: of the frames that are kept, together; larger frames are shrunk. By default 768 frames in full HD.
        seconds: of reading and decoding a file, or the files that are its frames.
    """

    pixels: int = 768 * 1920 * 1080
    seconds: float = 3600.0

    def timer(self, label: str, clock: Callable[[], float] = time.monotonic) -> Callable[[], None]:
        """To be called for each frame: it raises MediaError once ``seconds`` have passed from now."""
        end = clock() + self.seconds

        def check() -> None:
            if clock() > end:
                raise MediaError(
                    f"{label}: not decoded within {self.seconds:g} s (--video-decode-seconds). Shorten it or scale it"
                    " down, or raise the limit."
                )

        return check

    def shrunk(self, frame: Tensor, count: int, label: str) -> Tensor:
        """A frame ``[3, H, W]``, smaller if ``count`` of them would exceed ``pixels``."""
        height, width = frame.shape[1:]
        scale = math.sqrt(self.pixels / (count * height * width))
        if scale >= 1:
            return frame
        size = max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
        _logger.info("%s: %d frames of %dx%d are held as %dx%d", label, count, width, height, size[1], size[0])
        return interpolate(frame[None], size, mode="bilinear", antialias=True)[0]


class Clip(Protocol):
    """A video file, read from its beginning as often as needed.

    Attributes:
        size: height and width of its frames, upright, once one is decoded.
    """

    size: tuple[int, int]

    def timeline(self) -> Timeline:
        """When its frames are shown, as far as that is known without decoding.

        Raises:
            MediaError: no frames, or the file is truncated or corrupt.
        """

    def decode(self, indices: Sequence[int], timeline: Timeline) -> tuple[dict[int, Tensor], Timeline]:
        """Decode some frames.

        Args:
            indices: of these frames.
            timeline: from :meth:`timeline`.

        Returns:
            Frames ``[3, H, W]``, upright, by index; and the timeline as decoded, which differs if the decoder shows
            other frames than the file has.

        Raises:
            MediaError: a frame is too large, or the file is truncated or corrupt.
        """


def sample_clip(
    clip: Clip, sampling: FrameSampling, start: float | None, end: float | None, label: str
) -> tuple[list[Tensor], float]:
    """Sampled frames, and how many there are a second.

    Args:
        clip: to decode.
        sampling: chooses the frames.
        start: seconds; None for the beginning.
        end: seconds; None for the end.
        label: of the video, for error messages.

    Raises:
        MediaError: of the clip or the sampling, or nothing is shown between ``start`` and ``end``.
    """
    timeline = clip.timeline()
    for _ in range(3):
        first, part = _between(timeline, start, end, label)
        indices = [first + index for index in sampling.choose(part, label)]
        frames, decoded = clip.decode(indices, timeline)
        if (decoded.first, decoded.ticks) == (timeline.first, timeline.ticks):
            return [frames[index] for index in indices], len(indices) / float(part.duration)
        timeline = decoded  # a valid file decodes to the same frames the next time
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
    """Raises MediaError for a frame above :data:`MAX_FRAME_PIXELS`, before it is decoded."""
    if width * height > MAX_FRAME_PIXELS:
        raise MediaError(f"{label}: frames of {width}x{height} are over {MAX_FRAME_PIXELS:,} pixels; scale it down")


def check_count(count: int, label: str) -> None:
    """Raises MediaError above :data:`MAX_FRAMES`, while they are counted."""
    if count > MAX_FRAMES:
        raise MediaError(f"{label}: more than {MAX_FRAMES:,} frames, the most that are read of a video; cut it")


def is_image_file(file: VideoFile) -> bool:
    """Whether a file has the signature of an image, animated or not; rewinds it."""
    start = file.read(_SIGNATURE_BYTES)
    file.seek(0)
    return start.startswith(_IMAGE_SIGNATURES) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


class Animation:
    """An animated image file as a :class:`Clip`; each frame has its own delay."""

    def __init__(self, file: VideoFile, label: str, limits: VideoLimits, check_time: Callable[[], None]) -> None:
        self._file, self._label, self._limits, self._check_time = file, label, limits, check_time
        self.size = (0, 0)

    def timeline(self) -> Timeline:
        """Decodes all frames, since WebP has no other way to learn the delays."""
        delays = []
        for image in self._frames():
            delay = int(image.info.get("duration") or 0)
            delays.append(delay if delay > _MIN_DELAY else _DEFAULT_DELAY)
            check_count(len(delays), self._label)
        *ticks, end = accumulate(delays, initial=0)
        return Timeline(tuple(ticks), Fraction(end), Fraction(1, 1000))

    def decode(self, indices: Sequence[int], timeline: Timeline) -> tuple[dict[int, Tensor], Timeline]:
        wanted, frames = set(indices), {}
        for index, image in enumerate(islice(self._frames(), max(indices) + 1)):
            if index in wanted:
                frame = load_image(image, name=f"{self._label}, frame {index + 1}")
                self.size = (frame.shape[1], frame.shape[2])
                frames[index] = self._limits.shrunk(frame, len(indices), self._label)
        return frames, timeline

    def _frames(self) -> Iterator[Image.Image]:
        self._file.seek(0)
        with decode_errors(self._label), open_image(cast(BinaryIO, self._file), self._label) as image:
            check_frame(image.width, image.height, self._label)
            if image.format not in _ANIMATED or not getattr(image, "is_animated", False):
                raise MediaError(f"{self._label}: a still image, not a video; give it as an image")
            first = int(bool(image.info.get("default_image")))  # a PNG's fallback for viewers without animation
            for frame in islice(ImageSequence.Iterator(image), first, None):
                self._check_time()
                frame.load()
                yield frame
