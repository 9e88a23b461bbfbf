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
    from .media_options import ImageOptions, VideoOptions
    from .runtime.inputs.video import Video
    from .runtime.options import PipelineOptions
    from .runtime.pipeline import Pipeline
    from .runtime.preprocessing.sizes import MediaSize
    from .runtime.request import Event, Output, Request, Timings, TokenLogprobs
    from .runtime.sampling_params import SamplingParams
    from .runtime.scheduling.executor import Counters
    from .runtime.service import Answer, Service
    from .runtime.structured_outputs import StructuredOutputsParams
    from .runtime.tool_calls import ToolCall, ToolCallParser, parse_tool_calls, tool_call_grammar

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
    "StructuredOutputsParams",
    "Timings",
    "TokenLogprobs",
    "ToolCall",
    "ToolCallParser",
    "UnavailableError",
    "Video",
    "VideoOptions",
    "parse_tool_calls",
    "tool_call_grammar",
]
__version__ = "0.1.0"

# At import, which no other module does anything at: ONNX Runtime and others look when they are imported themselves, and
# every package of the project imports this one before them (tests/test_telemetry.py).
opt_out()

_MODULES = {
    "Answer": "runtime.service",
    "Counters": "runtime.scheduling.executor",
    "Event": "runtime.request",
    "ImageOptions": "media_options",
    "MediaSize": "runtime.preprocessing.sizes",
    "Output": "runtime.request",
    "Pipeline": "runtime.pipeline",
    "PipelineOptions": "runtime.options",
    "Request": "runtime.request",
    "SamplingParams": "runtime.sampling_params",
    "Service": "runtime.service",
    "StructuredOutputsParams": "runtime.structured_outputs",
    "Timings": "runtime.request",
    "TokenLogprobs": "runtime.request",
    "ToolCall": "runtime.tool_calls",
    "ToolCallParser": "runtime.tool_calls",
    "Video": "runtime.inputs.video",
    "VideoOptions": "media_options",
    "parse_tool_calls": "runtime.tool_calls",
    "tool_call_grammar": "runtime.tool_calls",
}


def __getattr__(name: str) -> Any:
    """A class of the library, imported when it is asked for: it takes PyTorch's seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
