"""M-RoPE: positions on three axes (time, height, width).

Text counts on all axes at once. An image or video starts one past everything before it; its time axis advances by
``tokens_per_second * second_per_grid`` a frame (product rounded down); what follows resumes one past its largest
position, as in training, Transformers 4, vLLM and TensorRT-LLM; Transformers 5 takes ``max(h, w)``, in long videos too.
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
    """Positions of one prompt.

    Args:
        token_ids: the prompt, S tokens, image and video tokens repeated.
        image_grids: ``(t, h, w)`` in patches of each image, in order of appearance.
        video_grids: the same of each video.
        second_per_grid_ts: seconds between two temporal grid rows of each video, by default 1.0.

    Returns:
        ``position_ids [3, S]`` int64, and the delta from a later token's index to its position.

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
        while count > 0:  # two adjacent items are one run of placeholders
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
    # Transformers' frequencies to the last bit, which is a visible angle at position 100,000.
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
        sections: ``mrope_section``, frequencies of each axis.
        scale: of cosines and sines.
    """
    parts = (position_ids[..., None].float() * inv_freq).split(list(sections), dim=-1)  # [3, B, S, section] each
    angles = torch.cat([section[axis] for axis, section in enumerate(parts)], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scale == 1 else (cos * scale, sin * scale)


def mrope_config(position_ids: Tensor, delta: int, config: TextConfig | None = None) -> dict[str, Tensor]:
    """TensorRT-LLM's ``mrope_config`` of one request.

    Args:
        position_ids: ``[3, S]`` of the prompt; this and ``delta`` are :func:`rope_index`'s.
        config: for the table that releases before 1.1 need.

    Returns:
        ``mrope_position_ids [3, 1, S]`` int64 and ``mrope_position_deltas [1, 1]`` int32. With ``config`` also
        ``mrope_rotary_cos_sin [1, max_position_embeddings * D]`` FP32, cosine and sine of every frequency interleaved
        for each position, those beyond the prompt included.
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
