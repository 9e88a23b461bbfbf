"""Window layout: the index tensors that put every patch of a mixed batch into windows (docs/design/graphs.md).

All windows of all images are one tensor ``[W, S, C]``; a window at a border has fewer patches, in its first slots.
Depends on the grids alone; computed on the host.

Letters: W windows, S slots of a window, B attention sequences (one per image, or per temporal frame of a video),
N tokens of the longest sequence, T merged tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import VisionConfig

Grid = tuple[int, int, int]
"""``(t, h, w)``: temporal frames, patch rows, patch columns; one row of ``image_grid_thw``."""


@dataclass(frozen=True)
class WindowLayout:
    """Index tensors of one batch, int64 on the CPU: the vision graph's inputs besides the patches.

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

    @property
    def index_tensors(self) -> dict[str, Tensor]:
        """The graph's inputs after the patches, by name, in order."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class PaddedSequences:
    """Attention sequences padded to the longest.

    Attributes:
        lengths: ``[B]`` patches in each.
        index: ``[B, N]`` slot of each patch, to gather; None where patches already are ``[B, N]``.
        position: in the slots' shape, where in ``[B * N]`` each slot's patch is, to gather back; None likewise.
    """

    lengths: Tensor
    index: Tensor | None = None
    position: Tensor | None = None


@dataclass(frozen=True)
class PackedSequences:
    """Attention sequences one behind another in a row, without padding, as FlashAttention takes them.

    Patches in window order are both packed windows and packed images: without a mask, order within one has no effect.

    Attributes:
        cu_seqlens: ``[B + 1]`` int32, where each begins, and the number of patches.
        max_seqlen: patches of the longest.
    """

    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, lengths: Tensor) -> PackedSequences:
        """From the lengths ``[B]``, at least 1 each."""
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
        cu_seqlens[1:] = lengths.cumsum(0)
        return cls(cu_seqlens, int(lengths.max()))


@dataclass(frozen=True)
class UnpaddedLayout:
    """The P patches of a batch in window order as one row, without empty slots.

    Attributes:
        filled: ``[P]`` slot of each patch in the padded layout.
        position_ids: ``[1, P, 2]``.
        merge_index: ``[T]`` merge group, of P / merge unit, of each output token in raster order.
    """

    filled: Tensor
    position_ids: Tensor
    windows: PaddedSequences
    frames: PaddedSequences
    merge_index: Tensor


def unpad(layout: WindowLayout, config: VisionConfig) -> UnpaddedLayout:
    """Leave out a layout's empty slots."""
    filled = torch.arange(layout.sequence_position.shape[1]) < layout.window_lengths[:, None]  # [W, S]
    packed = (filled.flatten().cumsum(0) - 1).clamp(min=0)  # [W * S] patch in each filled slot
    slots = filled.flatten().nonzero().squeeze(1)
    return UnpaddedLayout(
        filled=slots,
        position_ids=layout.position_ids[filled][None],
        windows=PaddedSequences(layout.window_lengths, packed.view_as(filled), slots[None]),
        frames=PaddedSequences(
            layout.sequence_lengths, packed[layout.sequence_index], layout.sequence_position[filled][None]
        ),
        merge_index=packed[layout.merge_index * config.merge_unit] // config.merge_unit,
    )


@dataclass(frozen=True)
class FrameWindows:
    """One frame cut into windows; all orders are raster orders: of windows, of a window's merge groups, of patches.

    Attributes:
        lengths: ``[W]`` patches in each window.
        patch_slots: ``[h * w]`` slot ``window * S + index`` of each patch.
        group_slots: ``[h * w / merge unit]`` likewise of each merge group, counted in groups.
    """

    lengths: NDArray[np.int64]
    patch_slots: NDArray[np.int64]
    group_slots: NDArray[np.int64]


@lru_cache(maxsize=1024)
def frame_windows(rows: int, columns: int, config: VisionConfig, slots: int) -> FrameWindows:
    """Cut a frame of ``rows`` x ``columns`` patches into windows of ``slots``."""
    merge, side, unit = config.spatial_merge_size, config.window_groups, config.merge_unit
    group_rows, group_columns = rows // merge, columns // merge
    row, column = np.arange(group_rows)[:, None], np.arange(group_columns)
    window = row // side * -(-group_columns // side) + column // side
    width = np.minimum(group_columns - column // side * side, side)  # of the window, in groups; less on the border
    place = row % side * width + column % side
    group_slots = window * (slots // unit) + place  # [group rows, group columns]
    inside = np.arange(unit).reshape(merge, 1, merge)
    patch_slots = group_slots[:, None, :, None] * unit + inside  # [group rows, merge, group columns, merge]
    return FrameWindows(np.bincount(window.ravel()) * unit, patch_slots.ravel(), group_slots.ravel())


@lru_cache(maxsize=256)
def window_layout(grids: tuple[Grid, ...], config: VisionConfig, slots: int | None = None) -> WindowLayout:
    """Lay out a batch of images and videos.

    Args:
        grids: ``(t, h, w)`` of each item; h and w are multiples of ``spatial_merge_size``.
        slots: S; by default a full window's, ``config.window_slots``.
    """
    slots, unit = slots or config.window_slots, config.merge_unit
    sizes = [(rows, columns) for frames, rows, columns in grids for _ in range(frames)]
    frames = [frame_windows(*size, config, slots) for size in sizes]
    windows = sum(len(frame.lengths) for frame in frames)
    longest = max(rows * columns for rows, columns in sizes)
    position_ids = np.zeros((windows * slots, 2), dtype=np.int64)
    sequence_index = np.zeros((len(frames), longest), dtype=np.int64)
    sequence_position = np.zeros(windows * slots, dtype=np.int64)
    merge_index = []
    first = 0  # window of the frame
    for sequence, (frame, (rows, columns)) in enumerate(zip(frames, sizes)):
        patch_slots = frame.patch_slots + first * slots
        raster = np.arange(rows * columns)
        position_ids[patch_slots, 0] = raster // columns
        position_ids[patch_slots, 1] = raster % columns
        sequence_index[sequence, : rows * columns] = patch_slots
        sequence_position[patch_slots] = sequence * longest + raster
        merge_index.append(frame.group_slots + first * (slots // unit))
        first += len(frame.lengths)
    return WindowLayout(
        window_lengths=torch.from_numpy(np.concatenate([frame.lengths for frame in frames])),
        position_ids=torch.from_numpy(position_ids.reshape(windows, slots, 2)),
        sequence_index=torch.from_numpy(sequence_index),
        sequence_lengths=torch.tensor([rows * columns for rows, columns in sizes]),
        sequence_position=torch.from_numpy(sequence_position.reshape(windows, slots)),
        merge_index=torch.from_numpy(np.concatenate(merge_index)),
        tokens_per_item=tuple(frames * rows * columns // unit for frames, rows, columns in grids),
    )


def grids_of(image_grid_thw: Sequence[Sequence[int]] | Tensor) -> tuple[Grid, ...]:
    """``image_grid_thw`` as the tuple that :func:`window_layout` takes."""
    rows = image_grid_thw.tolist() if isinstance(image_grid_thw, Tensor) else image_grid_thw
    return tuple((int(t), int(h), int(w)) for t, h, w in rows)
