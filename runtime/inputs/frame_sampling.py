"""Which frames of a clip are kept, by the times at which they are shown.

One rule for every file. A clip lasts from its first visible frame to the end of its last one. Of that time as many
frames are kept as Transformers' ``Qwen2VLVideoProcessor.sample_frames`` and qwen-vl-utils' ``smart_nframes`` keep of
it. Their times are evenly spaced, and each is the frame that is shown at its time. Where the frames follow each other
at a constant rate, these are the very indices of ``sample_frames``.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.media_options import VideoOptions

DEFAULT_FPS = 2.0
"""Rate of frames about which nothing is said; qwen-vl-utils assumes the same."""

Stamp = tuple[int | None, int]
"""A frame's presentation time, None where the file has none, and its duration, 0 where it is unknown; in ticks."""

_LAST_FRAME = 1
"""Most seconds that the last frame of a variable rate is shown, if its container does not say more."""


@dataclass(frozen=True)
class Timeline:
    """When the visible frames of a clip are shown.

    Attributes:
        ticks: time of each, in order, from the first.
        end: when the last one ends.
        tick: seconds in the unit of both.
        rate: frames per second, where that is constant.
        first: timestamp of the first in the file.
    """

    ticks: tuple[int, ...]
    end: Fraction
    tick: Fraction
    rate: Fraction | None = None
    first: int = 0

    @classmethod
    def of(cls, stamps: Sequence[Stamp], tick: Fraction, rates: Sequence[Fraction | None] = ()) -> Timeline:
        """Made of the timestamps of a file.

        A header's rate counts only where every timestamp agrees with it to less than a tick: then it is the constant
        rate, free of their rounding. Otherwise the last frame is shown as long as its packet says, or as long as the
        one before it (at most a second) if that is longer: muxers write a nominal duration there, or none.

        Args:
            stamps: of at least one frame, in any order.
            tick: seconds in their unit.
            rates: what headers say, the likeliest first.
        """
        interval = round(1 / (tick * next(filter(None, rates), Fraction(DEFAULT_FPS)))) or 1
        shown, now = [], 0
        for pts, duration in stamps:
            now = now if pts is None else pts
            shown.append((now, duration))
            now += duration or interval
        shown.sort()
        ticks = tuple(pts - shown[0][0] for pts, _ in shown)
        rate = next((rate for rate in rates if rate and _follows(ticks, rate * tick)), None)
        if rate:
            return cls(ticks, len(ticks) / (rate * tick), tick, rate, shown[0][0])
        before = ticks[-1] - ticks[-2] if len(ticks) > 1 else interval
        end = ticks[-1] + max(shown[-1][1], min(before, int(_LAST_FRAME / tick)))
        return cls(ticks, Fraction(max(end, 1)), tick, None, shown[0][0])

    @property
    def duration(self) -> Fraction:
        """In seconds."""
        return self.end * self.tick

    def between(self, start: float, end: float) -> tuple[int, Timeline]:
        """The frames that begin from ``start`` to ``end`` seconds: qwen-vl-utils' ``video_start`` and ``video_end``.

        Args:
            start: not below 0, and within the duration.
            end: not before it.

        Returns:
            Number of the first, and their own timeline. Where none begins in that time, it is the one shown then.
        """
        if self.rate:
            first, stop = math.ceil(start * float(self.rate)), math.floor(end * float(self.rate)) + 1
        else:
            first = bisect_left(self.ticks, start / float(self.tick))
            stop = bisect_right(self.ticks, end / float(self.tick))
        if first >= min(stop, len(self.ticks)):
            first = stop = bisect_right(self.ticks, start / float(self.tick))
            first -= 1
        ticks = self.ticks[first:stop]
        after = self.end if stop >= len(self.ticks) else self.ticks[stop]
        length = len(ticks) / (self.rate * self.tick) if self.rate else Fraction(after - ticks[0])
        return first, Timeline(tuple(pts - ticks[0] for pts in ticks), length, self.tick, self.rate)


def _follows(ticks: Sequence[int], step: Fraction) -> bool:
    """Whether every frame is within a tick of ``step`` frames a tick."""
    return bool((np.abs(np.array(ticks) * float(step) - np.arange(len(ticks))) < float(step)).all())


