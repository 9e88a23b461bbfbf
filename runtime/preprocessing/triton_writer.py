"""The frame writer for CUDA with Triton: two kernel launches for a batch of mixed sizes.

The horizontal and the vertical pass follow :mod:`qwen2vl_trt.runtime.preprocessing.bicubic`. The vertical pass also
normalises, by a table of the 256 values that a channel can have, and writes patches in window order. The result equals
the CPU's bit for bit, in FP32 and BF16.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.errors import MissingDependencyError

from .bicubic import bicubic_table
from .frames import Frame, FrameWriter, chunks, mean_and_std, window_rows_and_columns
from .settings import PixelSettings
from .staging import Staging, staged_bytes

_MAX_FRAMES = 128
"""Of one launch: every program searches them all, and the kernel is compiled for their number."""


@dataclass(frozen=True)
class Tiles:
    """Work of one program, in powers of 2.

    Attributes:
        rows: of a tile of the horizontal pass.
        columns: likewise.
        block: values of a window, of one temporal position.
    """

    rows: int = 4
    columns: int = 128
    block: int = 512


def triton_is_installed() -> bool:
    """PyTorch for CUDA brings Triton on Linux."""
    return importlib.util.find_spec("triton") is not None


class TritonWriter:
    """A :class:`~qwen2vl_trt.runtime.preprocessing.frames.FrameWriter` for 8-bit frames; others go to ``floats``.

    ``staging`` copies frames to its device. Raises MissingDependencyError without Triton.
    """

    def __init__(self, config: VisionConfig, staging: Staging, floats: FrameWriter, tiles: Tiles | None = None) -> None:
        if not triton_is_installed():
            raise MissingDependencyError(
                'kernels="triton" needs Triton, which PyTorch for CUDA brings on Linux; pip install triton,'
                ' or leave kernels at "auto"'
            )
        from . import triton_kernels

        self._kernels = triton_kernels
        self._config, self._staging, self._floats, self._tiles = config, staging, floats, tiles or Tiles()

    def warm_up(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compile both kernels; raises whatever Triton does where it cannot, for example without a C compiler."""
        config = self._config
        side = config.image_factor
        frame = Frame(torch.zeros(3, 1, 1, dtype=torch.uint8), (side, side), 0, slice(None), PixelSettings())
        self.write([frame], torch.empty(1, config.window_slots, config.qwen2_vl_dim, dtype=dtype, device=device))

    def write(self, frames: Sequence[Frame], pixel_values: Tensor) -> None:
        """Two launches for every 128 frames or ``staging.limit`` bytes."""
        others = [frame for frame in frames if frame.pixels.dtype != torch.uint8]
        if others:
            self._floats.write(others, pixel_values)
        frames = [frame for frame in frames if frame.pixels.dtype == torch.uint8]
        if frames:
            for chunk in chunks(frames, self._staging.limit, _MAX_FRAMES):
                self._write(chunk, pixel_values)

    def _write(self, frames: Sequence[Frame], pixel_values: Tensor) -> None:
        config, kernels, tiles, device = self._config, self._kernels, self._tiles, pixel_values.device
        batch = TritonBatch(frames, config, (tiles.rows, tiles.columns), pixel_values.dtype)
        sources = [frame.pixels for frame in frames]
        arguments = [batch.records, batch.tables, batch.levels, batch.row_starts, batch.window_starts]
        middle = torch.empty(batch.middle_bytes, dtype=torch.uint8, device=device)
        with self._staging.slot(staged_bytes(sources) + staged_bytes(arguments)) as slot:
            batch.fill_records(slot.to_device(sources), middle)
            records, tables, levels, row_starts, window_starts = slot.to_device(arguments)
            if batch.row_programs:
                kernels.resize_rows[(batch.row_programs,)](
                    records,
                    row_starts,
                    tables,
                    len(frames),
                    FRAMES=_MAX_FRAMES,
                    TILE_ROWS=tiles.rows,
                    TILE_COLUMNS=tiles.columns,
                )
            blocks = -(-config.window_slots * 3 * config.patch_size**2 // tiles.block)
            kernels.write_windows[(batch.windows * blocks,)](
                records,
                window_starts,
                tables,
                levels,
                pixel_values.view(levels.dtype),
                len(frames),
                PATCH=config.patch_size,
                TIMES=config.temporal_patch_size,
                MERGE=config.spatial_merge_size,
                SIDE=config.window_groups,
                FRAMES=_MAX_FRAMES,
                BLOCK=tiles.block,
            )


_FIELDS = 24


class TritonBatch:
    """The kernels' arguments for one or more 8-bit frames.

    Args:
        frames: at least one.
        config: the vision tower.
        tile: rows and columns of a program of the horizontal pass.
        dtype: of the patches.

    Attributes:
        records: ``[n, 24]`` int64, fields as in the kernels' module; complete after :meth:`fill_records`.
        tables: int32, for each pair of sizes once: first, then weights, tap after tap.
        levels: the bits of each normalised level, ``[3 * 256]`` for each normalisation.
        row_starts: int32, the first program of each frame in the horizontal pass, which some skip.
        row_programs: programs of that pass.
        window_starts: int32, the first window of each frame in the batch.
        windows: of all frames.
        middle_bytes: of pixels between the passes.
    """

    def __init__(
        self, frames: Sequence[Frame], config: VisionConfig, tile: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self._frames = frames
        self.records = torch.empty(len(frames), _FIELDS, dtype=torch.int64)
        self._axes: dict[tuple[int, int], tuple[int, ...]] = {}
        self._normalisations: dict[PixelSettings, int] = {}
        tables: list[NDArray[np.int32]] = []
        levels: list[Tensor] = []
        length = 0
        programs, windows, self.middle_bytes = [], [], 0
        for frame in frames:
            (height, width), (rows, columns) = frame.pixels.shape[1:], frame.size
            for axis in ((width, columns), (height, rows)):
                if axis not in self._axes:
                    table = bicubic_table(*axis)
                    self._axes[axis] = (length, table.taps, table.half, table.precision)
                    tables += [table.first, table.weights.ravel()]
                    length += (1 + table.taps) * axis[1]
            if frame.settings not in self._normalisations:
                self._normalisations[frame.settings] = len(levels) * 3 * 256
                levels.append(_levels(frame.settings, dtype))
            down, across = window_rows_and_columns(frame.size, config)
            windows.append(down * across)
            resized = width != columns
            programs.append(-(-height // tile[0]) * -(-columns // tile[1]) * resized)
            self.middle_bytes += 3 * height * columns * resized
        self.tables, self.levels = torch.from_numpy(np.concatenate(tables)), torch.cat(levels)
        self.row_starts, self.row_programs = _starts(programs)
        self.window_starts, self.windows = _starts(windows)

    def fill_records(self, pixels: Sequence[Tensor], middle: Tensor) -> None:
        """Complete the records by the addresses of the frames' pixels and ``middle [middle_bytes]``, on the device."""
        rows = []
        address = middle.data_ptr()
        for frame, source in zip(self._frames, pixels, strict=True):
            height, width = source.shape[1:]
            between = origin = (source.data_ptr(), *source.stride())
            if width != frame.size[1]:
                between = (address, height * frame.size[1], frame.size[1], 1)
                address += 3 * height * frame.size[1]
            rows.append(
                (
                    *origin,
                    *(height, width),
                    *between,
                    *frame.size,
                    *self._axes[width, frame.size[1]],
                    *self._axes[height, frame.size[0]],
                    frame.first,
                    -1 if frame.times.start is None else frame.times.start,
                    self._normalisations[frame.settings],
                    0,  # unused: a record is 192 bytes, six sectors of a GPU's memory
                )
            )
        self.records.numpy()[:] = rows


def _starts(counts: Sequence[int]) -> tuple[Tensor, int]:
    """Exclusive cumulative sums, and the total."""
    ends = np.cumsum(counts)
    return torch.from_numpy((ends - counts).astype(np.int32)), int(ends[-1])


@lru_cache(maxsize=16)
def _levels(settings: PixelSettings, dtype: torch.dtype) -> Tensor:
    """``[3 * 256]`` normalised value of each level of each channel, as integers of the same bits."""
    mean, std = mean_and_std(settings, torch.uint8)
    values = ((torch.arange(256.0) - mean) / std).to(dtype)
    return values.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).flatten()
