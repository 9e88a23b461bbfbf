"""How TensorRT is asked to build, beyond what every backend takes."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from qwen2vl_trt.errors import BuildError

from .attention_mask import ATTENTION_MASKS

HARDWARE_COMPATIBILITY = ("none", "ampere_plus", "same_compute_capability")


@dataclass(frozen=True)
class TensorRTOptions:
    """Names are TensorRT's.

    Attributes:
        builder_optimization_level: 0 builds fastest, 5 searches longest; TensorRT's own default where None.
        strip_weights: leave the weights out of the plan; the runner takes them from the checkpoint. TensorRT only.
        weight_streaming: let the runner keep part of the weights in host memory.
        hardware_compatibility: GPUs other than the one that builds; TensorRT only.
        compute_capabilities: GPUs to build for, ``8.9``; TensorRT for RTX only, its own default where empty.
        attention_mask: how attention is told which keys there are, see :mod:`qwen2vl_trt.engines.attention_mask`.

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
        if self.hardware_compatibility not in HARDWARE_COMPATIBILITY:
            raise BuildError(
                f"unknown --hardware-compatibility {self.hardware_compatibility!r}; known:"
                f" {', '.join(HARDWARE_COMPATIBILITY)}"
            )
        if self.attention_mask not in ATTENTION_MASKS:
            raise BuildError(f"unknown --attention-mask {self.attention_mask!r}; known: {', '.join(ATTENTION_MASKS)}")
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", capability):
                raise BuildError(f"--compute-capabilities {capability!r} is not of the form 8.9")

    def as_dict(self) -> dict[str, Any]:
        """Those that differ from the defaults, as JSON holds them."""
        defaults = asdict(TensorRTOptions())
        values = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
