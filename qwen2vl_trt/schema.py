"""A checkpoint's JSON against declared types, and the fields of ``config.json`` that are ignored.

A wrong value is an error that names field, value and range. Types are annotations, with ``msgspec.Meta`` for a range.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from reprlib import repr as shown
from typing import Any, TypeVar

import msgspec

from .errors import CheckpointError

T = TypeVar("T")

_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_SHOWN = 60  # characters of a field's name in a message

IgnoredFields = dict[str, tuple[Any, ...] | None]
"""Fields that need not be read because they leave the answer alone, with the values for which they do; None: any."""

# fmt: off
GENERATION_FIELDS = frozenset((
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
))
"""Transformers 4 took these from ``config.json`` too; they count where there is no ``generation_config.json``."""

# Of published checkpoints, Transformers 4.49 to 5.17, and fine-tuning tools. tie_word_embeddings is read apart.
_IGNORED = (
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
    "_name_or_path", "architectures", "attn_implementation", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id", "eos_token_id", "finetuning_task", "id2label", "initializer_range",
    "keys_to_ignore_at_inference", "label2id", "model_type", "name_or_path", "output_attentions",
    "output_hidden_states", "pad_token_id", "prefix", "problem_type", "return_dict", "sep_token_id",
    "task_specific_params", "tf_legacy_loss", "tie_word_embeddings", "tokenizer_class", "torchscript",
    "transformers_version", "use_bfloat16", "use_cache",
    "attention_dropout", "gradient_checkpointing", "hidden_dropout",  # for training alone
    "unsloth_fixed", "unsloth_version",
)
# fmt: on

_DTYPES = (None, "auto", "bfloat16", "float16", "float32", "float64")
"""The weights' type, which the safetensors say themselves; another one, FP8 say, would be a way of computing."""

IGNORED_FIELDS: IgnoredFields = dict.fromkeys((*_IGNORED, *GENERATION_FIELDS)) | {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "dtype": _DTYPES,
    "hidden_act": ("silu", "swish"),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
    "torch_dtype": _DTYPES,
}
"""Of ``config.json``, at any level."""


def convert(raw: Any, kind: type[T], place: str) -> T:
    """A value of JSON as its declared type; fields that the type lacks are passed over.

    Raises:
        CheckpointError: another type, outside its range, or a field is missing; ``place`` is for the message, as
            ``config.json: vision_config``.
    """
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        path = path.removesuffix("`")
        missing = _MISSING.fullmatch(what)
        if missing:
            raise CheckpointError(f"{field_path(place, path)}: field {missing[1]!r} is missing") from None
        value = shown(_at(raw, path))
        raise CheckpointError(f"{field_path(place, path)} is {value}; {what[:1].lower()}{what[1:]}") from None


def forbid_unknown_fields(raw: Mapping[str, Any], read: Collection[str], ignored: IgnoredFields, place: str) -> None:
    """Refuse the fields of a JSON object at ``place`` that are neither read nor ignored.

    Raises:
        CheckpointError: such a field, or an ignored one with a value that may change the answer.
    """
    for name, value in raw.items():
        if name in read:
            continue
        if name not in ignored:
            raise CheckpointError(
                f"{field_path(place, '.' + name[:_SHOWN])} is not known and may change the answer;"
                " remove it if it does not"
            )
        allowed = ignored[name]
        if allowed is not None and value not in allowed:
            only = " or ".join(map(repr, allowed))
            raise CheckpointError(f"{field_path(place, '.' + name)} is {shown(value)}; only {only} is supported")


def field_path(place: str, path: str) -> str:
    """``config.json`` and ``.depth`` to ``config.json: depth``; ``config.json: a`` and ``.b[0]`` to ``... a.b[0]``."""
    return f"{place}: {path[1:]}" if path.startswith(".") and ": " not in place else place + path


def _at(raw: Any, path: str) -> Any:
    """The value at msgspec's path; what surrounds it where a path leads through the keys of an object."""
    for name, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", path):
        try:
            raw = raw[name] if name else raw[int(index)]
        except (KeyError, IndexError, TypeError):
            break
    return raw
