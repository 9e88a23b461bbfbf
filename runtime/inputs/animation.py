"""Animated GIF, WebP and PNG files as clips, by Pillow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, islice
from typing import BinaryIO, cast

from PIL import Image, ImageSequence
from torch import Tensor

from qwen2vl_trt.errors import MediaError

from .clips import VideoFile, check_frame, held
from .frame_sampling import Timeline
from .image_formats import open_image
from .images import load_image

_SIGNATURE = 12
_PICTURES = (b"GIF87a", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
_ANIMATED = ("GIF", "WEBP", "PNG")
_QUICKEST, _USUAL = 10, 100
"""Milliseconds: browsers show a frame whose delay is at most the first for the second."""


def is_picture(file: VideoFile) -> bool:
    """Whether a file begins as those of images do, animated or not; it is left at its beginning."""
    start = file.read(_SIGNATURE)
    file.seek(0)
    return start.startswith(_PICTURES) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


class Animation:
    """A :class:`~qwen2vl_trt.runtime.inputs.clips.Clip` whose frames are shown as long as their own delays say.

    Args:
        file: see :func:`is_picture`.
        label: what error messages call it.
    """

    def __init__(self, file: VideoFile, label: str) -> None:
        self._file, self._label = file, label
        self.size = (0, 0)

    def timeline(self) -> Timeline:
        """When its frames are shown; they are decoded for it, as a WebP file does not say it otherwise."""
        delays = []
        for image in self._frames():
            delay = int(image.info.get("duration") or 0)
            delays.append(delay if delay > _QUICKEST else _USUAL)
        *ticks, end = accumulate(delays, initial=0)
        return Timeline(tuple(ticks), Fraction(end), Fraction(1, 1000))

    def decode(self, kept: Sequence[int], timeline: Timeline) -> tuple[dict[int, Tensor], Timeline]:
        """See :meth:`qwen2vl_trt.runtime.inputs.clips.Clip.decode`."""
        wanted, frames = set(kept), {}
        for number, image in enumerate(self._frames()):
            if number in wanted:
                frame = load_image(image, name=f"{self._label}, frame {number + 1}")
                self.size = (frame.shape[1], frame.shape[2])
                frames[number] = held(frame, len(kept), self._label)
        return frames, timeline

    def _frames(self) -> Iterator[Image.Image]:
        self._file.seek(0)
        try:
            with open_image(cast(BinaryIO, self._file), self._label) as image:
                check_frame(image.width, image.height, self._label)
                if image.format not in _ANIMATED or not getattr(image, "is_animated", False):
                    raise MediaError(f"{self._label}: a still image, not a video; give it as an image")
                first = int(bool(image.info.get("default_image")))  # of a PNG file, for who shows no animation
                for frame in islice(ImageSequence.Iterator(image), first, None):
                    frame.load()
                    yield frame
        except MediaError:
            raise
        except Exception as error:  # Pillow's readers let nearly every exception out of a corrupt file
            raise MediaError(f"{self._label}: truncated or corrupt: {error}") from None
