"""How TensorRT-LLM is asked to run the decoder, beyond what every backend takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen2vl_trt.config import TextConfig
from qwen2vl_trt.errors import BuildError

from .profile import BuildProfile
from .tensorrt_llm_api import vision_input

VISION_BACKENDS = ("torch", "tensorrt")
DEFAULT_MAX_NUM_TOKENS = 8192
"""TensorRT-LLM's own."""


@dataclass(frozen=True)
class TensorRTLLMOptions:
    """Names are TensorRT-LLM's, but for ``vision_backend``.

    Attributes:
        tp_size: GPUs that share each layer (``tensor_parallel_size``).
        max_num_tokens: most tokens of all requests in one step; by default TensorRT-LLM's 8,192, or as many as a
            prompt may have.
        vision_backend: that runs the vision engine, where the installed TensorRT-LLM takes embeddings.

    Raises:
        BuildError: a value without meaning.
    """

    tp_size: int = 1
    max_num_tokens: int | None = None
    vision_backend: str = "torch"

    def __post_init__(self) -> None:
        if self.tp_size < 1:
            raise BuildError(f"--tp-size is {self.tp_size}; it must be at least 1")
        if self.vision_backend not in VISION_BACKENDS:
            raise BuildError(f"unknown --vision-backend {self.vision_backend!r}; known: {', '.join(VISION_BACKENDS)}")

    def as_dict(self) -> dict[str, Any]:
        """What the manifest records, with what the installed release takes images as (``vision``)."""
        return {"tp_size": self.tp_size, "vision": vision_input(), "vision_backend": self.vision_backend} | (
            {} if self.max_num_tokens is None else {"max_num_tokens": self.max_num_tokens}
        )

    def tokens_per_step(self, profile: BuildProfile) -> int:
        """``max_num_tokens`` as TensorRT-LLM gets it.

        Raises:
            BuildError: it holds no prompt of ``max_input_len``, which is read in one step.
        """
        if self.max_num_tokens is None:
            return max(DEFAULT_MAX_NUM_TOKENS, profile.max_input_len)
        if self.max_num_tokens < profile.max_input_len:
            raise BuildError(
                f"--max-num-tokens {self.max_num_tokens:,} is below --max-input-len {profile.max_input_len:,}:"
                " TensorRT-LLM reads a prompt in one step. Raise the one or lower the other."
            )
        return self.max_num_tokens

    def check_model(self, config: TextConfig) -> None:
        """See whether TensorRT-LLM runs the model as it is, and each GPU gets a whole number of heads.

        Raises:
            BuildError: it does not; the message names the sizes that do.
        """
        if config.rope_scaling is not None:
            # It reads config.json itself, and takes the type of the scaling for the kind of the positions.
            raise BuildError(
                "the model's rotary positions are scaled (rope_scaling), which is not for backend tensorrt-llm; run it"
                " with another backend"
            )
        parts = {
            "attention heads": config.num_attention_heads,
            "key-value heads": config.num_key_value_heads,
            "columns of the MLP": config.intermediate_size,
        }
        uneven = [f"{count:,} {what}" for what, count in parts.items() if count % self.tp_size]
        if uneven:
            most = config.num_key_value_heads
            sizes = [str(n) for n in range(1, most + 1) if not any(count % n for count in parts.values())]
            raise BuildError(
                f"--tp-size {self.tp_size} does not divide this model's {' and '.join(uneven)}; {', '.join(sizes)}"
                f" {'does' if len(sizes) == 1 else 'do'}"
            )
