"""M-RoPE: three position axes (time, height, width) for text, images and videos.

Positions follow Qwen2.5-VL's own definition: text counts on all three axes at once; a vision item starts one past
everything before it, its time axis advances by ``tokens_per_second * second_per_grid`` a frame (rounded down after
the multiplication), and what follows it resumes one past the largest position it used. Transformers 5 resumes
after ``max(h, w)`` even where a video's time axis reaches further, so long videos differ there from what the
published weights were trained with (and from Transformers 4, vLLM and TensorRT-LLM).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from .config import Qwen2VLConfig, TextConfig
from .errors import PromptError
from .layers import inverse_frequencies
from .windows import Grid


def rope_index(
    token_ids: Sequence[int],
    config: Qwen2VLConfig,
    image_grids: Sequence[Grid] = (),
    video_grids: Sequence[Grid] = (),
    second_per_grid_ts: Sequence[float] = (),
) -> tuple[Tensor, int]:
    """Positions of one prompt whose vision placeholders are already expanded.

    Args:
        token_ids: the prompt, S tokens.
        image_grids: ``(t, h, w)`` in patches of each image, in order of appearance.
        video_grids: the same of each video.
        second_per_grid_ts: seconds between two temporal grid rows of each video; 1.0 where not given.

    Returns:
        ``position_ids [3, S]`` int64, and the delta to add to a token's index to get its position from S on.

    Raises:
        PromptError: the placeholders do not add up to the grids, or there is no token.
    """
    merge = config.vision.spatial_merge_size
    images, videos = iter(image_grids), iter(zip(video_grids, second_per_grid_ts or [1.0] * len(video_grids)))
    vision_tokens = {config.image_token_id, config.video_token_id}
    parts: list[Tensor] = []
    position = 0
    for token, group in groupby(token_ids, key=lambda t: t if t in vision_tokens else None):
        count = len(list(group))
        if token is None:
            parts.append(torch.arange(position, position + count).expand(3, -1))
            position += count
            continue
        while count > 0:  # two items with nothing between them form one run of placeholders
            grid, seconds = (next(images, None), 0.0) if token == config.image_token_id else next(videos, (None, 0.0))
            if grid is None:
                raise PromptError("the prompt has more vision placeholders than images and videos")
            frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
            time = (torch.arange(frames) * (seconds * config.vision.tokens_per_second)).long()
            part = torch.stack(torch.meshgrid(time, torch.arange(rows), torch.arange(columns), indexing="ij"))
            parts.append(part.reshape(3, -1) + position)
            position = int(parts[-1].max()) + 1
            count -= frames * rows * columns
        if count < 0:
            raise PromptError("the prompt has fewer vision placeholders than its images and videos need")
    if next(images, None) is not None or next(videos, None) is not None:
        raise PromptError("the prompt has fewer vision placeholders than images and videos")
    if not parts:
        raise PromptError("the prompt has no tokens")
    position_ids = torch.cat(parts, dim=1)
    return position_ids, position - position_ids.shape[1]


def rotary_angles(position_ids: Tensor, inv_freq: Tensor, sections: Sequence[int]) -> Tensor:
    """Rotary angles in radians: ``[3, B, S]`` positions to ``[B, S, D / 2]`` FP32.

    Args:
        position_ids: ``[3, B, S]`` time, height, width.
        inv_freq: ``[D / 2]`` FP32.
        sections: how many frequencies follow each axis (``mrope_section``).
    """
    angles = position_ids[..., None].float() * inv_freq  # [3, B, S, D / 2]
    parts = angles.split(list(sections), dim=-1)
    return torch.cat([section[axis] for axis, section in enumerate(parts)], dim=-1)


def mrope_config(position_ids: Tensor, delta: int, config: TextConfig | None = None) -> dict[str, Tensor]:
    """TensorRT-LLM's ``mrope_config`` of one request, from the same positions.

    Args:
        position_ids: ``[3, S]`` of the prompt.
        delta: as :func:`rope_index` returns it.
        config: for the table that releases before 1.1 take; the later ones compute it on the GPU.

    Returns:
        ``mrope_position_ids [3, 1, S]`` int64 and ``mrope_position_deltas [1, 1]`` int32. With ``config`` also
        ``mrope_rotary_cos_sin [1, max_position_embeddings * D]`` FP32: for each position the cosine and sine of
        every frequency, interleaved (cos, sin); positions beyond the prompt continue with the delta.
    """
    found = {
        "mrope_position_ids": position_ids[:, None],
        "mrope_position_deltas": torch.tensor([[delta]], dtype=torch.int32),
    }
    if config is None:
        return found
    generated = torch.arange(position_ids.shape[1], config.max_position_embeddings) + delta
    angles = rotary_angles(
        torch.cat([position_ids, generated.expand(3, -1)], dim=1)[:, None],
        inverse_frequencies(config.head_dim, config.rope_theta),
        config.mrope_section,
    )
    return found | {"mrope_rotary_cos_sin": torch.stack([angles.cos(), angles.sin()], dim=-1).reshape(1, -1)}
