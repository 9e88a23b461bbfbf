"""Pixel settings of a checkpoint: limits of the resized area, normalisation, sampling of video frames."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from qwen2vl_trt.config import Qwen2VLConfig, VisionConfig, read_json
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import CheckpointError, LimitError, MediaError
from qwen2vl_trt.known_fields import Harmless
from qwen2vl_trt.schema import checked, inside, reject_unknown

from ..inputs.video import FrameSampling

MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Transformers' size: sides are multiples of ``factor``, the area lies within the limits.

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
    """Limits of the resized area of one image or frame, in pixels, and its normalisation."""

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
        """Replace limits; a single one moves the other if they contradict.

        Raises:
            LimitError: ``min_pixels`` below 1 or above ``max_pixels``.
        """
        for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if value is not None and value < 1:
                raise LimitError(f"{name} is {value:,}; it must be at least 1 pixel")
        if min_pixels is None:
            min_pixels = self.min_pixels if max_pixels is None else min(self.min_pixels, max_pixels)
        if max_pixels is None:
            max_pixels = max(self.max_pixels, min_pixels)
        return replace(self, min_pixels=min_pixels, max_pixels=max_pixels)

    def clamped(self, low: int, high: int) -> PixelSettings:
        """Both limits moved into ``low`` to ``high``."""
        return replace(
            self, min_pixels=min(max(self.min_pixels, low), high), max_pixels=max(min(self.max_pixels, high), low)
        )


@dataclass(frozen=True)
class PreprocessorSettings:
    """A checkpoint's pixel settings, with Transformers' defaults, and the engines' limits.

    Attributes:
        image: of images.
        video: of video frames.
        sampling: of video files.
        profile: the engines' limits, which images and frames are resized to; None without engines.
        strict_size: refuse what does not fit them, instead of resizing.
    """

    image: PixelSettings = PixelSettings()
    video: PixelSettings = PixelSettings(min_pixels=128 * 28 * 28, max_pixels=28 * 28 * 768)
    sampling: FrameSampling = field(default_factory=FrameSampling)
    profile: BuildProfile | None = None
    strict_size: bool = False

    @classmethod
    def from_folder(cls, folder: str | Path, cap_pixels_per_frame: bool = True) -> PreprocessorSettings:
        """Read a checkpoint folder as Transformers does; missing fields keep their defaults.

        Images: ``processor_config.json`` (where Transformers 5 nests both processors), else
        ``preprocessor_config.json``. Videos: the former, else ``video_preprocessor_config.json``, else that of images.

        Args:
            folder: of the checkpoint.
            cap_pixels_per_frame: if only images have limits, as published, video frames get qwen-vl-utils' 128 to 768
                tokens; False gives them the images' limits, as Transformers before 5.22 does.

        Raises:
            CheckpointError: a file cannot be read, or describes other pixels than the vision graph takes.
        """
        folder = Path(folder)
        path = folder / "processor_config.json"
        nested = read_json(path)
        reject_unknown(nested, ("image_processor", "video_processor"), _NESTED, str(path))
        image, image_place = _find(folder, nested, "image_processor", "preprocessor_config.json")
        own, video_place = _find(folder, nested, "video_processor", "video_preprocessor_config.json")
        video, video_place = (own, video_place) if own else (image, image_place)
        of_images, of_videos = _Processor.read(image, image_place), _Processor.read(video, video_place)
        if (folder / "config.json").exists():
            vision = Qwen2VLConfig.from_folder(folder).vision
            of_images.check(vision, image_place)
            of_videos.check(vision, video_place)
        default = cls()
        pixels = of_videos.pixels(default.video, video_place)
        if cap_pixels_per_frame and not own:
            pixels = replace(pixels, min_pixels=default.video.min_pixels, max_pixels=default.video.max_pixels)
        return cls(
            image=of_images.pixels(default.image, image_place),
            video=pixels,
            sampling=of_videos.sampling(default.sampling),
        )

    def narrowed(self, patch_size: int) -> PreprocessorSettings:
        """With limits within the engines', for Transformers, which knows a checkpoint's limits alone."""
        if self.profile is None:
            return self
        area = patch_size**2
        low, high = self.profile.min_hw_dims * area, self.profile.max_hw_dims * area
        return replace(self, image=self.image.clamped(low, high), video=self.video.clamped(low, high))

    def with_limits(self, min_pixels: int | None = None, max_pixels: int | None = None) -> PreprocessorSettings:
        """Replace the limits of images; ``max_pixels`` also lowers those of video frames.

        Raises:
            LimitError: ``min_pixels`` below 1 or above ``max_pixels``.
        """
        image, video = self.image.with_limits(min_pixels, max_pixels), self.video
        if max_pixels is not None:
            video = video.with_limits(max_pixels=min(video.max_pixels, image.max_pixels))
        return replace(self, image=image, video=video)


Area = Annotated[int, Meta(ge=1, le=1 << 30)]
Side = Annotated[int, Meta(ge=1, le=1 << 12)]
Frames = Annotated[int, Meta(ge=1, le=1 << 20)]
Channel = Annotated[float, Meta(ge=-1e3, le=1e3)]
Positive = Annotated[float, Meta(gt=0, le=1e3)]


@dataclass(frozen=True)
class _Size:
    """Transformers writes edges, which are areas for this model; some releases wrote pixels too."""

    shortest_edge: Area | None = None
    longest_edge: Area | None = None
    min_pixels: Area | None = None
    max_pixels: Area | None = None


@dataclass(frozen=True)
class _Processor:
    """Fields that are read of Transformers' image and video processors."""

    size: _Size | None = None
    min_pixels: Area | None = None
    max_pixels: Area | None = None
    image_mean: tuple[Channel, Channel, Channel] | None = None
    image_std: tuple[Positive, Positive, Positive] | None = None
    rescale_factor: Positive | None = None
    patch_size: Side | None = None
    merge_size: Side | None = None
    temporal_patch_size: Side | None = None
    fps: Positive | None = None
    min_frames: Frames | None = None
    max_frames: Frames | None = None

    @classmethod
    def read(cls, raw: Any, place: str) -> _Processor:
        """Raises CheckpointError for an invalid value, or a field that changes pixels and is not implemented."""
        raw = checked(raw, dict[str, Any], place)
        reject_unknown(raw, [each.name for each in fields(cls)], _HARMLESS, place)
        found = checked(raw, cls, place)
        if found.size is not None:
            names = [each.name for each in fields(_Size)]
            reject_unknown(raw["size"], names, dict.fromkeys(("height", "width"), (None,)), inside(place, ".size"))
        return found

    def pixels(self, default: PixelSettings, place: str) -> PixelSettings:
        size = self.size or _Size()
        found = {  # min_pixels outside wins over size, as in Transformers
            "min_pixels": self.min_pixels or size.shortest_edge or size.min_pixels,
            "max_pixels": self.max_pixels or size.longest_edge or size.max_pixels,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
            "rescale_factor": self.rescale_factor,
        }
        try:
            return replace(default, **_given(found))
        except LimitError as error:
            raise CheckpointError(f"{place}: {error}") from None

    def sampling(self, default: FrameSampling) -> FrameSampling:
        names = ("fps", "min_frames", "max_frames", "temporal_patch_size")
        return replace(default, **_given({name: getattr(self, name) for name in names}))

    def check(self, vision: VisionConfig, place: str) -> None:
        """Raises CheckpointError for patches of another size than the model's."""
        for name, own in (
            ("patch_size", vision.patch_size),
            ("merge_size", vision.spatial_merge_size),
            ("temporal_patch_size", vision.temporal_patch_size),
        ):
            found = getattr(self, name)
            if found not in (None, own):
                raise CheckpointError(f"{place}: {name} is {found}; the model's, in config.json, is {own}")


