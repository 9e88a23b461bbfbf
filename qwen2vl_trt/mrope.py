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
from .rope_scaling import LinearScaling
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


def rotary_frequencies(config: TextConfig) -> tuple[Tensor, float]:
    """The decoder's rotary frequencies ``[D / 2]`` FP32, and the factor of their cosines and sines."""
    dim, theta = config.head_dim, config.rope_theta
    plain = inverse_frequencies(dim, theta)
    scaling, positions = config.rope_scaling, config.max_position_embeddings
    if scaling is None:
        return plain, 1.0
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor, 1.0
    # To the last bit as Transformers has it: at position 100,000 the last bit of a frequency is a visible angle.
    divided = 1.0 / (
        scaling.resolved_factor(positions) * theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    )
    first, last = scaling.ramp(dim, theta, positions)
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(0, 1)
    return divided * (1 - kept) + plain * kept, scaling.resolved_attention_factor(positions)


def rotary_cos_sin(
    position_ids: Tensor, inv_freq: Tensor, sections: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary angles: ``[3, B, S]`` positions to twice ``[B, S, D / 2]`` FP32.

    Args:
        position_ids: ``[3, B, S]`` time, height, width.
        inv_freq: ``[D / 2]`` FP32; this and ``scale`` are :func:`rotary_frequencies`'.
        sections: how many frequencies follow each axis (``mrope_section``).
        scale: of both.
    """
    parts = (position_ids[..., None].float() * inv_freq).split(list(sections), dim=-1)  # [3, B, S, section] each
    angles = torch.cat([section[axis] for axis, section in enumerate(parts)], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scale == 1 else (cos * scale, sin * scale)


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
    inv_freq, scale = rotary_frequencies(config)
    every = torch.cat([position_ids, generated.expand(3, -1)], dim=1)[:, None]
    table = torch.stack(rotary_cos_sin(every, inv_freq, config.mrope_section, scale), dim=-1)
    return found | {"mrope_rotary_cos_sin": table.reshape(1, -1)}
