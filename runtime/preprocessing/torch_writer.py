"""Frames into windows with PyTorch's operations, on any device: what CUDA does where Triton is missing.

It resizes uint8 in whole numbers (:mod:`qwen2vl_trt.runtime.preprocessing.bicubic`), since PyTorch has no uint8 resize
for CUDA, so its patches equal the CPU's bit for bit. Floats are resized by PyTorch's own kernel for the device. Tests
run it on CPU tensors; on a GPU it has not run yet.

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
from .staging import Staging, bytes_of

_CHUNK = 1 << 25
"""Values of one group at a time: the sums of the resize take 4 bytes a value, and a group may be a long video."""


class TorchWriter:
    """A :class:`~qwen2vl_trt.runtime.preprocessing.frames.FrameWriter` for frames that fit together into one tensor.

    Args:
        config: the vision tower.
        staging: brings frames that are not there to its device.
    """

    def __init__(self, config: VisionConfig, staging: Staging) -> None:
        self._config, self._staging = config, staging

    def write(self, frames: Sequence[Frame], pixel_values: Tensor) -> None:
        """Frames of one size and kind go together: a number of kernels that does not grow with theirs."""
        for chunk in chunks(frames, self._staging.limit, len(frames)):
            sources = [frame.pixels for frame in chunk]
            with self._staging.slot(bytes_of(sources)) as slot:
                alike: dict[Any, list[tuple[Frame, Tensor]]] = {}
                for frame, pixels in zip(chunk, slot.send(sources), strict=True):
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
    """Resize ``[n, 3, H, W]``: floats by PyTorch's antialiased bicubic, uint8 in whole numbers; none if it fits."""
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
    index = to_device(places.clamp_(max=source - 1), batch.device)  # behind the source the weight is 0
    weights = to_device(table.weights, batch.device)
    shape = list(batch.shape)
    shape[axis] = out
    total = torch.full(shape, table.half, dtype=torch.int32, device=batch.device)
    for tap in range(table.taps):
        picked = batch.index_select(axis, index[tap]).to(torch.int32)
        total.addcmul_(picked, weights[tap] if axis == 3 else weights[tap, :, None])
    return (total >> table.precision).clamp_(0, 255).to(torch.uint8)
