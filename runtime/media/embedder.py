"""From images and videos to embeddings: preprocessor and vision engine, within the engine's limits."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.windows import Grid, WindowLayout, window_layout

from ..backends.runners import VisionRunner
from ..observer import Observer, Stage, unobserved
from ..preprocessing.preprocessor import PackedPixels, Preprocessor
from ..preprocessing.sizes import Medium

_CALL_PAIRS = 4096**2
"""Pairs of patches that take as long as a call does besides: full attention of 0.3 TFLOP, about 1 ms on a large GPU."""

_MOST_CPU_PATCHES = 512
"""Of several images in a call on a CPU. With ONNX Runtime, 3B's widths and one thread, eight images of 256 patches took
14% longer together than one by one, eight of 64 patches 10% less."""


@dataclass
class StageTimes:
    """Seconds spent in the preprocessor and in the vision engine."""

    preprocess: float = 0.0
    vision: float = 0.0


class MediaEmbedder:
    """Preprocesses and embeds, in as few calls of the vision engine as its profile allows."""

    def __init__(
        self,
        preprocessor: Preprocessor,
        runner: VisionRunner,
        profile: BuildProfile,
        config: VisionConfig,
        observe: Observer = unobserved,
        most_tokens: int | None = None,
    ) -> None:
        self.preprocessor, self._runner, self._profile, self._config = preprocessor, runner, profile, config
        self._most_patches = math.inf if most_tokens is None else most_tokens * config.merge_unit
        self._observe, self._padded = observe, runner.padded
        self._pixels: Tensor | None = None  # of the largest batch so far: free again once its engine call has returned

    def embed(self, media: Sequence[Medium]) -> tuple[list[Tensor], StageTimes]:
        """``[tokens, C]`` of each, any mix of sizes: images by :meth:`_groups`, and each video alone."""
        times = StageTimes()
        found: dict[int, Tensor] = {}
        images = [number for number, medium in enumerate(media) if not medium.is_video]
        groups = self._groups([media[number].size.grid for number in images])
        calls = [[images[number] for number in group] for group in groups]
        calls += [[number] for number, medium in enumerate(media) if medium.is_video]
        for numbers in calls:
            packed = self._pack([media[number] for number in numbers], times)
            found |= zip(numbers, self._run(packed, times).split(packed.layout.tokens_per_item))
        return [found[number] for number in range(len(media))], times

    def _groups(self, grids: Sequence[Grid]) -> list[list[int]]:
        """Numbers of what each engine call embeds, shortest first: as few calls and as little padding as costs least.

        A call takes up to ``max_batch_size`` and ``most_tokens``, unless one has more, and no more pairs of patches
        than one image may have: full attention without a fused kernel takes memory for the square of the longest,
        times their number.
        """
        lengths = [rows * columns for _, rows, columns in grids]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        most = min(self._most_patches, _MOST_CPU_PATCHES if self.preprocessor.device.type == "cpu" else math.inf)
        best = [(0, 0)]  # cost of the first n, and where their last call begins
        for end, last in enumerate(order, 1):
            options, patches = [], 0
            for start in range(end - 1, max(end - self._profile.max_batch_size, 0) - 1, -1):
                pairs, patches = (end - start) * lengths[last] ** 2, patches + lengths[order[start]]
                if end - start > 1 and (pairs > self._profile.max_hw_dims**2 or patches > most):
                    break
                options.append((best[start][0] + _CALL_PAIRS + (pairs if self._padded else 0), start))
            best.append(min(options))
        groups, end = [], len(order)
        while end:
            groups.append(order[best[end][1] : end])
            end = best[end][1]
        return groups[::-1]

    def _pack(self, media: Sequence[Medium], times: StageTimes) -> PackedPixels:
        began = time.perf_counter()
        with self._observe(Stage("preprocess")):
            packed = self.preprocessor.pack(media, self._pixels)
        if self._pixels is None or packed.pixel_values.numel() > self._pixels.numel():
            self._pixels = packed.pixel_values.view(-1)
        times.preprocess += time.perf_counter() - began
        return packed

    def _run(self, packed: PackedPixels, times: StageTimes) -> Tensor:
        """One call, or several where the frames of a video are more than a call takes: they do not see each other."""
        began = time.perf_counter()
        frames = [(1, h, w) for t, h, w in packed.grids for _ in range(t)]
        groups = self._groups(frames)
        if len(groups) == 1:
            embeds = self._call(packed.pixel_values, packed.layout)
        else:
            parts, window = [], 0
            for group in groups:
                layout = window_layout(tuple(frames[number] for number in group), self._config)
                windows = len(layout.window_lengths)
                parts.append(self._call(packed.pixel_values[window : window + windows], layout))
                window += windows
            embeds = torch.cat(parts)
        times.vision += time.perf_counter() - began
        return embeds

    def _call(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        with self._observe(Stage("vision")):
            return self._runner(pixel_values, layout)
