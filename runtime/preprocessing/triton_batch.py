"""What ``triton_kernels`` is told about a batch: a record a frame, and tables they share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen2vl_trt.config import VisionConfig

from .bicubic import bicubic_table
from .frames import Frame, mean_and_std, window_rows_and_columns
from .settings import PixelSettings

_FIELDS = 24


class TritonBatch:
    """Records, tables and the sizes of both launches, for 8-bit frames.

    Args:
        frames: at least one.
        config: the vision tower.
        tile: rows and columns that one program of the horizontal pass does.
        dtype: of the patches.

    Attributes:
        records: ``[n, 24]`` int64, in the order that the kernels' module names; complete once :meth:`locate` has run.
        tables: int32, for each pair of sizes once: first places, then weights, tap after tap.
        levels: the bits of each normalised level, ``[3 * 256]`` for each normalisation.
        row_starts: int32, the first program of each frame in the horizontal pass, which some skip.
        row_programs: programs of that pass.
        window_starts: int32, the first window of each frame, counted through the batch.
        windows: of all frames.
        middle_bytes: between the passes.
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

    def locate(self, pixels: Sequence[Tensor], middle: Tensor) -> None:
        """Fill the records, now that it is known where everything lies.

        Args:
            pixels: the frames' on the device, of any strides.
            middle: ``[middle_bytes]`` there, what the horizontal pass fills.
        """
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
    """Where each begins if they follow each other, and where the last one ends."""
    ends = np.cumsum(counts)
    return torch.from_numpy((ends - counts).astype(np.int32)), int(ends[-1])


@lru_cache(maxsize=16)
def _levels(settings: PixelSettings, dtype: torch.dtype) -> Tensor:
    """``[3 * 256]`` what each level of each channel becomes, as whole numbers of the same bits."""
    mean, std = mean_and_std(settings, torch.uint8)
    values = ((torch.arange(256.0) - mean) / std).to(dtype)
    return values.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).flatten()
