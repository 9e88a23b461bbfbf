"""The size that an image, or the frames of a video, are resized to: within the checkpoint's limits and the engines'.

The checkpoint's limits, or those that a request gives in their place, decide as in Transformers. Where the engines do
not take that size, it is the one that Transformers makes of the limits that both have in common; where even that is
outside, because sides are whole numbers of merge groups, the nearest that fits. A size or a number of frames that a
request names is not changed for the engines' sake; the checkpoint's limits hold for such a size too, as they do where
qwen-vl-utils gives it to Transformers' processor.
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

_LEAST_FRAME_TOKENS = 128
"""A long clip loses frames before its frames are limited to less than this, as in qwen-vl-utils; sides are rounded
down, so that a frame may have a few less."""


@dataclass(frozen=True)
class MediaSize:
    """What became of an image, or of the frames of a video.

    A box in the pixels that the model saw becomes one in the original by ``width / resized_width`` and
    ``height / resized_height``.

    Attributes:
        width: as it came, upright as its EXIF orientation says.
        height: likewise.
        resized_width: as the model saw it.
        resized_height: likewise.
        grid: ``(t, h, w)`` in patches.
        tokens: of the prompt.
        limited_by: the limit that changed the size: of the engines ``min_hw_dims``, ``max_hw_dims`` or, of a video,
            ``max_input_len`` (the prompt's, or ``max_seq_len`` less the answer); ``min_pixels`` or ``max_pixels`` of
            the checkpoint or the pipeline where the request names another size; None where checkpoint and request alone
            decided.
        frames: of a video, how many are kept.
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
    """Decides sizes; no pixel is needed.

    Args:
        config: the vision tower.
        settings: limits of the checkpoint and of the engines.
    """

    def __init__(self, config: VisionConfig, settings: PreprocessorSettings) -> None:
        self._config, self._settings = config, settings

    def image(
        self, height: int, width: int, *, name: str = "image", options: ImageOptions = ImageOptions()
    ) -> MediaSize:
        """Size of an image.

        Args:
            height: as it came.
            width: likewise.
            name: what error messages call it.
            options: what its request says.

        Raises:
            MediaError: a side of 0 pixels, or an aspect ratio over 200.
            LimitError: it does not fit the engines, and ``strict_size``, or a size that the options name, forbids to
                resize it further; or ``strict_size``, and the checkpoint's limits do not allow the size that they name.
        """
        wanted, pixels = _asked((height, width), options, self._settings.image)
        return self._size((height, width), wanted, pixels, name, 1, options)

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
        """Size of so many kept frames, which follow each other at a rate; raises as :meth:`image`.

        ``total_pixels`` of the options is shared out among the frames as in qwen-vl-utils.
        """
        wanted, pixels = _asked((height, width), options, self._settings.video)
        if options.total_pixels is not None:
            share = options.total_pixels * self._config.temporal_patch_size // frames
            most = max(min(pixels.max_pixels, share), int(pixels.min_pixels * 1.05))
            pixels = pixels.with_limits(max_pixels=most)
        return self._video((height, width), wanted, pixels, name, frames, fps, options)

    def video_within(
        self, tokens: int, size: MediaSize, *, name: str = "video", options: VideoOptions = VideoOptions()
    ) -> tuple[MediaSize, Sequence[int]] | None:
        """Make a video shorter: smaller frames, down to 128 tokens or ``min_pixels``, and then fewer frames.

        Args:
            tokens: most that it may have.
            size: what :meth:`video` gave.
            name: what error messages call it.
            options: what its request says.

        Returns:
            Its size and which of its frames are kept, evenly spaced; None where ``min_frames`` are too many, or all
            where the options say ``nframes``. A size that they name stays.
        """
        unit, area = self._config.temporal_patch_size, self._config.image_factor**2
        original, count = (size.height, size.width), size.frames or 1
        fps = unit / size.second_per_grid
        wanted, pixels = _asked(original, options, self._settings.video)
        if options.resized_height is None:
            least = options.min_pixels or max(pixels.min_pixels, _LEAST_FRAME_TOKENS * area)
            most = min(max(tokens // size.grid[0] * area, least), size.resized_height * size.resized_width)
            pixels = pixels.with_limits(max_pixels=most)
        found, kept = self._video(original, wanted, pixels, name, count, fps, options), range(count)
        if found.tokens <= tokens:
            return replace(found, limited_by="max_input_len"), kept
        fewer = tokens // (found.tokens // found.grid[0]) * unit
        fewest = options.min_frames or self._settings.sampling.min_frames
        if options.nframes is not None or fewer < max(1, min(fewest, count)):
            return None
        found = self._video(original, wanted, pixels, name, fewer, fps * fewer / count, options)
        return replace(found, limited_by="max_input_len"), [number * count // fewer for number in range(fewer)]

    def _video(
        self,
        original: tuple[int, int],
        wanted: tuple[int, int],
        pixels: PixelSettings,
        name: str,
        frames: int,
        fps: float,
        options: VideoOptions,
    ) -> MediaSize:
        unit = self._config.temporal_patch_size
        found = self._size(original, wanted, pixels, name, -(-frames // unit), options)
        return replace(found, frames=frames, second_per_grid=unit / fps)

    def _size(
        self,
        original: tuple[int, int],
        wanted: tuple[int, int],
        pixels: PixelSettings,
        name: str,
        patches: int,
        options: ImageOptions,
    ) -> MediaSize:
        try:
            resized = self._resize(wanted, pixels)
        except MediaError as error:
            raise MediaError(f"{name}: {error}") from None
        grid = self._grid(resized, patches)
        limited_by = None if options.resized_height is None else self._overruled(wanted, resized, pixels, name)
        profile = self._settings.profile
        if profile is not None and not profile.takes(grid):
            if options.resized_height is not None:
                patch = self._config.patch_size**2
                raise LimitError(
                    f"{name}: resized_height {wanted[0]} and resized_width {wanted[1]} are {grid[1] * grid[2]:,}"
                    f" patches; this engine takes {profile.min_hw_dims:,} to {profile.max_hw_dims:,} (--min-hw-dims,"
                    f" --max-hw-dims). Give a size of {profile.min_hw_dims * patch:,} to"
                    f" {profile.max_hw_dims * patch:,} pixels, or rebuild."
                )
            if self._settings.strict_size:
                profile.check_frame(grid, name, f"{original[1]}x{original[0]}", self._config, options)
            limited_by = "max_hw_dims" if grid[1] * grid[2] > profile.max_hw_dims else "min_hw_dims"
            resized = self._fit(wanted, pixels, profile, name)
            grid = self._grid(resized, patches)
        tokens = patches * grid[1] * grid[2] // self._config.merge_unit
        return MediaSize(original[1], original[0], resized[1], resized[0], grid, tokens, limited_by)

    def _overruled(
        self, wanted: tuple[int, int], resized: tuple[int, int], pixels: PixelSettings, name: str
    ) -> str | None:
        """Which limit of the area gives another size than the request names; refused where sizes are strict."""
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
        pixels = pixels.within(profile.min_hw_dims * patch, profile.max_hw_dims * patch)
        resized = self._resize(size, pixels)
        if profile.takes(self._grid(resized, 1)):
            return resized
        return self._nearest(size, pixels, profile, name)

    def _nearest(
        self, size: tuple[int, int], pixels: PixelSettings, profile: BuildProfile, name: str
    ) -> tuple[int, int]:
        """Of all sizes that fit, the one whose sides differ least, by their ratios, from those at the wanted area."""
        unit, factor = self._config.merge_unit, self._config.image_factor
        least, most = -(-profile.min_hw_dims // unit), profile.max_hw_dims // unit  # merge groups
        height, width = size
        area = min(max(height * width, pixels.min_pixels), pixels.max_pixels)
        scale = math.sqrt(area / (height * width)) / factor
        ideal_rows, ideal_columns = height * scale, width * scale

        def distance(groups: tuple[int, int]) -> float:
            return math.log(groups[0] / ideal_rows) ** 2 + math.log(groups[1] / ideal_columns) ** 2

        fitting = []
        for rows in range(1, most + 1):
            fewest, largest = -(-least // rows), most // rows
            if fewest <= largest:
                near = math.floor(ideal_columns)
                fitting += [(rows, min(max(columns, fewest), largest)) for columns in (near, near + 1)]
        if not fitting:
            raise LimitError(
                f"{name} ({width}x{height}): no image has {profile.min_hw_dims:,} to {profile.max_hw_dims:,} patches"
                f" (--min-hw-dims, --max-hw-dims), which these engines take: a patch count is a multiple of {unit}."
                " Rebuild."
            )
        rows, columns = min(fitting, key=distance)
        return rows * factor, columns * factor


def _asked(size: tuple[int, int], options: ImageOptions, usual: PixelSettings) -> tuple[tuple[int, int], PixelSettings]:
    """Height and width to begin with, and the limits of the area: the usual ones for a size that the options name."""
    if options.resized_height is not None and options.resized_width is not None:
        return (options.resized_height, options.resized_width), usual
    return size, usual.with_limits(options.min_pixels, options.max_pixels)


@dataclass(frozen=True, eq=False)
class Medium:
    """An image or a video, by its pixels, which were checked when they were loaded, or by its embedding.

    Attributes:
        size: what it is resized to.
        frames: ``[3, H, W]`` each, uint8 or float32 in 0..1: one of an image, all that are kept of a video; none where
            it is embedded.
        embeds: ``[tokens, C]`` on the engine's device, if it is embedded.
        key: names its content and its size, 16 bytes; empty where no cache asks for it.
        note: says so where it did not fit the engines as it was.
        nbytes: of its pixels; an embedding is the cache's.
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
