"""What the backends without a compiler of their own build: see ``builder`` of :mod:`qwen2vl_trt.engines.backends`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwen2vl_trt.errors import BuildError
from qwen2vl_trt.export.blocked_weights import WeightOnly
from qwen2vl_trt.export.onnx_model import check_fit, export_onnx, model_graphs
from qwen2vl_trt.export.weights import link_checkpoint

from .backends import TENSORRT, BuildJob
from .options import TensorRTLLMOptions
from .tensorrt_build import build_plans
from .tensorrt_llm_api import EMBEDDINGS, vision_input


def build_torch(job: BuildJob) -> list[Path]:
    """The torch engine is the checkpoint itself; the limits are recorded so that every backend refuses the same."""
    check_fit(job.checkpoint, model_graphs(job.checkpoint, job.precision.vision, job.precision.decoder))
    job.on_step("linking weights")
    link_checkpoint(job.checkpoint, job.folder)
    return []


def build_onnxruntime(job: BuildJob) -> list[Path]:
    """The two graphs as they are; the capacity of the cache stays dynamic (``export.graphs.decoder_graph``)."""
    numbers = job.precision.weight_only
    # FP4 has no kernel on a CPU; lm_head in FP32 would be most of what a step of a model in 4 bits reads.
    weight_only = WeightOnly(numbers, head=True, tensorrt=False) if numbers else None
    return export_onnx(job.checkpoint, job.folder, job.precision.vision, on_step=job.on_step, weight_only=weight_only)


def build_tensorrt_llm(job: BuildJob) -> list[Path]:
    """TensorRT-LLM loads the checkpoint itself; ``check_fit`` asks its own weight mapper for the names."""
    options = job.backend.options
    assert isinstance(options, TensorRTLLMOptions)
    options.check_model(job.checkpoint.config.text)
    if job.checkpoint.format is not None:
        raise BuildError(
            f"{job.checkpoint.folder} is quantised ({job.checkpoint.format.method}), which TensorRT-LLM would load by"
            " itself and is not checked here: take the unquantised checkpoint, or --backend tensorrt"
        )
    options.tokens_per_step(job.profile)
    build_torch(job)
    if options.vision_backend == "torch":
        return []
    if vision_input() != EMBEDDINGS:
        raise BuildError(
            f"--vision-backend {options.vision_backend} needs a TensorRT-LLM that takes embeddings; this one runs its"
            " own vision tower. Leave the option out, or install a release with PreprocessedInputs."
        )
    return build_plans(replace(job, backend=TENSORRT), engines=("vision",))