_HARMLESS: Harmless = {
    "cap_pixels_per_frame": (None, False),  # True bounds a video's pixels by max_video_tokens
    "crop_size": None,
    "do_center_crop": (None, False),
    "do_convert_rgb": (None, True),
    "do_normalize": (None, True),
    "do_pad": (None, False),
    "do_rescale": (None, True),
    "do_resize": (None, True),
    "num_frames": (None,),
    "resample": (None, 3),  # bicubic
    "size_divisor": (None,),
} | dict.fromkeys(
    """
    data_format default_to_square device disable_grouping do_sample_frames feature_extractor_type
    image_processor_type image_token input_data_format max_video_tokens pad_size processor_class return_metadata
    return_tensors use_token_compression video_metadata video_processor_type video_token
    """.split()  # noqa: SIM905
)
"""Fields that are not read, with the values that do not change pixels; None allows any."""

_NESTED: Harmless = dict.fromkeys(
    ["chat_template", "feature_extractor", "image_token", "processor_class", "tokenizer", "video_token"]
)


def _find(folder: Path, nested: dict[str, Any], name: str, file: str) -> tuple[Any, str]:
    """A processor's JSON object, empty if there is none, and its place in the files."""
    if nested.get(name) not in (None, {}):
        return nested[name], inside(str(folder / "processor_config.json"), f".{name}")
    return read_json(folder / file), str(folder / file)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
