"""What a message's part says about its own image or video; names and meaning are those of qwen-vl-utils.

Source: https://github.com/QwenLM/Qwen2.5-VL, ``qwen-vl-utils/src/qwen_vl_utils/vision_process.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product
from numbers import Integral, Real
from typing import Any, TypeVar

from .errors import MediaError

_Options = TypeVar("_Options", bound="ImageOptions")

_REAL_NUMBERS = ("fps", "sample_fps", "video_start", "video_end")
_FROM_ZERO = ("video_start", "video_end")
_RANGES = (("min_pixels", "max_pixels"), ("min_frames", "max_frames"), ("video_start", "video_end"))
_EITHER = (
    (("resized_height", "resized_width"), ("min_pixels", "max_pixels", "total_pixels"), "how large it becomes"),
    (("nframes",), ("fps", "min_frames", "max_frames"), "how many frames to keep"),
)
"""What is exact, and what leaves a choice: never both."""
_MOST = 10**12
"""Of any number: the arithmetic with it stays exact."""


@dataclass(frozen=True)
class ImageOptions:
    """Size of an image or of each frame of a video, in pixels; None is the pipeline's own setting.

    Attributes:
        min_pixels: smallest area; a smaller image is enlarged.
        max_pixels: largest area; a larger image is shrunk.
        resized_height: this height, with ``resized_width``, instead of one that follows from the area, which is then
            not given; both are rounded to multiples of 28.
        resized_width: likewise.

    Raises:
        MediaError: a value out of its range, or two that contradict each other.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None

    def __post_init__(self) -> None:
        for name, value in _given(self).items():
            object.__setattr__(self, name, _checked(name, value))
        given = _given(self)
        for low, high in _RANGES:
            if low in given and high in given and given[low] > given[high]:
                raise MediaError(f"{low} {given[low]:.15g} is above {high} {given[high]:.15g}")
        for exact, loose, what in _EITHER:
            for name, other in product(loose, exact):
                if name in given and other in given:
                    raise MediaError(
                        f"{name} {given[name]:.15g} and {other} {given[other]} both say {what}; give one of them"
                    )
        if (self.resized_height is None) != (self.resized_width is None):
            raise MediaError("resized_height and resized_width go together; give both or neither")

    def over(self: _Options, others: _Options) -> _Options:
        """These, and of the others what these leave open and do not contradict.

        A size here takes the place of limits of the area there, a number of frames that of a rate and its limits, and
        the other way round.
        """
        own, added = _given(self), _given(others)
        for exact, loose, _ in _EITHER:
            for names, replaced in ((exact, loose), (loose, exact)):
                if any(name in own for name in names):
                    added = {name: value for name, value in added.items() if name not in replaced}
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
        nframes: frames to keep, instead of a rate and its limits.
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


def _given(options: ImageOptions) -> dict[str, Any]:
    values = ((field.name, getattr(options, field.name)) for field in fields(options))
    return {name: value for name, value in values if value is not None}


def _checked(name: str, value: Any) -> float:
    """A number of any library as Python's own."""
    kind, least = (Real, "above 0") if name in _REAL_NUMBERS else (Integral, "of at least 1")
    least = "of at least 0" if name in _FROM_ZERO else least
    number = isinstance(value, kind) and not isinstance(value, bool)
    if not number or not 0 <= value <= _MOST or (value == 0 and name not in _FROM_ZERO):
        what = "a number" if kind is Real else "a whole number"
        raise MediaError(f"{name} is {value!r:.80}; it must be {what} {least} and at most {_MOST:,}")
    return float(value) if kind is Real else int(value)
