"""Options of single backends, beyond what every backend takes."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from qwen2vl_trt.config import TextConfig
from qwen2vl_trt.errors import BuildError

from .profile import BuildProfile

ATTENTION_MASKS = ("explicit", "lengths")
"""A mask that a network makes itself, or TensorRT's own lengths and causal kind; see ``engines/lowering.py``."""
EITHER_MASK = "either"
"""A decoder of each kind is built, and the runner tries which one it can take."""
LENGTHS_PLAN = "decoder-lengths"
"""Name of the second one's files."""
HARDWARE_COMPATIBILITY = ("none", "ampere_plus", "same_compute_capability")
VISION_BACKENDS = ("torch", "tensorrt")
_MAX_NUM_TOKENS = 8192  # TensorRT-LLM's own default


@dataclass(frozen=True)
class TensorRTOptions:
    """Names are TensorRT's.

    Attributes:
        builder_optimization_level: 0 builds fastest, 5 searches longest; TensorRT's own default where None.
        strip_weights: leave the weights out of the plan; the runner takes them from the checkpoint. TensorRT only.
        weight_streaming: let the runner keep part of the weights in host memory.
        hardware_compatibility: GPUs other than the one that builds; TensorRT only.
        compute_capabilities: GPUs to build for, ``8.9``; TensorRT for RTX only, its own default where empty.
        attention_mask: one of :data:`ATTENTION_MASKS`, or :data:`EITHER_MASK`.

    Raises:
        BuildError: a value that TensorRT has no meaning for.
    """

    builder_optimization_level: int | None = None
    strip_weights: bool = False
    weight_streaming: bool = False
    hardware_compatibility: str = "none"
    compute_capabilities: tuple[str, ...] = ()
    attention_mask: str = ATTENTION_MASKS[0]

    def __post_init__(self) -> None:
        level = self.builder_optimization_level
        if level is not None and not 0 <= level <= 5:
            raise BuildError(f"--builder-optimization-level is {level}; it goes from 0 to 5")
        _check_choice("--hardware-compatibility", self.hardware_compatibility, HARDWARE_COMPATIBILITY)
        _check_choice("--attention-mask", self.attention_mask, (*ATTENTION_MASKS, EITHER_MASK))
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", capability):
                raise BuildError(f"--compute-capabilities {capability!r} is not of the form 8.9")

    def as_dict(self) -> dict[str, Any]:
        """Those that differ from the defaults, as JSON holds them."""
        defaults = asdict(TensorRTOptions())
        values = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


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
        _check_choice("--vision-backend", self.vision_backend, VISION_BACKENDS)

    def as_dict(self) -> dict[str, Any]:
        """What the manifest records, with what the installed release takes images as (``vision``)."""
        from .tensorrt_llm_api import vision_input

        return {"tp_size": self.tp_size, "vision": vision_input(), "vision_backend": self.vision_backend} | (
            {} if self.max_num_tokens is None else {"max_num_tokens": self.max_num_tokens}
        )

    def tokens_per_step(self, profile: BuildProfile) -> int:
        """``max_num_tokens`` as TensorRT-LLM gets it.

        Raises:
            BuildError: it holds no prompt of ``max_input_len``, which is read in one step.
        """
        if self.max_num_tokens is None:
            return max(_MAX_NUM_TOKENS, profile.max_input_len)
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


BackendOptions = TensorRTOptions | TensorRTLLMOptions


def _check_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise BuildError(f"unknown {option} {value!r}; known: {', '.join(known)}")
