"""What a message's part says about its own image or video; names and meaning are those of qwen-vl-utils.

Source: https://github.com/QwenLM/Qwen2.5-VL, ``qwen-vl-utils/src/qwen_vl_utils/vision_process.py``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageOptions:
    """Size of an image or of each frame of a video, in pixels; None is the pipeline's own setting.

    Attributes:
        min_pixels: smallest area; a smaller image is enlarged.
        max_pixels: largest area; a larger image is shrunk.
        resized_height: this height, with ``resized_width``, instead of one that follows from the area.
        resized_width: likewise.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None


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
