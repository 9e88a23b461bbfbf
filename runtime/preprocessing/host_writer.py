"""Frames into windows on the CPU: PyTorch's uint8 resize and NumPy's loops, a thread a frame."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qwen2vl_trt.config import VisionConfig

from .frames import Frame, mean_and_std, region_patches, region_slots, regions, window_rows_and_columns

_CHUNK = 1 << 18
"""Values normalised at a time by one thread: they stay in its cache on the way to the output."""


class HostWriter:
    """A :class:`~qwen2vl_trt.runtime.preprocessing.frames.FrameWriter` for the CPU.

    A thread a frame, and nothing within it that would start threads of its own: PyTorch's arithmetic splits each
    operation over all cores and waits for the slowest, and beside another busy process an image took 30 ms instead
    of 1. Its uint8 resize and NumPy's loops stay on the thread that calls them and let go of the interpreter.
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
    """Resize ``[3, H, W]``, uint8 with the kernel that Transformers reaches through torchvision; none if it fits."""
    if tuple(pixels.shape[1:]) == size:
        return pixels
    # Pixels with their channels side by side (every decoded file) resize twice as fast if the kernel can see that
    # they are, which it does by the stride of the batch dimension that indexing with None gets wrong.
    batch = pixels.as_strided((1, *pixels.shape), (pixels.numel(), *pixels.stride()))
    return functional.interpolate(batch, size, mode="bicubic", antialias=True)[0]


def _normalise(source: np.ndarray, target: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
    """Copy patches ``[down, across, ..., 3, patch, patch]`` into windows ``[down, across, slots, 3, times, pixels]``.

    Bit for bit what PyTorch computes; patches are gathered before they become floats of four times the size.
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
        target[start : start + count] = (values.view(np.int32) if target.dtype == np.int16 else values)[..., None, :]


def _round_to_bfloat16(values: np.ndarray) -> None:
    """Replace each float32 by the 16 bits of the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    bits += ((bits >> 16) & 1) + np.uint32(0x7FFF)
    bits >>= 16
