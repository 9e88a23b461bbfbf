"""Window layout: where every patch of a mixed batch lies in the packed tensor of windows.

The vision tower attends within windows of ``window_size`` pixels in most blocks and within a whole image (or
video frame) in a few. All windows of all images stack into one tensor ``[W, S, C]``; a window on the right or
lower border holds fewer patches, as a prefix of its S slots. Everything here depends on the grids alone, is
computed on the host, and is cached per grid.

Letters: W windows, S slots of a window, B attention sequences (one per image, or per temporal frame of a video),
N tokens of the longest sequence, T merged tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .config import VisionConfig

Grid = tuple[int, int, int]
"""``(t, h, w)``: temporal frames, patch rows, patch columns; one row of ``image_grid_thw``."""


@dataclass(frozen=True)
class WindowLayout:
    """Index tensors of one batch, all int64 on the CPU; together with the patches they are the graph's inputs.

    Attributes:
        window_lengths: ``[W]`` patches in each window; they fill the first slots.
        position_ids: ``[W, S, 2]`` row and column of each patch in its frame; zero where a slot is empty.
        sequence_index: ``[B, N]`` slot (of W * S) of each patch of each sequence; zero beyond the length.
        sequence_lengths: ``[B]`` patches in each sequence.
        sequence_position: ``[W, S]`` where in the flattened ``[B * N]`` each slot's patch stands; zero if empty.
        merge_index: ``[T]`` merge group (of W * S / merge unit) of each output token, in raster order.
        tokens_per_item: merged tokens of each image or video, in order; they add up to T.
    """

    window_lengths: Tensor
    position_ids: Tensor
    sequence_index: Tensor
    sequence_lengths: Tensor
    sequence_position: Tensor
    merge_index: Tensor
    tokens_per_item: tuple[int, ...]


@dataclass(frozen=True)
class FrameWindows:
    """One frame cut into windows.

    Attributes:
        patches: per window, ``[n]`` raster index (row * w + column) of its patches: merge groups in raster order,
            the patches of a group in raster order.
        group_slots: ``[h * w / merge unit]`` for each merge group in raster order, ``(window, place in window)``
            as window * groups_per_window + place.
    """

    patches: tuple[Tensor, ...]
    group_slots: Tensor


@lru_cache(maxsize=1024)
def frame_windows(rows: int, columns: int, config: VisionConfig) -> FrameWindows:
    """Cut a frame of ``rows`` x ``columns`` patches into windows, in raster order."""
    merge, side = config.spatial_merge_size, config.window_groups
    group_rows, group_columns = rows // merge, columns // merge
    raster = torch.arange(rows * columns).view(group_rows, merge, group_columns, merge)
    raster = raster.permute(0, 2, 1, 3).reshape(group_rows, group_columns, merge * merge)
    group_slots = torch.empty(group_rows, group_columns, dtype=torch.int64)
    patches: list[Tensor] = []
    for top in range(0, group_rows, side):
        for left in range(0, group_columns, side):
            area = (slice(top, top + side), slice(left, left + side))
            slots = group_slots[area]
            first = len(patches) * side * side
            slots.copy_(torch.arange(first, first + slots.numel()).view_as(slots))
            patches.append(raster[area].reshape(-1))
    return FrameWindows(tuple(patches), group_slots.view(-1))


@lru_cache(maxsize=256)
def window_layout(grids: tuple[Grid, ...], config: VisionConfig, slots: int | None = None) -> WindowLayout:
    """Lay out a batch of images and videos.

    Args:
        grids: ``(t, h, w)`` of each item; h and w are multiples of ``spatial_merge_size``.
        slots: S; by default a full window's, ``config.window_slots``.
    """
    slots = slots or config.window_slots
    unit = config.merge_unit
    windows: list[tuple[int, Tensor, int]] = []  # sequence, raster indices, columns
    sequence_lengths: list[int] = []
    merge_index: list[Tensor] = []
    for frames, rows, columns in grids:
        frame = frame_windows(rows, columns, config)
        window, place = (
            frame.group_slots // (config.window_groups**2),
            frame.group_slots % (config.window_groups**2),
        )
        for _ in range(frames):
            merge_index.append((len(windows) + window) * (slots // unit) + place)
            windows += [(len(sequence_lengths), patches, columns) for patches in frame.patches]
            sequence_lengths.append(rows * columns)

    longest = max(sequence_lengths)
    lengths = torch.tensor([len(patches) for _, patches, _ in windows])
    position_ids = torch.zeros(len(windows), slots, 2, dtype=torch.int64)
    sequence_index = torch.zeros(len(sequence_lengths), longest, dtype=torch.int64)
    sequence_position = torch.zeros(len(windows), slots, dtype=torch.int64)
    for number, (sequence, patches, columns) in enumerate(windows):
        count = len(patches)
        position_ids[number, :count, 0] = patches // columns
        position_ids[number, :count, 1] = patches % columns
        sequence_index[sequence, patches] = torch.arange(number * slots, number * slots + count)
        sequence_position[number, :count] = sequence * longest + patches
    return WindowLayout(
        window_lengths=lengths,
        position_ids=position_ids,
        sequence_index=sequence_index,
        sequence_lengths=torch.tensor(sequence_lengths),
        sequence_position=sequence_position,
        merge_index=torch.cat(merge_index),
        tokens_per_item=tuple(frames * rows * columns // unit for frames, rows, columns in grids),
    )


def grids_of(image_grid_thw: Sequence[Sequence[int]] | Tensor) -> tuple[Grid, ...]:
    """Turn ``image_grid_thw`` into the tuple that :func:`window_layout` caches on."""
    rows = image_grid_thw.tolist() if isinstance(image_grid_thw, Tensor) else image_grid_thw
    return tuple((int(t), int(h), int(w)) for t, h, w in rows)
