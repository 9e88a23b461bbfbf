"""The geometry of patches in windows, and the frame writer for the CPU: PyTorch's uint8 resize and NumPy.

Letters: n frames, S slots of a window, W windows, D values of a patch; H and W after a 3 are the sides in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qwen2vl_trt.config import VisionConfig

from .settings import PixelSettings

_CHUNK = 1 << 18
"""Values that one thread normalises at a time: they fit into its cache."""


@dataclass(frozen=True, eq=False)
class Frame:
    """An image, or one frame of a video.

    Attributes:
        pixels: ``[3, H, W]``, uint8 or float32 in 0..1, on any device, with any strides.
        size: rows and columns of pixels after resizing, multiples of ``image_factor``.
        first: its first window in the batch.
        times: the temporal positions of a patch that it fills: all for an image, one for a video frame.
        settings: its normalisation.
    """

    pixels: Tensor
    size: tuple[int, int]
    first: int
    times: slice
    settings: PixelSettings


class FrameWriter(Protocol):
    """Resizes, normalises and patchifies frames."""

    def write(self, frames: Sequence[Frame], pixel_values: Tensor) -> None:
        """Fill ``pixel_values [W, S, D]``, empty slots included; the frames together cover all windows."""


def chunks(frames: Sequence[Frame], max_bytes: int, max_frames: int) -> Iterator[Sequence[Frame]]:
    """Split a batch, in order, by frames and by bytes of source and half-resized pixels; at least one frame each."""
    start, size = 0, 0
    for number, frame in enumerate(frames):
        nbytes = frame.pixels.nbytes + 3 * frame.pixels.shape[1] * frame.size[1]
        if number > start and (size + nbytes > max_bytes or number - start == max_frames):
            yield frames[start:number]
            start, size = number, 0
        size += nbytes
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
    """Up to four; one strided copy each fills all windows of a frame."""
    rows, columns = (_spans(side // config.image_factor, config.window_groups) for side in size)
    return [Region(*vertical, *horizontal) for vertical in rows for horizontal in columns]


def _spans(groups: int, side: int) -> list[tuple[int, int, int]]:
    """Merge groups in a row as ``(first window, windows, groups in each)``: full windows and the rest."""
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
    """Filled and empty slots of a region, as views of a frame's windows ``[n, rows, columns, S, ...]``."""
    windows = windows[:, region.top : region.top + region.down, region.left : region.left + region.across]
    slots = region.group_rows * region.group_columns * config.merge_unit
    return windows[:, :, :, :slots], windows[:, :, :, slots:]


@lru_cache(maxsize=16)
def mean_and_std(settings: PixelSettings, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[3, 1]`` each; for uint8 they include the scaling to 0..1, bit for bit as in Transformers."""
    scale = 1.0 / settings.rescale_factor if dtype == torch.uint8 else 1.0
    mean, std = torch.tensor(settings.image_mean) * scale, torch.tensor(settings.image_std) * scale
    return mean.view(-1, 1), std.view(-1, 1)


class CpuWriter:
    """A :class:`FrameWriter` for the CPU.

    Within a frame nothing starts further threads: PyTorch's arithmetic would split each operation over all cores and
    wait for the slowest, which beside another busy process took 30 ms an image instead of 1.
    """

    def __init__(self, config: VisionConfig) -> None:
        self._config = config

    def write(self, frames: Sequence[Frame], pixel_values: Tensor) -> None:
        # NumPy has no bfloat16: its bits are written.
        store = pixel_values.view(torch.int16) if pixel_values.dtype == torch.bfloat16 else pixel_values
        workers = min(torch.get_num_threads(), len(frames))
        if workers == 1:
            for frame in frames:
                self._write(frame, store)
        else:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(lambda frame: self._write(frame, store), frames))

    def _write(self, frame: Frame, store: Tensor) -> None:
        config = self._config
        pixels = resize(frame.pixels, frame.size)[None]
        mean, std = (factor.numpy() for factor in mean_and_std(frame.settings, pixels.dtype))
        rows, columns = window_rows_and_columns(frame.size, config)
        windows = store[frame.first : frame.first + rows * columns].unflatten(0, (1, rows, columns))
        for region in regions(frame.size, config):
            filled, empty = region_slots(windows, region, config)
            target = filled[0].unflatten(-1, (config.in_chans, config.temporal_patch_size, config.patch_size**2))
            source = region_patches(pixels, region, config)[0]
            _normalise(source.numpy(), target[..., frame.times, :].numpy(), mean, std)
            empty.numpy()[...] = 0


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``[3, H, W]`` if needed, uint8 with the kernel that Transformers reaches through torchvision."""
    if tuple(pixels.shape[1:]) == size:
        return pixels
    # Interleaved channels (every decoded file) resize twice as fast if the kernel recognises them. It looks at the
    # stride of the batch dimension, which indexing with None gets wrong.
    batch = pixels.as_strided((1, *pixels.shape), (pixels.numel(), *pixels.stride()))
    return functional.interpolate(batch, size, mode="bicubic", antialias=True)[0]


def _normalise(source: np.ndarray, target: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
    """Copy patches ``[down, across, ..., 3, patch, patch]`` into windows ``[down, across, slots, 3, times, pixels]``.

    Bit for bit what PyTorch computes. Patches are gathered as bytes, before they become floats.
    """
    rows = max(1, _CHUNK // source[0].size)
    gathered = np.empty((min(rows, len(source)), *source.shape[1:]), source.dtype)
    floats = np.empty(gathered.shape, np.float32)
    for start in range(0, len(source), rows):
        piece = source[start : start + rows]
        count = len(piece)
        np.copyto(gathered[:count], piece)
        np.copyto(floats[:count], gathered[:count])
        values = floats[:count].reshape(count, *target.shape[1:4], target.shape[5])
        values -= mean
        values /= std
        if target.dtype == np.int16:
            _round_to_bfloat16(values)
            values = values.view(np.int32)
        target[start : start + count] = values[..., None, :]


def _round_to_bfloat16(values: np.ndarray) -> None:
    """Replace each float32 by the 16 bits of the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    bits += ((bits >> 16) & 1) + np.uint32(0x7FFF)
    bits >>= 16