@dataclass(frozen=True)
class FrameSampling:
    """How many frames of a video are kept; the fields are those of ``video_preprocessor_config.json``.

    Attributes:
        fps: frames kept of each second.
        min_frames: fewest frames kept, if the video has so many.
        max_frames: most frames kept.
        temporal_patch_size: the number kept is a multiple of this, if the video has so many.
        num_frames: keep this many, rounded to a multiple of ``temporal_patch_size``, whatever the fields above say.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    temporal_patch_size: int = 2
    num_frames: int | None = None

    def choose(self, timeline: Timeline, label: str) -> list[int]:
        """Frames to keep of a clip.

        Raises:
            MediaError: ``num_frames`` is more than there are, named ``label``.
        """
        total, unit = len(timeline.ticks), self.temporal_patch_size
        if self.num_frames is not None and not unit <= self._count(total, 1.0) <= total:
            raise MediaError(
                f"{label}: nframes {self.num_frames} is not within {unit} to {total}; the video has {total} frames"
            )
        if timeline.rate:
            return self.indices(total, float(timeline.rate))
        count = self._count(total, total / float(timeline.duration))
        if count <= 0:
            return list(range(min(total, unit)))
        return [bisect_right(timeline.ticks, number * timeline.end // count) - 1 for number in range(count)]

    def indices(self, total: int, fps: float) -> list[int]:
        """Frames to keep of ``total`` at ``fps``: those Transformers' video processor keeps, evenly spaced."""
        count = self._count(total, fps)
        if count <= 0:  # shorter than a temporal patch, where Transformers divides by zero
            return list(range(min(total, self.temporal_patch_size)))
        # The step is rounded, so now and then one index too many comes out, the end itself.
        return [index for index in torch.arange(0, total, total / count).int().tolist() if index < total]

    def _count(self, total: int, fps: float) -> int:
        unit = self.temporal_patch_size
        if self.num_frames is not None:
            return round(self.num_frames / unit) * unit
        most = min(self.max_frames, total) // unit * unit
        return math.floor(min(max(total / fps * self.fps, self.min_frames), most, total) / unit) * unit


OF_FILES = ("nframes", "min_frames", "max_frames", "video_start", "video_end")


def requested_sampling(options: VideoOptions, sampling: FrameSampling, label: str) -> FrameSampling:
    """How many frames of a file are kept, after what a message's part says about its video.

    Source: ``smart_nframes`` and ``fetch_video`` in qwen-vl-utils' ``vision_process.py``.

    Args:
        options: what they say goes.
        sampling: for what they do not say.
        label: what error messages call the video.

    Raises:
        MediaError: ``max_frames`` below a temporal patch or below ``min_frames``, or ``sample_fps``.
    """
    if options.sample_fps is not None:
        raise MediaError(f"{label}: sample_fps is the rate of frames in memory; for a file, fps says how many are kept")
    unit = sampling.temporal_patch_size
    if options.max_frames is not None and options.max_frames < unit:
        raise MediaError(f"{label}: max_frames is {options.max_frames}; a temporal patch has {unit} frames")
    least = sampling.min_frames if options.min_frames is None else -(-options.min_frames // unit) * unit
    most = sampling.max_frames if options.max_frames is None else options.max_frames
    if options.min_frames is not None and least > most:
        raise MediaError(f"{label}: min_frames {options.min_frames} is above max_frames {most}")
    fps = sampling.fps if options.fps is None else options.fps
    return replace(sampling, fps=fps, min_frames=least, max_frames=most, num_frames=options.nframes)


def requested_rate(options: VideoOptions, label: str) -> float | None:
    """The rate of frames in memory, which are all kept; None if nothing is said.

    Raises:
        MediaError: ``fps`` and ``sample_fps`` differ, or what only a file can obey.
    """
    for key in OF_FILES:
        if getattr(options, key) is not None:
            raise MediaError(f"{label}: {key} is for a file; frames in memory are all kept")
    if None not in (options.fps, options.sample_fps) and options.fps != options.sample_fps:
        raise MediaError(
            f"{label}: fps {options.fps:g} and sample_fps {options.sample_fps:g} are two rates of the same frames"
        )
    return options.fps or options.sample_fps
