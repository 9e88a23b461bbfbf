"""The size that images and video frames are resized to, within the limits of checkpoint and engines.

The limits of the checkpoint, or of the request, apply as in Transformers. If the engines do not take the result, it is
what Transformers makes of the limits that both allow; if rounding to merge groups leaves these, the nearest size that
fits. A size or a number of frames that the request names is never changed for the engines. The checkpoint's limits do
apply to it, as where qwen-vl-utils passes it to Transformers' processor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import LimitError, MediaError
from qwen2vl_trt.media_options import ImageOptions, VideoOptions
from qwen2vl_trt.windows import Grid

from .settings import PixelSettings, PreprocessorSettings, smart_resize

_MIN_FRAME_TOKENS = 128
"""As in qwen-vl-utils, a long clip loses frames before they get smaller than this (apart from rounding)."""


@dataclass(frozen=True)
class MediaSize:
    """Size of an image or of a video's frames.

    Multiply boxes that the model returns by ``width / resized_width`` and ``height / resized_height``.

    Attributes:
        width: of the original, after EXIF orientation.
        height: likewise.
        resized_width: as the model sees it.
        resized_height: likewise.
        grid: ``(t, h, w)`` in patches.
        tokens: in the prompt.
        limited_by: the limit that changed the size: the engines' ``min_hw_dims``, ``max_hw_dims`` or, of a video,
            ``max_input_len`` (or ``max_seq_len`` less the answer); ``min_pixels`` or ``max_pixels`` if the request
            names a size outside of them; else None.
        frames: of a video, the number sampled.
        second_per_grid: of a video, seconds between temporal patches.
    """

    width: int
    height: int
    resized_width: int
    resized_height: int
    grid: Grid
    tokens: int
    limited_by: str | None = None
    frames: int | None = None
    second_per_grid: float = 0.0

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        values: dict[str, object] = {
            "original_size": [self.width, self.height],
            "resized_size": [self.resized_width, self.resized_height],
            "grid_thw": list(self.grid),
            "tokens": self.tokens,
            "limited_by": self.limited_by,
        }
        if self.frames is not None:
            values |= {"frames": self.frames, "second_per_grid": self.second_per_grid}
        return values


class SizeRules:
    """Chooses sizes."""

    def __init__(self, config: VisionConfig, settings: PreprocessorSettings) -> None:
        self._config, self._settings = config, settings

    def image(
        self, height: int, width: int, *, name: str = "image", options: ImageOptions = ImageOptions()
    ) -> MediaSize:
        """Size of an image.

        Args:
            height: of the original.
            width: likewise.
            name: for error messages.
            options: of the request.

        Raises:
            MediaError: a side of 0 pixels, or an aspect ratio over 200.
            LimitError: it does not fit the engines, and the options name its size or ``strict_size`` is set; or the
                latter, and the named size is outside the checkpoint's limits.
        """
        wanted, pixels = _requested((height, width), options, self._settings.image)
        return self._size((height, width), wanted, pixels, name, options)

    def video(
        self,
        frames: int,
        height: int,
        width: int,
        fps: float,
        *,
        name: str = "video",
        options: VideoOptions = VideoOptions(),
    ) -> MediaSize:
        """Size of sampled frames at ``fps``; raises as :meth:`image`.

        The options' ``total_pixels`` is divided among the frames as in qwen-vl-utils.
        """
        wanted, pixels = _requested((height, width), options, self._settings.video)
        if options.total_pixels is not None:
            share = options.total_pixels * self._config.temporal_patch_size // frames
            pixels = pixels.with_limits(max_pixels=max(min(pixels.max_pixels, share), int(pixels.min_pixels * 1.05)))
        return self._size((height, width), wanted, pixels, name, options, frames, fps)

    def video_within(
        self, tokens: int, size: MediaSize, *, name: str = "video", options: VideoOptions = VideoOptions()
    ) -> tuple[MediaSize, Sequence[int]] | None:
        """Shorten a video: smaller frames, down to 128 tokens or ``min_pixels``, then fewer frames.

        Args:
            tokens: the most that it may have.
            size: from :meth:`video`.
            name: for error messages.
            options: of the request; a size that they name stays.

        Returns:
            Its size and the indices of the frames to keep, evenly spaced; None if even ``min_frames``, or the options'
            ``nframes``, are too many.
        """
        unit, area = self._config.temporal_patch_size, self._config.image_factor**2
        original, count = (size.height, size.width), size.frames or 1
        fps = unit / size.second_per_grid
        wanted, pixels = _requested(original, options, self._settings.video)
        if options.resized_height is None:
            min_pixels = options.min_pixels or max(pixels.min_pixels, _MIN_FRAME_TOKENS * area)
            share = max(tokens // size.grid[0] * area, min_pixels)
            pixels = pixels.with_limits(max_pixels=min(share, size.resized_height * size.resized_width))
        found = self._size(original, wanted, pixels, name, options, count, fps)
        if found.tokens <= tokens:
            return replace(found, limited_by="max_input_len"), range(count)
        fewer = tokens // (found.tokens // found.grid[0]) * unit
        min_frames = options.min_frames or self._settings.sampling.min_frames
        if options.nframes is not None or fewer < max(1, min(min_frames, count)):
            return None
        found = self._size(original, wanted, pixels, name, options, fewer, fps * fewer / count)
        return replace(found, limited_by="max_input_len"), [number * count // fewer for number in range(fewer)]

    def _size(
        self,
        original: tuple[int, int],
        wanted: tuple[int, int],
        pixels: PixelSettings,
        name: str,
        options: ImageOptions,
        frames: int | None = None,
        fps: float = 0.0,
    ) -> MediaSize:
        unit = self._config.temporal_patch_size
        patches = 1 if frames is None else -(-frames // unit)
        try:
            resized = self._resize(wanted, pixels)
        except MediaError as error:
            raise MediaError(f"{name}: {error}") from None
        grid = self._grid(resized, patches)
        limited_by = None if options.resized_height is None else self._area_limit(wanted, resized, pixels, name)
        profile = self._settings.profile
        area = grid[1] * grid[2]
        if profile is not None and not profile.min_hw_dims <= area <= profile.max_hw_dims:
            if options.resized_height is not None:
                patch = self._config.patch_size**2
                raise LimitError(
                    f"{name}: resized_height {wanted[0]} and resized_width {wanted[1]} are {area:,}"
                    f" patches; this engine takes {profile.min_hw_dims:,} to {profile.max_hw_dims:,} (--min-hw-dims,"
                    f" --max-hw-dims). Give a size of {profile.min_hw_dims * patch:,} to"
                    f" {profile.max_hw_dims * patch:,} pixels, or rebuild."
                )
            if self._settings.strict_size:
                profile.check_frame(grid, name, f"{original[1]}x{original[0]}", self._config, options)
            limited_by = "max_hw_dims" if area > profile.max_hw_dims else "min_hw_dims"
            resized = self._fit(wanted, pixels, profile, name)
            grid = self._grid(resized, patches)
        tokens = patches * grid[1] * grid[2] // self._config.merge_unit
        seconds = unit / fps if fps else 0.0
        return MediaSize(original[1], original[0], resized[1], resized[0], grid, tokens, limited_by, frames, seconds)

    def _area_limit(
        self, wanted: tuple[int, int], resized: tuple[int, int], pixels: PixelSettings, name: str
    ) -> str | None:
        """The limit of the area that changes the size that the request names; refused if sizes are strict."""
        factor = self._config.image_factor
        rows, columns = (round(side / factor) * factor for side in wanted)
        if (rows, columns) == resized:
            return None
        if self._settings.strict_size:
            raise LimitError(
                f"{name}: resized_height {wanted[0]} and resized_width {wanted[1]} are {rows * columns:,} pixels; this"
                f" checkpoint takes {pixels.min_pixels:,} to {pixels.max_pixels:,} (min_pixels, max_pixels). Give"
                " a size within these, or leave --strict-size out."
            )
        return "max_pixels" if rows * columns > pixels.max_pixels else "min_pixels"

    def _resize(self, size: tuple[int, int], pixels: PixelSettings) -> tuple[int, int]:
        return smart_resize(*size, self._config.image_factor, pixels.min_pixels, pixels.max_pixels)

    def _grid(self, size: tuple[int, int], patches: int) -> Grid:
        return patches, size[0] // self._config.patch_size, size[1] // self._config.patch_size

    def _fit(self, size: tuple[int, int], pixels: PixelSettings, profile: BuildProfile, name: str) -> tuple[int, int]:
        patch = self._config.patch_size**2
        pixels = pixels.clamped(profile.min_hw_dims * patch, profile.max_hw_dims * patch)
        resized = self._resize(size, pixels)
        if profile.takes(self._grid(resized, 1)):
            return resized
        return self._nearest(size, pixels, profile, name)

    def _nearest(
        self, size: tuple[int, int], pixels: PixelSettings, profile: BuildProfile, name: str
    ) -> tuple[int, int]:
        """Of all sizes that fit, the one whose sides differ least, as ratios, from those at the wanted area."""
        unit, factor = self._config.merge_unit, self._config.image_factor
        min_groups, max_groups = -(-profile.min_hw_dims // unit), profile.max_hw_dims // unit
        height, width = size
        area = min(max(height * width, pixels.min_pixels), pixels.max_pixels)
        scale = math.sqrt(area / (height * width)) / factor
        ideal_rows, ideal_columns = height * scale, width * scale

        def distance(groups: tuple[int, int]) -> float:
            return math.log(groups[0] / ideal_rows) ** 2 + math.log(groups[1] / ideal_columns) ** 2

        fitting = []
        for rows in range(1, max_groups + 1):
            low, high = -(-min_groups // rows), max_groups // rows
            if low <= high:
                near = math.floor(ideal_columns)
                fitting += [(rows, min(max(columns, low), high)) for columns in (near, near + 1)]
        if not fitting:
            raise LimitError(
                f"{name} ({width}x{height}): no image has {profile.min_hw_dims:,} to {profile.max_hw_dims:,} patches"
                f" (--min-hw-dims, --max-hw-dims), which these engines take: a patch count is a multiple of {unit}."
                " Rebuild."
            )
        rows, columns = min(fitting, key=distance)
        return rows * factor, columns * factor


def _requested(
    size: tuple[int, int], options: ImageOptions, default: PixelSettings
) -> tuple[tuple[int, int], PixelSettings]:
    """Size and limits of the area before resizing; a size that the options name has the default limits."""
    if options.resized_height is not None and options.resized_width is not None:
        return (options.resized_height, options.resized_width), default
    return size, default.with_limits(options.min_pixels, options.max_pixels)


@dataclass(frozen=True, eq=False)
class Medium:
    """A loaded image or video: its pixels, already validated, or its embedding.

    Attributes:
        size: after resizing.
        frames: ``[3, H, W]`` each, uint8 or float32 in 0..1: one of an image, several of a video, none of an embedding.
        embeds: ``[tokens, C]`` on the engine's device, if it is embedded.
        key: hash of content and size, 16 bytes; empty without a cache.
        note: a warning if it was resized to fit the engines.
        nbytes: of its pixels.
    """

    size: MediaSize
    frames: Sequence[Tensor] = ()
    embeds: Tensor | None = None
    key: bytes = b""
    note: str | None = None
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", sum(frame.nbytes for frame in self.frames))

    @property
    def is_video(self) -> bool:
        return self.size.frames is not None
