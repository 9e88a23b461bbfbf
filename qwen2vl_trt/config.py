"""Model configuration, read from a checkpoint's ``config.json`` as Transformers 4 or 5 writes it.

A field that is neither read nor ignored (:data:`~qwen2vl_trt.schema.IGNORED_FIELDS`) is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from reprlib import repr as shown
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from .errors import CheckpointError
from .rope_scaling import TABLES, LinearScaling, Positions, Section, Theta, YarnScaling, read_rope
from .schema import IGNORED_FIELDS, convert, field_path, forbid_unknown_fields

FILE = "config.json"

# Ranges far beyond every published model, so that a wrong size is an error and no allocation.
Layers = Annotated[int, Meta(ge=1, le=1 << 10)]
Heads = Annotated[int, Meta(ge=1, le=1 << 10)]
Width = Annotated[int, Meta(ge=1, le=1 << 20)]
Vocabulary = Annotated[int, Meta(ge=1, le=1 << 24)]
Pixels = Annotated[int, Meta(ge=1, le=1 << 12)]
Few = Annotated[int, Meta(ge=1, le=1 << 6)]
Index = Annotated[int, Meta(ge=0, le=1 << 10)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 24)]


@dataclass(frozen=True)
class VisionConfig:
    """``vision_config``; defaults are Transformers', some releases of which write only what differs from them."""

    depth: Layers = 32
    hidden_size: Width = 3584
    num_heads: Heads = 16
    intermediate_size: Width = 3420
    out_hidden_size: Width = 3584
    fullatt_block_indexes: tuple[Index, ...] = (7, 15, 23, 31)
    in_chans: Few = 3
    patch_size: Pixels = 14
    temporal_patch_size: Few = 2
    spatial_merge_size: Few = 2
    window_size: Pixels = 112
    tokens_per_second: Annotated[float, Meta(gt=0, le=1e4)] = 4
    rope_theta: Theta = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def qwen2_vl_dim(self) -> int:
        """Values in one flattened patch; 1176 for every published size."""
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
    """``text_config``."""

    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_key_value_heads: Heads
    head_dim: Annotated[int, Meta(ge=2, le=1 << 12)]
    intermediate_size: Width
    vocab_size: Vocabulary
    tie_word_embeddings: bool
    rope_theta: Theta
    mrope_section: tuple[Section, Section, Section]
    rms_norm_eps: Annotated[float, Meta(ge=0, le=1)] = 1e-5
    max_position_embeddings: Positions = 32768
    rope_scaling: LinearScaling | YarnScaling | None = None


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
                f"{FILE}: model_type is {shown(raw.get('model_type'))}; only Qwen2.5-VL ('qwen2_5_vl') is supported"
            )
        tokens = convert(raw, _Tokens, FILE)
        config = cls(_vision_config(raw), _text_config(raw), **asdict(tokens))
        read = {*_TOKENS, "text_config", "vision_config", "quantization_config", *_TEXT_FIELDS}
        forbid_unknown_fields(raw, read, IGNORED_FIELDS | {"vision_token_id": None}, FILE)
        vision, text = config.vision, config.text
        if vision.out_hidden_size != text.hidden_size:
            raise CheckpointError(
                f"{FILE}: the vision tower's out_hidden_size {vision.out_hidden_size} is not the decoder's"
                f" hidden_size {text.hidden_size}"
            )
        if config.image_token_id == config.video_token_id:
            raise CheckpointError(f"{FILE}: image_token_id and video_token_id are both {config.image_token_id}")
        for name, token in asdict(tokens).items():
            if token is not None and token >= text.vocab_size:
                raise CheckpointError(f"{FILE}: {name} is {token}; the vocabulary has {text.vocab_size} tokens")
        return config

    @classmethod
    def from_folder(cls, folder: str | Path) -> Qwen2VLConfig:
        """Read ``config.json`` of a checkpoint folder.

        Raises:
            CheckpointError: no readable ``config.json``, or not one of a Qwen2.5-VL.
        """
        path = Path(folder) / FILE
        if not path.exists():
            raise CheckpointError(f"{folder} is no checkpoint: it has no {FILE}")
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
        content = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return {}
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


@dataclass(frozen=True)
class _Tokens:
    image_token_id: TokenId
    video_token_id: TokenId
    vision_start_token_id: TokenId
    vision_end_token_id: TokenId | None = None


_TOKENS = [field.name for field in fields(_Tokens)]


