"""What a checkpoint says about pixels: the limits of the resized area, the normalisation, the sampling of frames."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engines.profile import BuildProfile
from qwen2vl_trt.config import read_json
from qwen2vl_trt.errors import CheckpointError, LimitError, MediaError

from ..inputs.video import FrameSampling

MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Nearest size whose sides are multiples of ``factor`` and whose area lies within the limits, as in Transformers.

    Raises:
        MediaError: a side of 0 pixels, or an aspect ratio over 200.
    """
    if min(height, width) < 1:
        raise MediaError(f"{width}x{height} has no pixels")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise MediaError(
            f"{width}x{height} has an aspect ratio of {max(height, width) / min(height, width):.4g};"
            f" the model takes at most {MAX_ASPECT_RATIO}. Crop or pad it."
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:  # also where a side rounds to zero
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


@dataclass(frozen=True)
class PixelSettings:
    """Limits of the resized area, in pixels of one image or frame, and the normalisation of its values."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise LimitError(
                f"min_pixels {self.min_pixels} and max_pixels {self.max_pixels}: min_pixels must be at least 1"
                " and at most max_pixels"
            )

    def with_limits(self, min_pixels: int | None = None, max_pixels: int | None = None) -> PixelSettings:
        """Replace limits; where only one is given, it moves the other one if that contradicts it.

        Raises:
            LimitError: ``min_pixels`` below 1 or above ``max_pixels``.
        """
        least = self.min_pixels if min_pixels is None else min_pixels
        most = self.max_pixels if max_pixels is None else max_pixels
        if max_pixels is None:
            most = max(most, least)
        elif min_pixels is None:
            least = min(least, most)
        return replace(self, min_pixels=least, max_pixels=most)

    def within(self, least: int, most: int) -> PixelSettings:
        """These limits where they lie between others, else those."""
        return replace(
            self, min_pixels=min(max(self.min_pixels, least), most), max_pixels=max(min(self.max_pixels, most), least)
        )


@dataclass(frozen=True)
class PreprocessorSettings:
    """What a checkpoint says about pixels, the defaults are Transformers'; and what engines take of them.

    Attributes:
        image: of images.
        video: of video frames.
        sampling: which frames of a video file are kept.
        profile: the engines' limits, which images and frames are resized to fit; None knows of no engine.
        strict_size: refuse what does not fit them.
    """

    image: PixelSettings = PixelSettings()
    video: PixelSettings = PixelSettings(min_pixels=128 * 28 * 28, max_pixels=28 * 28 * 768)
    sampling: FrameSampling = field(default_factory=FrameSampling)
    profile: BuildProfile | None = None
    strict_size: bool = False

    @classmethod
    def from_folder(cls, folder: str | Path) -> PreprocessorSettings:
        """Read a checkpoint folder as Transformers does; what no file says keeps its default.

        Images: ``processor_config.json`` (Transformers 5 nests both processors there), else
        ``preprocessor_config.json``. Videos: the former, else ``video_preprocessor_config.json``, else that of images.

        Raises:
            CheckpointError: a file cannot be read, or asks for what the vision graph's input cannot be.
        """
        folder = Path(folder)
        nested = read_json(folder / "processor_config.json")
        image = nested.get("image_processor") or read_json(folder / "preprocessor_config.json")
        video = nested.get("video_processor") or read_json(folder / "video_preprocessor_config.json") or image
        default = cls()
        frames = {name: video[name] for name in _SAMPLING if video.get(name) is not None}
        return cls(
            image=_pixel_settings(image, default.image, folder),
            video=_pixel_settings(video, default.video, folder),
            sampling=replace(default.sampling, **frames),
        )

    def narrowed(self, patch_size: int) -> PreprocessorSettings:
        """With the engines' limits of the area as the checkpoint's, for who knows these alone, as Transformers does."""
        if self.profile is None:
            return self
        area = patch_size**2
        least, most = self.profile.min_hw_dims * area, self.profile.max_hw_dims * area
        return replace(self, image=self.image.within(least, most), video=self.video.within(least, most))

    def with_limits(self, min_pixels: int | None = None, max_pixels: int | None = None) -> PreprocessorSettings:
        """Override the limits of images; video frames, which have their own, are only ever lowered by it.

        Raises:
            LimitError: ``min_pixels`` below 1 or above ``max_pixels``.
        """
        image = self.image.with_limits(min_pixels, max_pixels)
        most = min(self.video.max_pixels, image.max_pixels) if max_pixels is not None else self.video.max_pixels
        video = replace(self.video, min_pixels=min(self.video.min_pixels, most), max_pixels=most)
        return replace(self, image=image, video=video)


_SAMPLING = ("fps", "min_frames", "max_frames", "temporal_patch_size")


def _pixel_settings(raw: dict[str, Any], default: PixelSettings, folder: Path) -> PixelSettings:
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if raw.get(name) is False:
            raise CheckpointError(f"{folder}: the preprocessor's {name} is false, which is not supported")
    if raw.get("resample", 3) != 3:
        raise CheckpointError(f"{folder}: the preprocessor's resample is {raw['resample']}; only 3 (bicubic) is known")
    size = raw.get("size") or {}
    found = {  # min_pixels outside wins over size, as in Transformers; 4.x wrote it inside size as well
        "min_pixels": (raw.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels")),
        "max_pixels": (raw.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels")),
        "image_mean": (raw.get("image_mean"),),
        "image_std": (raw.get("image_std"),),
        "rescale_factor": (raw.get("rescale_factor"),),
    }
    fields: dict[str, Any] = {}
    for name, values in found.items():
        for value in values:
            if value is not None:
                fields[name] = tuple(value) if isinstance(value, list) else value
                break
    try:
        return replace(default, **fields)
    except LimitError as error:
        raise CheckpointError(f"{folder}: {error}") from None
