"""Sampling of a video's frames by their presentation times.

A clip lasts from its first visible frame to the end of its last one. The number of frames is that of Transformers'
``Qwen2VLVideoProcessor.sample_frames`` and qwen-vl-utils' ``smart_nframes``. Their times are evenly spaced, and each is
the frame shown at its time. At a constant frame rate these are the indices of ``sample_frames``.
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
"""Of frames without a known rate, as in qwen-vl-utils."""

Stamp = tuple[int | None, int]
"""A frame's presentation time (None if the file has none) and duration (0 if unknown), in ticks."""

_MAX_LAST_FRAME = 1
"""Seconds that the last frame of a variable rate is shown at most, unless its container says more."""


@dataclass(frozen=True)
class Timeline:
    """When the visible frames of a clip are shown.

    Attributes:
        ticks: time of each from the first, ascending.
        end: of the last one.
        tick: seconds in the unit of both.
        rate: frames per second, if constant.
        first: timestamp of the first one in the file.
    """

    ticks: tuple[int, ...]
    end: Fraction
    tick: Fraction
    rate: Fraction | None = None
    first: int = 0

    @classmethod
    def of(cls, stamps: Sequence[Stamp], tick: Fraction, rates: Sequence[Fraction | None] = ()) -> Timeline:
        """From a file's timestamps.

        The rate is constant if every timestamp agrees with a header's rate to less than a tick. Otherwise the last
        frame lasts as long as its packet says or, if longer, as the frame before it (at most a second): muxers write a
        nominal duration there, or none.

        Args:
            stamps: of at least one frame, in any order.
            tick: seconds.
            rates: of headers, the most reliable first.
        """
        interval = round(1 / (tick * next(filter(None, rates), Fraction(DEFAULT_FPS)))) or 1
        shown, now = [], 0
        for pts, duration in stamps:
            now = now if pts is None else pts
            shown.append((now, duration))
            now += duration or interval
        shown.sort()
        ticks = tuple(pts - shown[0][0] for pts, _ in shown)
        rate = next((rate for rate in rates if rate and _is_constant(ticks, rate * tick)), None)
        if rate:
            return cls(ticks, len(ticks) / (rate * tick), tick, rate, shown[0][0])
        before = ticks[-1] - ticks[-2] if len(ticks) > 1 else interval
        end = ticks[-1] + max(shown[-1][1], min(before, int(_MAX_LAST_FRAME / tick)))
        return cls(ticks, Fraction(max(end, 1)), tick, None, shown[0][0])

    @property
    def duration(self) -> Fraction:
        """In seconds."""
        return self.end * self.tick

    def between(self, start: float, end: float) -> tuple[int, Timeline]:
        """The frames that begin from ``start`` to ``end`` seconds: qwen-vl-utils' ``video_start`` and ``video_end``.

        Returns:
            Index of the first, and their timeline. If none begins in that time, it is the frame shown then.
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


def _is_constant(ticks: Sequence[int], step: Fraction) -> bool:
    """Whether every frame is within a tick of a rate of ``step`` frames a tick."""
    return bool((np.abs(np.array(ticks) * float(step) - np.arange(len(ticks))) < float(step)).all())


@dataclass(frozen=True)
class FrameSampling:
    """Number of frames sampled from a video; fields as in ``video_preprocessor_config.json``.

    Attributes:
        fps: frames per second.
        min_frames: if the video has as many.
        max_frames: at most.
        temporal_patch_size: the number is a multiple of this, if the video has as many.
        num_frames: overrides the fields above, rounded to a multiple of ``temporal_patch_size``.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    temporal_patch_size: int = 2
    num_frames: int | None = None

    def choose(self, timeline: Timeline, label: str) -> list[int]:
        """Indices of the sampled frames. Raises MediaError if ``num_frames`` is more than there are."""
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
        """Indices of the frames that Transformers' video processor samples of ``total`` at ``fps``."""
        count = self._count(total, fps)
        if count <= 0:  # shorter than a temporal patch, where Transformers divides by zero
            return list(range(min(total, self.temporal_patch_size)))
        # The step is rounded, so that sometimes the end itself comes out too.
        return [index for index in torch.arange(0, total, total / count).int().tolist() if index < total]

    def _count(self, total: int, fps: float) -> int:
        unit = self.temporal_patch_size
        if self.num_frames is not None:
            return round(self.num_frames / unit) * unit
        max_frames = min(self.max_frames, total) // unit * unit
        return math.floor(min(max(total / fps * self.fps, self.min_frames), max_frames, total) / unit) * unit


FILE_OPTIONS = ("nframes", "min_frames", "max_frames", "video_start", "video_end")


def requested_sampling(options: VideoOptions, sampling: FrameSampling, label: str) -> FrameSampling:
    """Sampling of a file: a request's ``options``, completed by the defaults ``sampling``.

    Source: ``smart_nframes`` and ``fetch_video`` in qwen-vl-utils' ``vision_process.py``.

    Raises:
        MediaError: ``max_frames`` below a temporal patch or below ``min_frames``, or ``sample_fps``.
    """
    if options.sample_fps is not None:
        raise MediaError(f"{label}: sample_fps is the rate of frames in memory; for a file, fps says how many are kept")
    unit = sampling.temporal_patch_size
    if options.max_frames is not None and options.max_frames < unit:
        raise MediaError(f"{label}: max_frames is {options.max_frames}; a temporal patch has {unit} frames")
    min_frames = sampling.min_frames if options.min_frames is None else -(-options.min_frames // unit) * unit
    max_frames = sampling.max_frames if options.max_frames is None else options.max_frames
    if options.min_frames is not None and min_frames > max_frames:
        raise MediaError(f"{label}: min_frames {options.min_frames} is above max_frames {max_frames}")
    fps = sampling.fps if options.fps is None else options.fps
    return replace(sampling, fps=fps, min_frames=min_frames, max_frames=max_frames, num_frames=options.nframes)


def requested_rate(options: VideoOptions, label: str) -> float | None:
    """Rate of frames in memory, or None. Raises MediaError for two different rates or options for files."""
    for key in FILE_OPTIONS:
        if getattr(options, key) is not None:
            raise MediaError(f"{label}: {key} is for a file; frames in memory are all kept")
    if None not in (options.fps, options.sample_fps) and options.fps != options.sample_fps:
        raise MediaError(
            f"{label}: fps {options.fps:g} and sample_fps {options.sample_fps:g} are two rates of the same frames"
        )
    return options.fps or options.sample_fps
