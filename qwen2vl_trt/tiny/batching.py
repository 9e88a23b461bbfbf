"""Scenes to tensors: pixels in window order, token ids, M-RoPE positions, and where answers are predicted.

Letters: B scenes, S tokens of the longest, P patches of all pictures, W windows, n answer tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from torch import Tensor

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.mrope import rope_index
from qwen2vl_trt.runtime.preprocessing.settings import smart_resize
from qwen2vl_trt.windows import Grid, UnpaddedLayout, unpad, window_layout

from .scenes import Pixels, Scene
from .tokenizer import CHAT_TEMPLATE, END_OF_TEXT, IM_END, MAX_PIXELS, MIN_PIXELS, special_id


class Patches(NamedTuple):
    """All patches of a batch without padding.

    Training runs the linear layers on patches alone: half of the slots of small pictures' windows would be empty.

    Attributes:
        pixels: ``[P, qwen2_vl_dim]`` uint8, in window order.
        layout: where they lie and how they gather.
    """

    pixels: Tensor
    layout: UnpaddedLayout


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        token_ids: ``[B, S]`` prompts and answers, padded on the right.
        position_ids: ``[3, B, S]``.
        patches: the pictures' patches; None without any picture.
        vision_index: ``[T]`` where in ``B * S`` each vision token stands.
        predict_index: ``[n]`` where in ``B * S`` an answer token is predicted.
        targets: ``[n]`` the answer tokens.
        target_rows: ``[n]`` scene of each target.
    """

    token_ids: Tensor
    position_ids: Tensor
    patches: Patches | None
    vision_index: Tensor
    predict_index: Tensor
    targets: Tensor
    target_rows: Tensor


class Collator:
    """Turns scenes into batches with the checkpoint's tokenizer and chat template."""

    def __init__(self, config: Qwen2VLConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
        self.end = special_id(tokenizer, IM_END)
        self.padding = special_id(tokenizer, END_OF_TEXT)
        self._prompts: dict[str, list[int]] = {}

    def prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, one placeholder a picture."""
        key = json.dumps(messages)
        if key not in self._prompts:
            text = self.template.render(messages=messages, add_generation_prompt=True)
            self._prompts[key] = self.tokenizer.encode(text).ids
        return self._prompts[key]

    def patches(self, frames: Sequence[Pixels]) -> tuple[Tensor, Grid]:
        """Cut an image (one frame) or a video into patches ``[t, h * w, qwen2_vl_dim]`` uint8 in raster order."""
        vision = self.config.vision
        size, temporal = vision.patch_size, vision.temporal_patch_size
        pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)  # [frames, 3, height, width]
        height, width = smart_resize(pixels.shape[2], pixels.shape[3], vision.image_factor, MIN_PIXELS, MAX_PIXELS)
        if pixels.shape[2:] != (height, width):
            pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
        if len(frames) % temporal:
            pixels = torch.cat([pixels, pixels[-1:].expand(temporal - len(frames) % temporal, -1, -1, -1)])
        grid = (len(pixels) // temporal, height // size, width // size)
        parts = pixels.reshape(grid[0], temporal, 3, grid[1], size, grid[2], size).permute(0, 3, 5, 2, 1, 4, 6)
        return parts.reshape(grid[0], grid[1] * grid[2], -1), grid

    def __call__(
        self,
        scenes: Sequence[Scene],
        answers: Sequence[list[int]] | None = None,
        reaching: Sequence[bool] | None = None,
    ) -> Batch:
        """Lay out a batch.

        Args:
            scenes: the scenes.
            answers: token ids to take for the scenes' answers, in place of the right ones and an end token.
            reaching: per scene, whether text after a video resumes beyond the video's last time step (the published
                models' way, the default) or beyond its height and width only (Transformers 5's way).
        """
        merge_unit = self.config.vision.merge_unit
        rows: list[list[int]] = []
        positions: list[Tensor] = []
        frames: list[Tensor] = []
        grids: list[Grid] = []
        predict: list[tuple[int, int]] = []  # row, column
        targets: list[int] = []
        for number, scene in enumerate(scenes):
            images = [self.patches([image]) for image in scene.images]
            videos = [self.patches(video) for video, _ in scene.videos]
            item = iter(images + videos)  # a scene has images or videos, never both
            ids: list[int] = []
            for token in self.prompt_ids(scene.messages):
                repeat = 1
                if token in (self.config.image_token_id, self.config.video_token_id):
                    patches, grid = next(item)
                    frames += patches.unbind(0)
                    grids.append(grid)
                    repeat = math.prod(grid) // merge_unit
                ids += [token] * repeat
            answer = answers[number] if answers else [*self.tokenizer.encode(scene.answer).ids, self.end]
            predict += [(number, column) for column in range(len(ids) - 1, len(ids) - 1 + len(answer))]
            targets += answer
            ids += answer
            seconds = [self.config.vision.temporal_patch_size / fps for _, fps in scene.videos]
            position, _ = rope_index(ids, self.config, [g for _, g in images], [g for _, g in videos], seconds)
            if videos and reaching is not None and not reaching[number]:
                last = max(i for i, token in enumerate(ids) if token == self.config.video_token_id)
                position = position.clone()
                position[:, last + 1 :] += position[1:, : last + 1].max() - position[:, : last + 1].max()
            rows.append(ids)
            positions.append(position)
        length = max(map(len, rows))
        token_ids = torch.full((len(rows), length), self.padding)
        position_ids = torch.zeros(3, len(rows), length, dtype=torch.int64)
        for number, (ids, position) in enumerate(zip(rows, positions, strict=True)):
            token_ids[number, : len(ids)] = torch.tensor(ids)
            position_ids[:, number, : len(ids)] = position
        flat = token_ids.flatten()
        vision = (flat == self.config.image_token_id) | (flat == self.config.video_token_id)
        return Batch(
            token_ids=token_ids,
            position_ids=position_ids,
            patches=self._pack(frames, tuple(grids)) if grids else None,
            vision_index=vision.nonzero().squeeze(1),
            predict_index=torch.tensor([row * length + column for row, column in predict]),
            targets=torch.tensor(targets),
            target_rows=torch.tensor([row for row, _ in predict]),
        )

    def _pack(self, frames: list[Tensor], grids: tuple[Grid, ...]) -> Patches:
        vision = self.config.vision
        side = vision.window_groups * vision.spatial_merge_size
        layout = window_layout(grids, vision, max(min(h, side) * min(w, side) for _, h, w in grids))
        unpadded = unpad(layout, vision)
        raster = torch.zeros(*layout.sequence_index.shape, vision.qwen2_vl_dim, dtype=torch.uint8)
        for number, patches in enumerate(frames):
            raster[number, : len(patches)] = patches
        return Patches(raster.flatten(0, 1)[layout.sequence_position.flatten()[unpadded.filled]], unpadded)
