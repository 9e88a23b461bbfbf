"""A checkpoint's default sampling settings and end-of-sequence tokens.

Defaults are those of Transformers' ``generate``: greedy unless ``do_sample`` is true, and then temperature 1 and top-k
50. (vLLM samples whenever a temperature is above 0, without top-k.) A field that changes answers and is not implemented
is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from reprlib import repr as shown
from typing import Annotated, Any, Literal

from msgspec import Meta

from qwen2vl_trt.config import read_json
from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.schema import GENERATION_FIELDS, IgnoredFields, convert, forbid_unknown_fields

from .sampling_params import PENALTIES, SamplingParams

FILE = "generation_config.json"

_DEFAULT_TOP_K = 50


@dataclass(frozen=True)
class _Sampling:
    """Transformers' fields that are read."""

    do_sample: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1e4)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=PENALTIES[0], le=PENALTIES[1])] | None = None
    max_new_tokens: Annotated[int, Meta(ge=1, lt=1 << 31)] | None = None
    stop_strings: Annotated[str, Meta(min_length=1)] | list[Annotated[str, Meta(min_length=1)]] | None = None

    def params(self) -> SamplingParams:
        top_k = _DEFAULT_TOP_K if self.do_sample and self.top_k is None else self.top_k
        return SamplingParams(
            max_tokens=self.max_new_tokens,
            temperature=(1.0 if self.temperature is None else self.temperature) if self.do_sample else 0.0,
            top_p=self.top_p,
            top_k=top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=self.stop_strings,  # type: ignore[arg-type]  # it takes a list or a string
        )


_NEUTRAL: IgnoredFields = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "constraints": (None, []),
    "diversity_penalty": (None, 0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1),
    "max_time": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0),
    "sequence_bias": (None, []),
    "suppress_tokens": (None, []),
    "token_healing": (None, False),
    "top_h": (None,),
    "typical_p": (None, 1),
    "watermarking_config": (None,),
}
"""Fields that are not implemented, with the values that disable them."""

_HARMLESS: IgnoredFields = _NEUTRAL | dict.fromkeys(
    """
    _commit_hash _from_model_config _name_or_path assistant_confidence_threshold assistant_early_exit
    assistant_ensemble_weight assistant_lookbehind bos_token_id cache_config cache_implementation compile_config
    continuous_batching_config decoder_start_token_id disable_compile early_stopping eos_token_id is_assistant
    length_penalty low_memory max_cache_len max_length max_matching_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule output_attentions output_hidden_states output_logits output_scores
    pad_token_id prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits
    return_dict_in_generate speculation_type target_lookbehind transformers_version unsloth_version use_cache
    use_mtp
    """.split()  # noqa: SIM905
)
"""``max_length``, of prompt and answer together, is ignored: max_new_tokens counts, as in vLLM."""


@dataclass(frozen=True)
class GenerationConfig:
    """End-of-sequence tokens, the padding token, and default sampling settings."""

    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    defaults: SamplingParams = field(default_factory=SamplingParams)

    @classmethod
    def from_folder(
        cls, folder: str | Path, tokenizer: Any = None, sampling: Literal["auto", "none"] = "auto"
    ) -> GenerationConfig:
        """Read ``generation_config.json``; tokens that it lacks come from the tokenizer, else from ``config.json``.

        Args:
            folder: a checkpoint.
            tokenizer: has ``eos_token_id`` and ``pad_token_id``.
            sampling: ``none`` reads the tokens alone.

        Raises:
            CheckpointError: an unreadable file, an invalid value, a field that is not implemented, or no
                end-of-sequence token.
        """
        path = Path(folder) / FILE
        generation = read_json(path)
        config = read_json(Path(folder) / "config.json")
        text = config.get("text_config")
        text = text if isinstance(text, dict) else {}
        eos = _first(
            generation.get("eos_token_id"),
            getattr(tokenizer, "eos_token_id", None),
            config.get("eos_token_id"),
            text.get("eos_token_id"),
        )
        ids = tuple(eos) if isinstance(eos, list) else (eos,)
        if not ids or not all(_is_token(token) for token in ids):
            raise CheckpointError(
                f"{folder}: eos_token_id is {shown(eos)}; generation_config.json, the tokenizer or config.json must"
                " name the token (or the tokens) that end an answer"
            )
        pad = _first(generation.get("pad_token_id"), getattr(tokenizer, "pad_token_id", None), ids[0])
        if not _is_token(pad):
            raise CheckpointError(f"{path}: pad_token_id is {shown(pad)}; it must be a token")
        if sampling == "none":
            return cls(ids, pad)
        if not path.exists():  # Transformers 4 wrote these fields into config.json
            outer = {name: value for name, value in {**text, **config}.items() if name in GENERATION_FIELDS}
            return cls(ids, pad, _defaults(outer, f"{folder}: config.json"))
        return cls(ids, pad, _defaults(generation, str(path)))


def _defaults(raw: dict[str, Any], place: str) -> SamplingParams:
    try:
        forbid_unknown_fields(raw, [each.name for each in fields(_Sampling)], _HARMLESS, place)
        return convert(raw, _Sampling, place).params()
    except CheckpointError as error:
        raise CheckpointError(f"{error}. --generation-config none leaves the checkpoint's sampling out") from None


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
