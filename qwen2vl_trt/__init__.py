"""Qwen2.5-VL as two TensorRT engines, and on the same ONNX graph other backends.

The modules here are the model, written once: configuration, checkpoint, vision tower, decoder, positions, prompts.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    BatchError,
    BenchmarkError,
    BuildError,
    CheckpointError,
    CompareError,
    DeadlineError,
    EngineError,
    ExecutionError,
    FeaturesError,
    LimitError,
    MediaError,
    MissingDependencyError,
    PlanError,
    PromptError,
    Qwen2VLError,
    SamplingError,
    UnavailableError,
)
from .telemetry import opt_out

if TYPE_CHECKING:
    from .runtime import (
        Answer,
        Counters,
        Event,
        ImageOptions,
        MediaSize,
        Output,
        Pipeline,
        PipelineOptions,
        Request,
        SamplingParams,
        Service,
        Timings,
        Video,
        VideoOptions,
    )

__all__ = [
    "Answer",
    "BatchError",
    "BenchmarkError",
    "BuildError",
    "CheckpointError",
    "CompareError",
    "Counters",
    "DeadlineError",
    "EngineError",
    "Event",
    "ExecutionError",
    "FeaturesError",
    "ImageOptions",
    "LimitError",
    "MediaError",
    "MediaSize",
    "MissingDependencyError",
    "Output",
    "Pipeline",
    "PipelineOptions",
    "PlanError",
    "PromptError",
    "Qwen2VLError",
    "Request",
    "SamplingError",
    "SamplingParams",
    "Service",
    "Timings",
    "UnavailableError",
    "Video",
    "VideoOptions",
]
__version__ = "0.1.0"

# At import, which no other module does anything at: ONNX Runtime and others look when they are imported themselves, and
# every package of the project imports this one before them (tests/test_telemetry.py).
opt_out()


def __getattr__(name: str) -> Any:
    """What :mod:`qwen2vl_trt.runtime` exports, imported when it is asked for: it takes PyTorch's seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("qwen2vl_trt.runtime"), name)
