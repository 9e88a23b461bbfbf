"""What a request says about all its images and videos, as options of a command."""

from __future__ import annotations

import argparse
from dataclasses import fields

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.media_options import ImageOptions, VideoOptions

_HELP = {
    "resized_height": "of every image and frame, with --resized-width, instead of a size that follows from the area",
    "resized_width": "likewise",
    "fps": "frames to keep of each second of a video",
    "nframes": "frames to keep of a video, instead of a rate",
    "min_frames": "fewest frames to keep",
    "max_frames": "most frames to keep",
    "total_pixels": "largest area of all frames of a video together",
    "video_start": "keep nothing before this second of a video",
    "video_end": "keep nothing after it",
}
_SECONDS = ("fps", "video_start", "video_end")


def add_media_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`media_options` reads; ``--min-pixels`` and ``--max-pixels`` are the pipeline's."""
    group = parser.add_argument_group("images and videos")
    for name, text in _HELP.items():
        kind, metavar = (float, "S") if name in _SECONDS else (int, "N")
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)


def media_options(arguments: argparse.Namespace) -> tuple[ImageOptions, VideoOptions]:
    """What the options say.

    Raises:
        MediaError: a value out of its range, two that contradict each other, or an option of what is not there.
    """
    given = {name: getattr(arguments, name) for name in _HELP}
    of_images = {field.name for field in fields(ImageOptions)}
    for name in (*given, "min_pixels", "max_pixels"):
        kinds = ["image"] * (name in of_images) + ["video"] * (name != "min_pixels")  # which is never of frames
        if getattr(arguments, name) is not None and not any(getattr(arguments, kind) for kind in kinds):
            flags = " or ".join(f"--{kind}" for kind in kinds)
            raise MediaError(f"--{name.replace('_', '-')} has nothing to act on; add {flags}, or leave it out")
    return (
        ImageOptions(**{name: value for name, value in given.items() if name in of_images}),
        VideoOptions(**given),
    )
