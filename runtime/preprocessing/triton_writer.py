"""Frames into windows with two launches for a whole batch of mixed sizes, whatever their number.

The horizontal pass and the vertical pass, which also normalises and writes the patches in window order, follow
:mod:`qwen2vl_trt.runtime.preprocessing.bicubic`; the normalised values are looked up among the 256 that a channel can
have. So the result equals the CPU's bit for bit, in FP32 and BF16.

Compiled for a GPU it has not run yet; tests run it on the CPU by Triton's interpreter.
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
from .staging import Staging, bytes_of

_MAX_FRAMES = 128
"""Of one launch: each of its programs looks through them all, and the compiler needs to know how many there can be."""


@dataclass(frozen=True)
class Tiles:
    """How much one program does.

    Attributes:
        rows: of a tile of the horizontal pass; like the others a power of 2.
        columns: of it.
        block: values of a window, of one temporal place.
    """

    rows: int = 4
    columns: int = 128
    block: int = 512


def triton_is_installed() -> bool:
    """Whether there is a Triton to import; PyTorch for CUDA brings it on Linux."""
    return importlib.util.find_spec("triton") is not None


class TritonWriter:
    """A :class:`~qwen2vl_trt.runtime.preprocessing.frames.FrameWriter` for 8-bit frames; others go to ``floats``.

    Args:
        config: the vision tower.
        staging: brings frames that are not there to its device.
        floats: writes the frames that are not uint8.
        tiles: how much one program does.

    Raises:
        MissingDependencyError: Triton is not installed.
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
        """Compile both kernels; raises whatever Triton does where it cannot, for lack of a C compiler for example."""
        config = self._config
        side = config.image_factor
        frame = Frame(torch.zeros(3, 1, 1, dtype=torch.uint8), (side, side), 0, slice(None), PixelSettings())
        self.write([frame], torch.empty(1, config.window_slots, config.qwen2_vl_dim, dtype=dtype, device=device))

    def write(self, frames: Sequence[Frame], pixel_values: Tensor) -> None:
        """Two launches, and as many again for every further 128 frames or ``staging.limit`` bytes."""
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
        described = [batch.records, batch.tables, batch.levels, batch.row_starts, batch.window_starts]
        middle = torch.empty(batch.middle_bytes, dtype=torch.uint8, device=device)
        with self._staging.slot(bytes_of(sources) + bytes_of(described)) as slot:
            batch.locate(slot.send(sources), middle)
            records, tables, levels, row_starts, window_starts = slot.send(described)
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
    """What the kernels are told about 8-bit frames: a record a frame, shared tables, the sizes of both launches.

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
