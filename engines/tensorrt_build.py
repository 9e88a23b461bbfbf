"""From the two ONNX graphs to two TensorRT plans."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import BuildError
from qwen2vl_trt.files import atomic_file, atomic_write

from .attention_mask import ATTENTION_MASKS
from .interrupts import deferred_interrupt
from .lowering import lower
from .plan_file import stream_writer
from .precision import Precision
from .profile import BuildProfile
from .progress import BuildSteps
from .tensorrt_log import tensorrt_log
from .tensorrt_module import Variant, load_tensorrt
from .tensorrt_monitor import progress_monitor
from .tensorrt_options import TensorRTOptions
from .tensorrt_profiles import Ranges, decoder_ranges, vision_ranges
from .tensorrt_refit import strip_weights
from .timing_cache import load_timing_cache, save_timing_cache, timing_cache_path


def build_plans(
    variant: Variant,
    checkpoint: Checkpoint,
    folder: Path,
    precision: Precision,
    profile: BuildProfile,
    steps: BuildSteps,
    options: TensorRTOptions,
    engines: Collection[str] = ("vision", "decoder"),
    engine_dir: Path | None = None,
) -> list[Path]:
    """Export both graphs into a folder and build plans; the graphs stay beside them.

    Args:
        engines: those to build.
        engine_dir: that the files are for, where it is another folder: the timing cache is kept beside it.

    Returns:
        The files: two graphs, two plans, and for each plan the layers that TensorRT made of it.

    Raises:
        BuildError: no GPU where one is needed, a limit or an option that cannot be met, TensorRT's own reason with
            the node's name, or a full disk.
        CheckpointError: the weights do not fit the configuration.
    """
    from qwen2vl_trt.export.onnx_model import export_onnx  # seconds to import, and needed here alone

    trt = load_tensorrt(variant)
    _check_machine(variant, options)
    ranges = {
        "vision": (vision_ranges(profile, checkpoint.config.vision),),
        "decoder": decoder_ranges(profile),
    }
    # A cache of dynamic length is refused by TensorRT, so the capacity is part of this graph.
    graphs = export_onnx(
        checkpoint, folder, precision.vision, profile.max_seq_len, steps, decoder_dtype=precision.decoder
    )
    files = list(graphs)
    for graph in graphs:
        if graph.stem not in engines:
            continue
        steps(f"building the {graph.stem} engine")
        files += _build_plan(trt, variant, graph, ranges[graph.stem], options, steps, engine_dir or folder)
    return files


def _check_machine(variant: Variant, options: TensorRTOptions) -> None:
    if not variant.builds_anywhere and not torch.cuda.is_available():
        raise BuildError(
            f"backend {variant.backend} builds on the GPU that its engines will run on, and there is none here."
            " Build on that machine, or for RTX GPUs with --backend tensorrt-rtx, which needs none."
        )
    if variant.builds_anywhere and options.hardware_compatibility != "none":
        raise BuildError(
            f"--hardware-compatibility is not for {variant.backend}: name the GPUs with --compute-capabilities"
        )
    if variant.builds_anywhere and options.strip_weights:
        raise BuildError(
            f"--strip-weights is not for {variant.backend}: without a GPU it builds no plan that takes its weights"
            " later; leave the option out"
        )
    if not variant.builds_anywhere and options.compute_capabilities:
        raise BuildError(
            f"--compute-capabilities is not for {variant.backend}, which builds for the GPU that is here; see"
            " --hardware-compatibility"
        )


@dataclass(frozen=True)
class ParsedNetwork:
    """A parsed and lowered network, with all that must stay alive while it is built."""

    builder: Any
    network: Any
    parser: Any
    arrays: list[Any]


def parse(trt: Any, path: Path, attention_mask: str = ATTENTION_MASKS[0]) -> ParsedNetwork:
    """Parse an ONNX file, whose weights lie beside it, and repair what the parser gets wrong.

    Args:
        trt: the TensorRT module.
        path: the ONNX file.
        attention_mask: see :func:`qwen2vl_trt.engines.lowering.lower`.

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
        reason = "; ".join(map(_parser_reason, errors)) or "; ".join(log.errors) or "no reason given"
        raise BuildError(
            f"{path}: {trt.__name__} {trt.__version__} cannot parse it: {reason}. Another release may; the onnxruntime"
            " and torch backends run the same model."
        )
    return ParsedNetwork(builder, network, parser, lower(trt, network, path, attention_mask))


def _parser_reason(error: Any) -> str:
    reason = " ".join(error.desc().split())
    return f"node {error.node_name()} ({error.node_operator()}): {reason}" if error.node_name() else reason


def _build_plan(
    trt: Any,
    variant: Variant,
    path: Path,
    profiles: tuple[Ranges, ...],
    options: TensorRTOptions,
    steps: BuildSteps,
    engine_dir: Path,
) -> list[Path]:
    log = tensorrt_log(trt)
    with deferred_interrupt() as interrupted:
        parsed = parse(trt, path, options.attention_mask)
        config = _configure(trt, parsed.builder, path, profiles, options)
        if options.strip_weights:
            strip_weights(trt, parsed.network, config, path)
        config.progress_monitor = monitor = progress_monitor(trt, steps, interrupted)
        cache = None
        if not variant.builds_anywhere:  # TensorRT for RTX times nothing: its timing cache does nothing
            cache = timing_cache_path(engine_dir, trt.__version__, torch.cuda.get_device_name())
            load_timing_cache(config, cache)
        log.clear()
        with atomic_file(path.with_suffix(".engine")) as temporary, temporary.open("wb") as file:
            writer = stream_writer(trt, file)
            built = parsed.builder.build_serialized_network_to_stream(parsed.network, config, writer)
            if writer.error is not None:
                raise writer.error
            if not built:
                reason = "; ".join(log.errors) or "no reason given"
                raise BuildError(
                    f"{path.stem} engine: {trt.__name__} {trt.__version__} cannot build it: {reason}. If it is memory"
                    " or an attention without a kernel, lower --max-seq-len, --max-batch-size or --max-hw-dims."
                )
        del monitor  # alive until here
        if cache is not None:
            save_timing_cache(config, cache)
        atomic_write(path.with_suffix(".layers"), log.layers.encode())
    return [path.with_suffix(".engine"), path.with_suffix(".layers")]


def _configure(trt: Any, builder: Any, path: Path, profiles: tuple[Ranges, ...], options: TensorRTOptions) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and FP32 here means FP32, as it does in PyTorch
    # Without it a context asks for the memory of its profile's largest shapes, whatever shapes it is given.
    config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    if hasattr(
        trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"
    ):  # TensorRT for RTX: what it allocates itself, it cannot capture
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
    inputs = onnx.load(path, load_external_data=False).graph.input
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
