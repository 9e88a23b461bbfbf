"""From the two ONNX graphs to two TensorRT plans."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwen2vl_trt.errors import BuildError, reason
from qwen2vl_trt.export.blocked_weights import WeightOnly
from qwen2vl_trt.export.onnx_model import export_onnx
from qwen2vl_trt.files import atomic_file, atomic_write

from .backends import Backend, BuildJob
from .interrupts import deferred_interrupt
from .lowering import lower
from .onnx_file import read_onnx
from .options import ATTENTION_MASKS, EITHER_MASK, LENGTHS_PLAN, TensorRTOptions
from .precision import SINCE
from .progress import BuildSteps
from .tensorrt_callbacks import progress_monitor, stream_writer, tensorrt_log
from .tensorrt_profiles import Ranges, decoder_ranges, vision_ranges
from .tensorrt_refit import strip_weights

logger = logging.getLogger(__name__)

_FAMILIES = {"fp8": "Ada, Hopper, Blackwell", "nvfp4": "Blackwell"}
_LARGEST = {
    "vision": "--max-hw-dims or --max-batch-size",
    "decoder": "--max-seq-len, --max-input-len or --max-num-seqs",
}  # limits that an engine's memory grows with


def build_plans(job: BuildJob, engines: Collection[str] = ("vision", "decoder")) -> list[Path]:
    """Export both graphs and build plans of those that ``engines`` names; the graphs stay beside them.

    Returns:
        The files: two graphs, and for each engine its plan and the layers that TensorRT made of it.

    Raises:
        BuildError: no GPU where one is needed, a limit or an option that cannot be met, TensorRT's own reason with
            the node's name, or a full disk.
        CheckpointError: the weights do not fit the configuration.
    """
    trt, options = job.backend.load(), job.backend.options
    assert isinstance(options, TensorRTOptions)
    _check_machine(job.backend, options)
    if job.precision.name in SINCE and "decoder" in engines:
        _check_hardware(options, job.precision.name)
    ranges = {
        "vision": (vision_ranges(job.profile, job.checkpoint.config.vision),),
        "decoder": decoder_ranges(job.profile),
    }
    # A cache of dynamic length is refused by TensorRT, so the capacity is part of this graph.
    files = export_onnx(
        job.checkpoint,
        job.folder,
        job.precision.vision,
        job.profile.max_seq_len,
        job.on_step,
        decoder_dtype=job.precision.decoder,
        weight_only=WeightOnly(numbers, head=False, tensorrt=True) if (numbers := job.precision.weight_only) else None,
    )
    for graph in files[:]:
        if graph.stem in engines:
            either = options.attention_mask == EITHER_MASK
            kinds = {graph.stem: ATTENTION_MASKS[0] if either else options.attention_mask}
            if either and graph.stem == "decoder":
                kinds[LENGTHS_PLAN] = "lengths"
            for name, kind in kinds.items():
                job.on_step(f"building the {graph.stem} engine")
                chosen = replace(options, attention_mask=kind)
                try:
                    files += _build_plan(
                        trt, job.backend, graph, ranges[graph.stem], chosen, job.on_step, job.engine_dir, name
                    )
                except BuildError as error:
                    if name != LENGTHS_PLAN:
                        raise
                    logger.warning("%s. The decoder goes by explicit masks.", error)
    return files


def _check_machine(backend: Backend, options: TensorRTOptions) -> None:
    if not backend.builds_anywhere and not torch.cuda.is_available():
        raise BuildError(
            f"backend {backend.name} builds on the GPU that its engines will run on, and there is none here."
            " Build on that machine, or for RTX GPUs with --backend tensorrt-rtx, which needs none."
        )
    if backend.builds_anywhere and options.hardware_compatibility != "none":
        raise BuildError(
            f"--hardware-compatibility is not for {backend.name}: name the GPUs with --compute-capabilities"
        )
    if backend.builds_anywhere and options.strip_weights:
        raise BuildError(
            f"--strip-weights is not for {backend.name}: without a GPU it builds no plan that takes its weights"
            " later; leave the option out"
        )
    if not backend.builds_anywhere and options.compute_capabilities:
        raise BuildError(
            f"--compute-capabilities is not for {backend.name}, which builds for the GPU that is here; see"
            " --hardware-compatibility"
        )


def _check_hardware(options: TensorRTOptions, precision: str) -> None:
    """Refuse GPUs without a precision here: TensorRT would after minutes, in its own words."""
    since, name = SINCE[precision], precision.upper()
    wanted = list(options.compute_capabilities)
    if not wanted and torch.cuda.is_available():
        wanted = [".".join(map(str, torch.cuda.get_device_capability()))]
    for capability in wanted:
        if tuple(map(int, capability.split("."))) < since:
            raise BuildError(
                f"{name} needs a GPU of compute capability {'.'.join(map(str, since))} or newer"
                f" ({_FAMILIES[precision]}), not {capability}; --precision bf16 needs 8.0"
            )
    if options.hardware_compatibility == "ampere_plus":
        raise BuildError(f"--hardware-compatibility ampere_plus includes GPUs without {name}: same_compute_capability")


@dataclass(frozen=True)
class ParsedNetwork:
    """A parsed and lowered network, with all that must stay alive while it is built."""

    builder: Any
    network: Any
    parser: Any
    arrays: list[Any]


def parse(trt: Any, path: Path, attention_mask: str = ATTENTION_MASKS[0]) -> ParsedNetwork:
    """Parse an ONNX file, whose weights lie beside it, and repair what the parser gets wrong.

    Raises:
        BuildError: with TensorRT's own reason and the node's name.
    """
    log = tensorrt_log(trt)
    log.clear()
    builder = trt.Builder(log)
    network = builder.create_network(0)  # strongly typed, the only kind since TensorRT 11
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = "; ".join(map(_parser_reason, errors)) or "; ".join(log.errors) or "no reason given"
        raise BuildError(
            f"{path}: {trt.__name__} {trt.__version__} cannot parse it: {said}. Another release may; the onnxruntime"
            " and torch backends run the same model."
        )
    return ParsedNetwork(builder, network, parser, lower(trt, network, path, attention_mask))


def _parser_reason(error: Any) -> str:
    said = " ".join(error.desc().split())
    return f"node {error.node_name()} ({error.node_operator()}): {said}" if error.node_name() else said


def _build_plan(
    trt: Any,
    backend: Backend,
    path: Path,
    profiles: tuple[Ranges, ...],
    options: TensorRTOptions,
    steps: BuildSteps,
    engine_dir: Path,
    name: str,
) -> list[Path]:
    log, plan, layers = tensorrt_log(trt), path.with_name(f"{name}.engine"), path.with_name(f"{name}.layers")
    with deferred_interrupt() as interrupted:
        parsed = parse(trt, path, options.attention_mask)
        config = _configure(trt, parsed.builder, path, profiles, options)
        if options.strip_weights:
            strip_weights(trt, parsed.network, config, path)
        config.progress_monitor = monitor = progress_monitor(trt, steps, interrupted)
        cache = None
        if not backend.builds_anywhere:  # TensorRT for RTX times nothing: its timing cache does nothing
            cache = timing_cache_path(engine_dir, trt.__version__, torch.cuda.get_device_name())
            load_timing_cache(config, cache)
        log.clear()
        with atomic_file(plan) as temporary, temporary.open("wb") as file:
            writer = stream_writer(trt, file)
            built = parsed.builder.build_serialized_network_to_stream(parsed.network, config, writer)
            if writer.error is not None:
                raise writer.error
            if not built:
                said = "; ".join(log.errors) or "no reason given"
                raise BuildError(
                    f"{path.stem} engine: {trt.__name__} {trt.__version__} cannot build it: {said}. If it is memory"
                    f" or an attention without a kernel, lower {_LARGEST[path.stem]}."
                )
        del monitor  # alive until here
        if cache is not None:
            save_timing_cache(config, cache)
        atomic_write(layers, log.layers.encode())
    return [plan, layers]


def _configure(trt: Any, builder: Any, path: Path, profiles: tuple[Ranges, ...], options: TensorRTOptions) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and FP32 here means FP32, as it does in PyTorch
    # Without it a context asks for the memory of its profile's largest shapes, whatever shapes it is given.
    config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    if hasattr(
        trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"
    ):  # TensorRT for RTX captures nothing that it allocates itself
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.builder_optimization_level is not None:
        config.builder_optimization_level = options.builder_optimization_level
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.hardware_compatibility != "none":
        level = options.hardware_compatibility.upper()
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if options.compute_capabilities:
        _set_compute_capabilities(trt, config, options.compute_capabilities)
    with read_onnx(path) as model:
        inputs = model.graph.input
    for ranges in profiles:
        optimisation = builder.create_optimization_profile()
        for value in inputs:
            dims = [ranges.get(dim.dim_param, (dim.dim_value,) * 3) for dim in value.type.tensor_type.shape.dim]
            optimisation.set_shape(value.name, *zip(*dims))
        config.add_optimization_profile(optimisation)
    return config


def _set_compute_capabilities(trt: Any, config: Any, wanted: tuple[str, ...]) -> None:
    known = {name: getattr(trt.ComputeCapability, name) for name in dir(trt.ComputeCapability) if name[:2] == "SM"}
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        name = "SM" + capability.replace(".", "")
        if name not in known or not config.set_compute_capability(known[name], index):
            choices = sorted((key[2:-1] + "." + key[-1] for key in known), key=float)
            raise BuildError(f"{trt.__name__} {trt.__version__} builds for {', '.join(choices)}, not for {capability}")


def timing_cache_path(folder: Path, version: str, gpu: str) -> Path:
    """One file a TensorRT version and GPU, beside the engine folders, whichever models they hold."""
    return folder.parent / f".timing-cache-{version}-{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}"


def load_timing_cache(config: Any, path: Path) -> None:
    """Give a builder configuration the cache of earlier builds; an empty one where there is none or it is damaged."""
    try:
        kept = path.read_bytes()
    except OSError:
        kept = b""
    for content in (kept, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return
        logger.warning("%s is damaged and is not used; the build measures anew", path)


def save_timing_cache(config: Any, path: Path) -> None:
    """Write it back, atomically. A cache that cannot be written costs the next build time, not this one its engine."""
    try:
        atomic_write(path, memoryview(config.get_timing_cache().serialize()))
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, reason(error))
