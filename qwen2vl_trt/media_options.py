"""What a message's part says about its own image or video; names and meaning are those of qwen-vl-utils.

Source: https://github.com/QwenLM/Qwen2.5-VL, ``qwen-vl-utils/src/qwen_vl_utils/vision_process.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from .errors import MediaError

_Options = TypeVar("_Options", bound="ImageOptions")

_REAL_NUMBERS = ("fps", "sample_fps", "video_start", "video_end")
_FROM_ZERO = ("video_start", "video_end")
_RANGES = (("min_pixels", "max_pixels"), ("min_frames", "max_frames"), ("video_start", "video_end"))
_EITHER = ("fps", "nframes")
_MOST = 10**12
"""Of any number: the arithmetic with it stays exact."""


@dataclass(frozen=True)
class ImageOptions:
    """Size of an image or of each frame of a video, in pixels; None is the pipeline's own setting.

    Attributes:
        min_pixels: smallest area; a smaller image is enlarged.
        max_pixels: largest area; a larger image is shrunk.
        resized_height: this height, with ``resized_width``, instead of one that follows from the area; both are rounded
            to multiples of 28.
        resized_width: likewise.

    Raises:
        MediaError: a value out of its range, or two that contradict each other.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None

    def __post_init__(self) -> None:
        given = _given(self)
        for name, value in given.items():
            _check(name, value)
        for low, high in _RANGES:
            if low in given and high in given and given[low] > given[high]:
                raise MediaError(f"{low} {given[low]} is above {high} {given[high]}")
        if (self.resized_height is None) != (self.resized_width is None):
            raise MediaError("resized_height and resized_width go together; give both or neither")

    def over(self: _Options, others: _Options) -> _Options:
        """These, and of the others what these leave open and do not contradict."""
        own, added = _given(self), _given(others)
        if any(name in own for name in _EITHER):
            added = {name: value for name, value in added.items() if name not in _EITHER}
        for low, high in _RANGES:
            if low in own and high in added and own[low] > added[high]:
                del added[high]
            elif high in own and low in added and added[low] > own[high]:
                del added[low]
        return type(self)(**(added | own))


@dataclass(frozen=True)
class VideoOptions(ImageOptions):
    """Besides the size of its frames, which frames of a video are kept; None is the pipeline's own setting.

    Attributes:
        fps: of a file, frames to keep of each second; of frames in memory, the rate that they have.
        nframes: frames to keep, instead of a rate.
        min_frames: fewest frames to keep.
        max_frames: most frames to keep.
        total_pixels: largest area of all kept frames together.
        video_start: seconds from the beginning, before which nothing is kept.
        video_end: seconds from the beginning, after which nothing is kept.
        sample_fps: the rate of frames in memory.
    """

    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    total_pixels: int | None = None
    video_start: float | None = None
    video_end: float | None = None
    sample_fps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fps is not None and self.nframes is not None:
            raise MediaError(f"fps {self.fps:g} and nframes {self.nframes} both say how many frames to keep; give one")


def _given(options: ImageOptions) -> dict[str, Any]:
    values = ((field.name, getattr(options, field.name)) for field in fields(options))
    return {name: value for name, value in values if value is not None}


def _check(name: str, value: Any) -> None:
    kinds, least = ((int, float), "above 0") if name in _REAL_NUMBERS else ((int,), "of at least 1")
    least = "of at least 0" if name in _FROM_ZERO else least
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not number or not 0 <= value <= _MOST or (value == 0 and name not in _FROM_ZERO):
        what = "a number" if float in kinds else "a whole number"
        raise MediaError(f"{name} is {value!r:.80}; it must be {what} {least} and at most {_MOST:,}")
