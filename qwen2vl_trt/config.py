"""Model configuration, read from a checkpoint's ``config.json``.

Transformers 4 wrote the decoder's fields at the top level, Transformers 5 writes them under ``text_config``;
both are read. Nothing about a model's shape is written anywhere else in the project.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tower; field names are those of ``vision_config``."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...]
    in_chans: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    tokens_per_second: float = 4
    hidden_act: str = "silu"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def qwen2_vl_dim(self) -> int:
        """Values in one flattened patch, the width of the vision graph's input (1176 for every published size)."""
        return self.in_chans * self.patch_size**2 * self.temporal_patch_size

    @property
    def merge_unit(self) -> int:
        """Patches merged into one token."""
        return self.spatial_merge_size**2

    @property
    def window_groups(self) -> int:
        """Merge groups along one side of a full attention window."""
        return self.window_size // self.patch_size // self.spatial_merge_size

    @property
    def window_slots(self) -> int:
        """Patches in a full attention window."""
        return self.window_groups**2 * self.merge_unit

    @property
    def image_factor(self) -> int:
        """Pixels along one side of a merge group; image sides are rounded to multiples of it."""
        return self.patch_size * self.spatial_merge_size


@dataclass(frozen=True)
class TextConfig:
    """Shape of the decoder; field names are those of ``text_config``."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    rope_theta: float
    mrope_section: tuple[int, int, int]
    rms_norm_eps: float
    max_position_embeddings: int


@dataclass(frozen=True)
class Qwen2VLConfig:
    """A Qwen2.5-VL model: vision tower, decoder and the token ids that join them."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int | None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Qwen2VLConfig:
        """Read the content of ``config.json``.

        Raises:
            CheckpointError: another model type, a field missing, or sizes that contradict each other.
        """
        if raw.get("model_type") != "qwen2_5_vl":
            raise CheckpointError(
                f"config.json: model_type is {raw.get('model_type')!r}; only Qwen2.5-VL ('qwen2_5_vl') is supported"
            )
        try:
            return cls(
                vision=_vision_config(raw["vision_config"]),
                text=_text_config(raw),
                image_token_id=raw["image_token_id"],
                video_token_id=raw["video_token_id"],
                vision_start_token_id=raw["vision_start_token_id"],
                vision_end_token_id=raw.get("vision_end_token_id"),
            )
        except KeyError as missing:
            raise CheckpointError(f"config.json: field {missing} is missing") from None

    @classmethod
    def from_folder(cls, folder: str | Path) -> Qwen2VLConfig:
        """Read ``config.json`` of a checkpoint folder.

        Raises:
            CheckpointError: no readable ``config.json``, or not one of a Qwen2.5-VL.
        """
        path = Path(folder) / "config.json"
        if not path.exists():
            raise CheckpointError(f"{folder} is no checkpoint: it has no config.json")
        raw = read_json(path)
        try:
            return cls.from_dict(raw)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Content of one of a checkpoint's JSON files; empty where there is no such file.

    Raises:
        CheckpointError: the file cannot be read, or holds something other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _vision_config(raw: dict[str, Any]) -> VisionConfig:
    config = VisionConfig(
        depth=raw["depth"],
        hidden_size=raw["hidden_size"],
        num_heads=raw["num_heads"],
        intermediate_size=raw["intermediate_size"],
        out_hidden_size=raw["out_hidden_size"],
        fullatt_block_indexes=tuple(raw["fullatt_block_indexes"]),
        in_chans=raw.get("in_channels", raw.get("in_chans", 3)),
        **{
            name: raw[name]
            for name in (
                "patch_size",
                "temporal_patch_size",
                "spatial_merge_size",
                "window_size",
                "tokens_per_second",
                "hidden_act",
            )
            if name in raw
        },
    )
    if config.hidden_size % config.num_heads or config.head_dim % 4:
        raise CheckpointError(
            f"config.json: vision hidden_size {config.hidden_size} does not split into {config.num_heads} heads"
            " of a multiple of 4"
        )
    if config.window_size % config.image_factor:
        raise CheckpointError(
            f"config.json: window_size {config.window_size} is no multiple of patch_size * spatial_merge_size"
            f" = {config.image_factor}"
        )
    return config


def _text_config(raw: dict[str, Any]) -> TextConfig:
    text = raw.get("text_config") or raw
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    config = TextConfig(
        hidden_size=text["hidden_size"],
        num_hidden_layers=text["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=text["num_key_value_heads"],
        head_dim=head_dim,
        intermediate_size=text["intermediate_size"],
        vocab_size=text["vocab_size"],
        # Transformers 4 wrote the flag outside, some releases of 5 inside; either one ties, as in its own loader.
        tie_word_embeddings=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
        mrope_section=tuple(rope["mrope_section"]),
        rms_norm_eps=text["rms_norm_eps"],
        max_position_embeddings=text["max_position_embeddings"],
    )
    if heads % config.num_key_value_heads:
        raise CheckpointError(
            f"config.json: {heads} attention heads do not share {config.num_key_value_heads} key-value heads evenly"
        )
    if 2 * sum(config.mrope_section) != head_dim:
        raise CheckpointError(
            f"config.json: mrope_section {list(config.mrope_section)} must add up to half the head size {head_dim}"
        )
    return config
