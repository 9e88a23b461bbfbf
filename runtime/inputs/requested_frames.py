"""What a message's part says about the frames of its video, checked; its numbers mean what they mean in qwen-vl-utils.

Source: ``smart_nframes`` and ``fetch_video`` in qwen-vl-utils' ``vision_process.py``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.media_options import VideoOptions

from .frame_sampling import FrameSampling

_OF_FILES = ("nframes", "min_frames", "max_frames", "video_start", "video_end")


def check_number(label: str, key: str, value: Any, least: float | None = None) -> None:
    """Refuse what is not a number above 0, or of at least ``least``; None passes.

    Raises:
        MediaError: naming the video and the key.
    """
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < (least or 0) or (least is None and not value):
        what = "above 0" if least is None else f"of at least {least:g}"
        raise MediaError(f"{label}: {key} {value!r} is not a number {what}")


def requested_sampling(options: VideoOptions, sampling: FrameSampling, label: str) -> FrameSampling:
    """How many frames of a file are kept.

    Args:
        options: what they say goes.
        sampling: for what they do not say.
        label: what error messages call the video.

    Raises:
        MediaError: a value out of range, two that contradict each other, or ``sample_fps``.
    """
    if options.sample_fps is not None:
        raise MediaError(f"{label}: sample_fps is the rate of frames in memory; for a file, fps says how many are kept")
    if options.fps is not None and options.nframes is not None:
        raise MediaError(f"{label}: fps and nframes exclude each other; give one of them")
    unit = sampling.temporal_patch_size
    check_number(label, "fps", options.fps)
    check_number(label, "video_start", options.video_start, 0)
    check_number(label, "video_end", options.video_end, 0)
    for key, least in (("nframes", 1), ("min_frames", 1), ("max_frames", unit)):
        count = getattr(options, key)
        check_number(label, key, count, least)
        if count is not None and not isinstance(count, int):
            raise MediaError(f"{label}: {key} {count!r} is not a whole number")
    least = sampling.min_frames if options.min_frames is None else -(-options.min_frames // unit) * unit
    most = sampling.max_frames if options.max_frames is None else options.max_frames
    if options.min_frames is not None and least > most:
        raise MediaError(f"{label}: min_frames {options.min_frames} is above max_frames {most}")
    fps = sampling.fps if options.fps is None else options.fps
    return replace(sampling, fps=fps, min_frames=least, max_frames=most, num_frames=options.nframes)


def requested_rate(options: VideoOptions, label: str) -> float | None:
    """The rate of frames in memory, which are all kept; None if nothing is said.

    Raises:
        MediaError: it is not above 0, ``fps`` and ``sample_fps`` differ, or what only a file can obey.
    """
    for key in _OF_FILES:
        if getattr(options, key) is not None:
            raise MediaError(f"{label}: {key} is for a file; frames in memory are all kept")
    check_number(label, "fps", options.fps)
    check_number(label, "sample_fps", options.sample_fps)
    if None not in (options.fps, options.sample_fps) and options.fps != options.sample_fps:
        raise MediaError(
            f"{label}: fps {options.fps:g} and sample_fps {options.sample_fps:g} are two rates of the same frames"
        )
    return options.fps or options.sample_fps
