"""What a message's part says about the frames of its video; its numbers mean what they mean in qwen-vl-utils.

Source: ``smart_nframes`` and ``fetch_video`` in qwen-vl-utils' ``vision_process.py``.
"""

from __future__ import annotations

from dataclasses import replace

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.media_options import VideoOptions

from .frame_sampling import FrameSampling

OF_FILES = ("nframes", "min_frames", "max_frames", "video_start", "video_end")


def requested_sampling(options: VideoOptions, sampling: FrameSampling, label: str) -> FrameSampling:
    """How many frames of a file are kept.

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
