"""Fields of ``config.json`` that nobody reads because they leave the answer alone, and the values for which they do.

Collected from the published checkpoints, from what Transformers 4.49 to 5.17 writes (``save_pretrained`` and
``to_dict``), and from fine-tuning tools. A field with None is harmless whatever its value.
"""

from __future__ import annotations

from typing import Any

Harmless = dict[str, tuple[Any, ...] | None]

GENERATION_FIELDS = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
"""Transformers 4 took these from ``config.json`` too; they count where there is no ``generation_config.json``."""

_DTYPES = (None, "auto", "bfloat16", "float16", "float32", "float64")
"""In which the weights were saved; the safetensors say it themselves. Nobody computes in the others as they are."""

_ANYWHERE: Harmless = dict.fromkeys(
    [
        # What Transformers writes into every configuration.
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "keys_to_ignore_at_inference",
        "label2id",
        "model_type",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_word_embeddings",  # of the whole model and of the decoder: read by hand
        "tokenizer_class",
        "torchscript",
        "transformers_version",
        "use_bfloat16",
        "use_cache",
        # For training alone.
        "attention_dropout",
        "gradient_checkpointing",
        "hidden_dropout",
        # Marks of tools.
        "unsloth_fixed",
        "unsloth_version",
    ]
)
_ANYWHERE |= dict.fromkeys(GENERATION_FIELDS)
_ANYWHERE |= {
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

VISION: Harmless = _ANYWHERE | dict.fromkeys(["spatial_patch_size"])

TEXT: Harmless = _ANYWHERE | dict.fromkeys(
    ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id"]
)

OUTER: Harmless = _ANYWHERE | dict.fromkeys(["quantization_config", "vision_token_id"])
"""``quantization_config`` is read by :mod:`qwen2vl_trt.quantization`."""
