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

import torch
from torch import Tensor

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.errors import MissingDependencyError

from .frames import Frame, FrameWriter, chunks
from .settings import PixelSettings
from .staging import Staging, bytes_of
from .triton_batch import TritonBatch

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
