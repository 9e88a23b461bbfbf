"""What a checkpoint says about ending an answer.

Only the end-of-sequence and padding tokens are taken from ``generation_config.json``. Its sampling defaults
(temperature 1e-6 and repetition penalty 1.05 in the published checkpoints) are not: an answer is greedy unless
``SamplingParams`` says otherwise, so that the same request gives the same tokens with every checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2vl_trt.config import read_json
from qwen2vl_trt.errors import CheckpointError


@dataclass(frozen=True)
class GenerationConfig:
    """Tokens that end an answer (any of them), and the one that pads."""

    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    @classmethod
    def from_folder(cls, folder: str | Path, tokenizer: Any = None) -> GenerationConfig:
        """Read them from ``generation_config.json``, else from the tokenizer, else from ``config.json``.

        Args:
            folder: a checkpoint.
            tokenizer: anything with ``eos_token_id`` and ``pad_token_id``, as Transformers' tokenizers have.

        Raises:
            CheckpointError: a file is not readable, or none names an end-of-sequence token.
        """
        generation = read_json(Path(folder) / "generation_config.json")
        config = read_json(Path(folder) / "config.json")
        text = config.get("text_config") or {}
        eos = _first(
            generation.get("eos_token_id"),
            getattr(tokenizer, "eos_token_id", None),
            config.get("eos_token_id"),
            text.get("eos_token_id"),
        )
        ids = tuple(eos) if isinstance(eos, list) else (eos,)
        if not ids or not all(type(token) is int and token >= 0 for token in ids):
            raise CheckpointError(
                f"{folder}: eos_token_id is {eos!r}; generation_config.json, the tokenizer or config.json must name"
                " the token (or the tokens) that end an answer"
            )
        pad = _first(generation.get("pad_token_id"), getattr(tokenizer, "pad_token_id", None), ids[0])
        return cls(ids, pad)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
