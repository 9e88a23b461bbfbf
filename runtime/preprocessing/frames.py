"""One frame and the windows that it fills: the geometry that every way of writing patches shares.

Letters: n frames, S slots of a window, D values of a patch; H and W after a 3 are the sides in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from qwen2vl_trt.config import VisionConfig

from .settings import PixelSettings


@dataclass(frozen=True, eq=False)
class Frame:
    """An image, or one frame of a video, on its way into the windows.

    Attributes:
        pixels: ``[3, H, W]``, uint8 or float32 in 0..1, on whatever device and of whatever strides.
        size: rows and columns of pixels after resizing, multiples of ``image_factor``.
        first: its first window in the batch.
        times: which of a patch's temporal places it fills: all for an image, one for a frame of a video.
        settings: its normalisation.
    """

    pixels: Tensor
    size: tuple[int, int]
    first: int
    times: slice
    settings: PixelSettings


class FrameWriter(Protocol):
    """Resizes, normalises and patchifies: the host's threads, PyTorch's operations or Triton's kernels."""

    def write(self, frames: Sequence[Frame], pixel_values: Tensor) -> None:
        """Fill ``pixel_values [W, S, D]``, empty slots included, with frames that together cover it."""


def chunks(frames: Sequence[Frame], limit: int, most: int) -> Iterator[Sequence[Frame]]:
    """Cut a batch, in order, into parts of at most ``most`` frames and about ``limit`` bytes of 8-bit pixels.

    What counts are the pixels to bring and those between the two passes of a resize. A part has at least one frame.
    """
    start, size = 0, 0
    for number, frame in enumerate(frames):
        own = frame.pixels.nbytes + 3 * frame.pixels.shape[1] * frame.size[1]
        if number > start and (size + own > limit or number - start == most):
            yield frames[start:number]
            start, size = number, 0
        size += own
    yield frames[start:]


@dataclass(frozen=True)
class Region:
    """Windows of one shape in a frame: the full ones, the right border, the lower border, or the corner."""

    top: int
    down: int
    group_rows: int
    left: int
    across: int
    group_columns: int


def window_rows_and_columns(size: tuple[int, int], config: VisionConfig) -> tuple[int, int]:
    """Windows of a frame of this size in pixels, down and across."""
    side = config.image_factor * config.window_groups
    return -(-size[0] // side), -(-size[1] // side)


def regions(size: tuple[int, int], config: VisionConfig) -> list[Region]:
    """Up to four: a strided copy of each fills all windows of a frame."""
    rows, columns = (_spans(side // config.image_factor, config.window_groups) for side in size)
    return [Region(*vertical, *horizontal) for vertical in rows for horizontal in columns]


def _spans(groups: int, side: int) -> list[tuple[int, int, int]]:
    """Cut a row of merge groups into windows: ``(first window, windows, groups in each)``, full ones and the rest."""
    full, rest = divmod(groups, side)
    return [(0, full, side)] * (full > 0) + [(full, 1, rest)] * (rest > 0)


def region_patches(pixels: Tensor, region: Region, config: VisionConfig) -> Tensor:
    """``[n, down, across, group rows, group columns, merge, merge, 3, patch, patch]``, a view of ``[n, 3, H, W]``."""
    merge, patch, factor = config.spatial_merge_size, config.patch_size, config.image_factor
    y, x = (start * config.window_groups * factor for start in (region.top, region.left))
    height, width = region.down * region.group_rows * factor, region.across * region.group_columns * factor
    cut = pixels[:, :, y : y + height, x : x + width]
    cut = cut.unflatten(3, (region.across, region.group_columns, merge, patch))
    cut = cut.unflatten(2, (region.down, region.group_rows, merge, patch))
    return cut.permute(0, 2, 6, 3, 7, 4, 8, 1, 5, 9)


def region_slots(windows: Tensor, region: Region, config: VisionConfig) -> tuple[Tensor, Tensor]:
    """The slots that a region's patches fill and the empty ones behind them, views of its windows.

    Args:
        windows: ``[n, rows, columns, S, ...]`` of a frame.
    """
    windows = windows[:, region.top : region.top + region.down, region.left : region.left + region.across]
    slots = region.group_rows * region.group_columns * config.merge_unit
    return windows[:, :, :, :slots], windows[:, :, :, slots:]


@lru_cache(maxsize=16)
def mean_and_std(settings: PixelSettings, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[3, 1]`` each; for uint8 the scaling to 0..1 is folded in, as Transformers does, bit for bit."""
    scale = 1.0 / settings.rescale_factor if dtype == torch.uint8 else 1.0
    mean, std = torch.tensor(settings.image_mean) * scale, torch.tensor(settings.image_std) * scale
    return mean.view(-1, 1), std.view(-1, 1)
