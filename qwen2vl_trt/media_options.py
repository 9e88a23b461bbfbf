"""Options of one image or video, with qwen-vl-utils' names and meanings.

Source: https://github.com/QwenLM/Qwen2.5-VL, ``qwen-vl-utils/src/qwen_vl_utils/vision_process.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product
from numbers import Integral, Real
from typing import Any, TypeVar

from .errors import MediaError

_Options = TypeVar("_Options", bound="ImageOptions")

_FLOATS = ("fps", "sample_fps", "video_start", "video_end")
_FROM_ZERO = ("video_start", "video_end")
_RANGES = (("min_pixels", "max_pixels"), ("min_frames", "max_frames"), ("video_start", "video_end"))
_EITHER = (
    (("resized_height", "resized_width"), ("min_pixels", "max_pixels", "total_pixels"), "how large it becomes"),
    (("nframes",), ("fps", "min_frames", "max_frames"), "how many frames to keep"),
)
"""(exact values, limits, what both determine): never both."""
_MOST = 10**12  # arithmetic with it stays exact


@dataclass(frozen=True)
class ImageOptions:
    """Size of an image or of each frame of a video, in pixels; None is the pipeline's own setting.

    Attributes:
        min_pixels: smallest area; a smaller image is enlarged.
        max_pixels: largest area; a larger image is shrunk.
        resized_height: with ``resized_width``, instead of an area; both are rounded to multiples of 28.
        resized_width: see ``resized_height``.

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
        """These, completed by those of the others that do not contradict them.

        A size here replaces limits of the area there, a number of frames a rate and its limits, and the other way
        round.
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
    """Size and sampling of a video's frames; None is the pipeline's own setting.

    Attributes:
        fps: of a file, frames to sample a second; of frames in memory, their rate.
        nframes: frames to sample, instead of a rate and its limits.
        min_frames: fewest frames to sample.
        max_frames: most frames to sample.
        total_pixels: largest area of all sampled frames together.
        video_start: sample from this second on.
        video_end: sample up to this second.
        sample_fps: rate of frames in memory.
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
    kind: type = Real if name in _FLOATS else Integral
    what, least = ("a number", "above 0") if kind is Real else ("a whole number", "of at least 1")
    least = "of at least 0" if name in _FROM_ZERO else least
    number = isinstance(value, kind) and not isinstance(value, bool)
    if not number or not 0 <= value <= _MOST or (value == 0 and name not in _FROM_ZERO):
        raise MediaError(f"{name} is {value!r:.80}; it must be {what} {least} and at most {_MOST:,}")
    return float(value) if kind is Real else int(value)