def _vision_config(raw: Mapping[str, Any]) -> VisionConfig:
    if "vision_config" not in raw:
        raise CheckpointError(f"{FILE}: field 'vision_config' is missing")
    place = field_path(FILE, ".vision_config")
    vision = convert(raw["vision_config"], dict[str, Any], place)
    names = {field.name for field in fields(VisionConfig)} - {"rope_theta"}
    read = {*names, "in_channels", "rope_parameters"}
    forbid_unknown_fields(vision, read, IGNORED_FIELDS | {"spatial_patch_size": None}, place)
    if vision.get("in_chans", vision.get("in_channels")) != vision.get("in_channels", vision.get("in_chans")):
        raise CheckpointError(f"{place}: in_channels and in_chans differ; keep one of them")
    rope_place, rope_type = f"{place}.rope_parameters", ("axial", "default")
    rope = convert(vision.get("rope_parameters") or {}, dict[str, Any], rope_place)
    forbid_unknown_fields(rope, {"rope_theta"}, {"rope_type": rope_type, "type": rope_type}, rope_place)
    given = {name: vision[name] for name in names if name in vision} | {
        name: value
        for name, value in (("in_chans", vision.get("in_channels")), ("rope_theta", rope.get("rope_theta")))
        if value is not None
    }
    config = convert(given, VisionConfig, place)
    beyond = [index for index in config.fullatt_block_indexes if index >= config.depth]
    if beyond and "fullatt_block_indexes" in given:  # Transformers' default is for its own depth
        raise CheckpointError(f"{place}: fullatt_block_indexes has {beyond[0]}; there are {config.depth} blocks")
    if config.hidden_size % config.num_heads or config.head_dim % 4:
        raise CheckpointError(
            f"{FILE}: vision hidden_size {config.hidden_size} does not split into {config.num_heads} heads"
            " of a multiple of 4"
        )
    if config.window_size % config.image_factor:
        raise CheckpointError(
            f"{FILE}: window_size {config.window_size} is no multiple of patch_size * spatial_merge_size"
            f" = {config.image_factor}"
        )
    return config


@dataclass(frozen=True)
class _SlidingWindow:
    """Transformers' fields and defaults."""

    use_sliding_window: bool | None = False
    sliding_window: Annotated[int, Meta(ge=0)] | None = 4096
    max_window_layers: Annotated[int, Meta(ge=0)] | None = 80
    layer_types: list[str] | None = None


@dataclass(frozen=True)
class _Attention:
    hidden_size: Width
    num_attention_heads: Heads
    num_key_value_heads: Heads | None
    head_dim: Width | None = None


_OF_TEXT = {field.name for field in fields(TextConfig)} - {"mrope_section", "rope_scaling"}
_TEXT_FIELDS = {*_OF_TEXT, *TABLES, *(field.name for field in fields(_SlidingWindow))}


def _text_config(raw: Mapping[str, Any]) -> TextConfig:
    if raw.get("text_config") in (None, {}):
        return _read_text(raw, FILE)
    place = field_path(FILE, ".text_config")
    text = convert(raw["text_config"], dict[str, Any], place)
    forbid_unknown_fields(text, _TEXT_FIELDS, IGNORED_FIELDS | dict.fromkeys([*_TOKENS, "vision_token_id"]), place)
    # Transformers 4 wrote the flag outside, some releases of 5 inside; either one ties, as in its own loader.
    tied = convert(raw.get("tie_word_embeddings"), bool | None, field_path(FILE, ".tie_word_embeddings"))  # type: ignore[arg-type]
    text |= {"tie_word_embeddings": True} if tied else {}
    config = _read_text(text, place)
    # Some releases of Transformers 4 wrote the decoder's fields in both places, and releases differ in which they read.
    for name in sorted(_TEXT_FIELDS & raw.keys()):
        if name != "tie_word_embeddings" and _read_text(text | {name: raw[name]}, FILE) != config:
            raise CheckpointError(f"{FILE}: {name} at the top level differs from text_config's; keep one of them")
    return config


def _read_text(text: Mapping[str, Any], place: str) -> TextConfig:
    _refuse_sliding_window(text, place)
    attention, rope = convert(text, _Attention, place), read_rope(text, place)
    heads = attention.num_attention_heads
    head_dim = attention.head_dim or attention.hidden_size // heads
    given = {name: text[name] for name in _OF_TEXT if text.get(name) is not None} | {
        "head_dim": head_dim,
        "num_key_value_heads": attention.num_key_value_heads or heads,
        "tie_word_embeddings": text.get("tie_word_embeddings") or False,
        "rope_theta": rope.rope_theta,
        "mrope_section": rope.mrope_section,
    }
    config = replace(convert(given, TextConfig, place), rope_scaling=rope.scaling)
    if attention.head_dim is None and attention.hidden_size % heads:
        raise CheckpointError(f"{place}: hidden_size {attention.hidden_size} does not split into {heads} heads")
    if heads % config.num_key_value_heads:
        raise CheckpointError(
            f"{place}: {heads} attention heads do not share {config.num_key_value_heads} key-value heads evenly"
        )
    if 2 * sum(config.mrope_section) != head_dim:
        raise CheckpointError(
            f"{place}: mrope_section {list(config.mrope_section)} must add up to half the head size {head_dim}"
        )
    return config


def _refuse_sliding_window(text: Mapping[str, Any], place: str) -> None:
    """Refuse sliding-window attention, which the graph does not have."""
    window = convert(text, _SlidingWindow, place)
    if window.layer_types is not None:
        other = next((kind for kind in window.layer_types if kind != "full_attention"), None)
        if other is not None:
            raise CheckpointError(f"{place}: layer_types has {shown(other)}; only 'full_attention' is supported")
    elif window.use_sliding_window and window.sliding_window is not None:
        first, layers = window.max_window_layers or 0, text.get("num_hidden_layers")
        if isinstance(layers, int) and first < layers:
            raise CheckpointError(
                f"{place}: use_sliding_window is true, with a sliding_window of {window.sliding_window} from layer"
                f" {first} on; only full attention is supported"
            )
