"""The frame writer for CUDA without Triton, in PyTorch operations; tests run it on the CPU.

PyTorch has no uint8 resize for CUDA. So uint8 is resized by :mod:`qwen2vl_trt.runtime.preprocessing.bicubic`, which
equals the CPU bit for bit, and floats by PyTorch's kernel.

Letters: n frames, S slots of a window; H and W after a 3 are the sides in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.transfer import to_device

from .bicubic import bicubic_table
from .frames import Frame, chunks, mean_and_std, region_patches, region_slots, regions, window_rows_and_columns
from .staging import Staging, staged_bytes

_CHUNK = 1 << 25
"""Values resized at a time, whose sums take 4 bytes each; a group may be a long video."""


class TorchWriter:
    """A :class:`~qwen2vl_trt.runtime.preprocessing.frames.FrameWriter`; ``staging`` copies frames to its device."""

    def __init__(self, config: VisionConfig, staging: Staging) -> None:
        self._config, self._staging = config, staging

    def write(self, frames: Sequence[Frame], pixel_values: Tensor) -> None:
        """Frames of one size and kind share their kernels."""
        for chunk in chunks(frames, self._staging.limit, len(frames)):
            sources = [frame.pixels for frame in chunk]
            with self._staging.slot(staged_bytes(sources)) as slot:
                alike: dict[Any, list[tuple[Frame, Tensor]]] = {}
                for frame, pixels in zip(chunk, slot.to_device(sources), strict=True):
                    kind = (pixels.shape, pixels.dtype, frame.size, frame.settings, frame.times.start)
                    alike.setdefault(kind, []).append((frame, pixels))
                for group in alike.values():
                    frame = group[0][0]
                    together = max(1, _CHUNK // max(frame.pixels.numel(), 3 * frame.size[0] * frame.size[1]))
                    for start in range(0, len(group), together):
                        part, batch = zip(*group[start : start + together], strict=True)
                        self._write_alike(part, torch.stack(batch), pixel_values)

    def _write_alike(self, frames: Sequence[Frame], batch: Tensor, pixel_values: Tensor) -> None:
        config, frame = self._config, frames[0]
        mean, std = (to_device(factor, batch.device) for factor in mean_and_std(frame.settings, batch.dtype))
        batch = resize(batch, frame.size)
        rows, columns = window_rows_and_columns(frame.size, config)
        times = len(range(config.temporal_patch_size)[frame.times])
        area = config.patch_size**2
        windows = pixel_values.new_empty(
            (len(frames), rows, columns, config.window_slots, config.in_chans, times, area)
        )
        for region in regions(frame.size, config):
            filled, empty = region_slots(windows, region, config)
            values = region_patches(batch, region, config).to(torch.float32, memory_format=torch.contiguous_format)
            values = values.flatten(3, 6).flatten(5, 6)  # [n, down, across, slots, 3, pixels]
            filled.copy_((values - mean).div_(std).unsqueeze(-2))
            empty.zero_()
        places = torch.tensor([frame.first for frame in frames])[:, None] + torch.arange(rows * columns)
        target = pixel_values.unflatten(-1, (config.in_chans, config.temporal_patch_size, area))
        target[..., frame.times, :].index_copy_(0, to_device(places.flatten(), batch.device), windows.flatten(0, 2))


def resize(batch: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``[n, 3, H, W]`` if needed: floats by PyTorch's antialiased bicubic, uint8 in integers."""
    if batch.dtype == torch.uint8:
        return _resize_axis(_resize_axis(batch, 3, size[1]), 2, size[0])
    if tuple(batch.shape[2:]) == size:
        return batch
    return functional.interpolate(batch, size, mode="bicubic", antialias=True)


def _resize_axis(batch: Tensor, axis: int, out: int) -> Tensor:
    source = batch.shape[axis]
    if source == out:
        return batch
    table = bicubic_table(source, out)
    places = torch.from_numpy(table.first).long() + torch.arange(table.taps)[:, None]
    index = to_device(places.clamp_(max=source - 1), batch.device)  # beyond the source the weight is 0
    weights = to_device(table.weights, batch.device)
    shape = list(batch.shape)
    shape[axis] = out
    total = torch.full(shape, table.half, dtype=torch.int32, device=batch.device)
    for tap in range(table.taps):
        picked = batch.index_select(axis, index[tap]).to(torch.int32)
        total.addcmul_(picked, weights[tap] if axis == 3 else weights[tap, :, None])
    return (total >> table.precision).clamp_(0, 255).to(torch.uint8)
