"""Compare an engine folder with Hugging Face Transformers in FP32, stage by stage."""

from __future__ import annotations

import argparse
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from qwen2vl_trt.errors import CompareError, Qwen2VLError, reason, require
from qwen2vl_trt.plots import check_plot

from .options import folder_name, path_name, positive_number
from .process import FAILED

if TYPE_CHECKING:
    from polygraphy.backend.base import BaseRunner

    from qwen2vl_trt.accuracy.comparison import Row
    from qwen2vl_trt.accuracy.inputs import Case
    from qwen2vl_trt.accuracy.report import Report
    from qwen2vl_trt.checkpoint import Checkpoint
    from qwen2vl_trt.runtime.backends.runners import Engines
    from qwen2vl_trt.runtime.preprocessing.preprocessor import PreprocessorSettings

REFERENCES = ("transformers", "torch")
_REPORTED = ("transformers", "onnxruntime", "polygraphy", "tensorrt", "tensorrt_rtx", "numpy")
_PACKAGES = {
    "polygraphy": "polygraphy",
    "matplotlib": "matplotlib",
    "torchvision": "torchvision",
    "sklearn": "scikit-learn",
}
EPILOG = """Exit codes: 0 within the tolerance; 1 over it, with a line that says what departs; 2 for bad input.
docs/guide/accuracy.md says what is compared, how errors are defined and why the limits are what they are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    parser.add_argument("--engine-dir", type=folder_name, required=True, metavar="DIR")
    group = parser.add_argument_group("what is compared")
    group.add_argument(
        "--against", default="transformers", metavar="REFERENCE", help="transformers (default), torch, or an engine DIR"
    )
    group.add_argument(
        "--also", action="append", default=[], metavar="DIR", help="show this engine of the same model beside; repeat"
    )
    group.add_argument("--layers", action="store_true", help="compare every block, and name the first that departs")
    group.add_argument(
        "--tolerance", nargs="+", default=[], metavar="NAME=VALUE", help="change a limit, or lift it: baseline=none"
    )
    group.add_argument(
        "--model", metavar="NAME", help="the checkpoint that a quantised one was made from: the reference's weights"
    )
    group.add_argument("--lora", type=folder_name, metavar="DIR", help="with --model, the adapter that was merged")
    group.add_argument("--device", help="of the engine: cpu, cuda, cuda:1; by default a GPU where it can use one")
    group.add_argument("--reference-device", metavar="DEVICE", help="of everything else; by default the engine's")
    group = parser.add_argument_group("what is asked")
    group.add_argument("--image", action="append", default=[], metavar="FILE", help="repeat for several")
    group.add_argument("--video", action="append", default=[], metavar="FILE", help="repeat for several")
    group.add_argument("--prompt", help="with the images and videos; without, a fixed set of real pictures is asked")
    group.add_argument(
        "--max-tokens", type=positive_number, default=32, metavar="N", help="of an answer; default %(default)s"
    )
    group.add_argument("--min-pixels", type=int, metavar="N", help="enlarge smaller images; default the checkpoint's")
    group.add_argument("--max-pixels", type=int, metavar="N", help="shrink larger images; default the checkpoint's")
    group = parser.add_argument_group("results")
    group.add_argument("--json", action="store_true", help="print every figure as JSON instead of tables")
    group.add_argument(
        "--plot", type=path_name, metavar="FILE", help="draw the error by block as a PNG; implies --layers"
    )
    group.add_argument(
        "--save-inputs",
        type=folder_name,
        metavar="DIR",
        help="write the graphs' inputs for `polygraphy run` and `trtexec`",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the command; exits with code 1 where the engine is over its tolerance."""
    if arguments.prompt is None and (arguments.image or arguments.video):
        raise CompareError("--image and --video need a --prompt")
    if arguments.plot:
        check_plot(arguments.plot, "--plot", "compare")
    require("compare", "compare", _PACKAGES)
    from transformers.utils import logging

    from qwen2vl_trt.export.importable_torchvision import allow_torchvision

    allow_torchvision()
    logging.disable_progress_bar()  # stderr is for what is wrong
    logging.set_verbosity_error()
    from qwen2vl_trt.accuracy.report import print_report
    from qwen2vl_trt.engines.tables import stdout_console

    with ExitStack() as closing:
        report = _report(arguments, shlex.join(arguments.command_line), closing)
    if arguments.json:
        print(report.as_json())
    else:
        print_report(report, stdout_console())
    if arguments.plot:
        from qwen2vl_trt.accuracy.plot import plot

        plot(report, arguments.plot)
    if report.ended_by is not None:
        raise report.ended_by
    if report.departures:
        sys.stdout.flush()
        sys.exit(FAILED)


def _report(arguments: argparse.Namespace, command: str, closing: ExitStack) -> Report:
    from qwen2vl_trt.accuracy.comparison import compare_inputs, compare_runners
    from qwen2vl_trt.accuracy.engine_runner import EngineRunner
    from qwen2vl_trt.accuracy.inputs import TransformersProcessor, check_limits, our_inputs
    from qwen2vl_trt.accuracy.report import Report
    from qwen2vl_trt.accuracy.saved_inputs import SavedInputs
    from qwen2vl_trt.accuracy.tolerance import tolerance_of
    from qwen2vl_trt.engines.progress import progress_bar
    from qwen2vl_trt.machine import machine
    from qwen2vl_trt.runtime.backends.runners import open_engines
    from qwen2vl_trt.runtime.options import PipelineOptions

    engines = open_engines(arguments.engine_dir, arguments.device)
    against = _against(arguments, engines)
    tolerance = tolerance_of(engines.manifest.precision, against.manifest.precision if against else "fp32")
    tolerance = tolerance.override(arguments.tolerance)
    checkpoint, config = engines.checkpoint, engines.checkpoint.config
    options = PipelineOptions(min_pixels=arguments.min_pixels, max_pixels=arguments.max_pixels)
    settings = options.preprocessor_settings(checkpoint.folder, engines.manifest.profile)
    settings = settings.narrowed(config.vision.patch_size)  # Transformers is to resize as the pipeline does
    cases = _cases(arguments, engines, settings)
    processor = TransformersProcessor(checkpoint.folder, settings, config.vision.qwen2_vl_dim)
    feeds = [processor(case, arguments.max_tokens) for case in cases]
    for case, feed in zip(cases, feeds):
        check_limits(case, feed, engines.manifest.profile, config)
    saved = SavedInputs(arguments.save_inputs, engines) if arguments.save_inputs else None

    wanted = arguments.layers or arguments.plot is not None
    layers = wanted and EngineRunner.can_record(engines)
    notes = []
    if wanted and not layers:
        notes.append(f"the blocks inside {engines.manifest.backend} engines, which show their outputs only")
    if any(case.videos for case in cases):
        notes.append("positions in prompts with a video: Transformers is given ours, it counts them otherwise")
    engine = EngineRunner(_name(engines), engines, layers, saved)
    reference, baseline, others = _runners(arguments, engines, against, wanted, closing)
    runners = [engine, *others, baseline]
    inputs = compare_inputs(feeds, our_inputs(cases, checkpoint, settings, engines.device))
    rows: list[Row] = []
    ended_by = None
    try:
        with progress_bar() as progress:
            task = progress.add_task("comparing", total=len(cases) * (1 + len(runners)))
            rows.extend(
                compare_runners(
                    reference, runners, feeds, lambda runner: progress.update(task, advance=1, description=runner)
                )
            )
    except (KeyboardInterrupt, Qwen2VLError) as error:
        if not rows:
            raise
        ended_by = error
    finished = len(rows) == len(runners)
    if saved is not None:
        saved.write()
    return Report(
        folder=engines.folder,
        manifest=engines.manifest,
        reference=reference.name,
        tolerance=tolerance,
        cases=tuple((case, len(feed["input_ids"])) for case, feed in zip(cases, feeds)),
        inputs=inputs,
        engine=rows[0],
        baseline=rows[-1] if finished else None,
        others=tuple(rows[1:-1] if finished else rows[1:]),
        notes=tuple(notes),
        machine=machine(engines.device, *_REPORTED),
        command=command,
        ended_by=ended_by,
    )


def _runners(
    arguments: argparse.Namespace, engines: Engines, against: Engines | None, layers: bool, closing: ExitStack
) -> tuple[BaseRunner, BaseRunner, list[BaseRunner]]:
    """The reference, the baseline, and our modules in FP32 where they are neither the engine nor the reference."""
    import torch

    from qwen2vl_trt.accuracy.engine_runner import EngineRunner, ModulesRunner
    from qwen2vl_trt.accuracy.transformers_runner import TransformersRunner
    from qwen2vl_trt.runtime.backends.runners import parse_device

    device = parse_device(arguments.reference_device) if arguments.reference_device else engines.device
    checkpoint = _reference_checkpoint(arguments.model, arguments.lora, engines, closing)

    def transformers(dtype: torch.dtype, name: str) -> BaseRunner:
        return TransformersRunner(f"Transformers {name}", checkpoint, dtype, device, layers)

    ours: BaseRunner = ModulesRunner("torch fp32", engines, checkpoint, device, layers)
    baseline = transformers(torch.bfloat16, "bf16")
    others: list[BaseRunner] = []
    for folder in arguments.also:
        also = _other(Path(folder), "--also", arguments.device, engines)
        others.append(EngineRunner(_name(also), also, layers and EngineRunner.can_record(also)))
    if arguments.against == "torch":
        return ours, baseline, others
    if _name(engines) != ours.name and ours.name not in (other.name for other in others):
        others.append(ours)
    if against is not None:
        record = layers and EngineRunner.can_record(against)
        return EngineRunner(str(against.folder), against, record), baseline, others
    return transformers(torch.float32, "fp32"), baseline, others


def _name(engines: Engines) -> str:
    return f"{engines.manifest.backend} {engines.manifest.precision}"


def _against(arguments: argparse.Namespace, engines: Engines) -> Engines | None:
    """The engine folder to compare with; None for a reference that has no folder."""
    if arguments.against in REFERENCES:
        return None
    return _other(Path(arguments.against), "--against", arguments.reference_device or arguments.device, engines)


def _other(folder: Path, option: str, device: str | None, engines: Engines) -> Engines:
    from qwen2vl_trt.runtime.backends.runners import open_engines

    if not folder.is_dir():
        known = f"; besides folders there are {', '.join(REFERENCES)}" if option == "--against" else ""
        raise CompareError(f"{option} {folder}: there is no such folder{known}")
    other = open_engines(folder, device)
    _check_same(engines.checkpoint, other.checkpoint)
    return other


def _reference_checkpoint(model: str | None, lora: Path | None, engines: Engines, closing: ExitStack) -> Checkpoint:
    """``closing`` removes the folder where an adapter is merged."""
    from qwen2vl_trt.checkpoint import Checkpoint
    from qwen2vl_trt.export.weights import merged_checkpoint
    from qwen2vl_trt.hub import resolve_model
    from qwen2vl_trt.lora import Adapter

    merged = engines.manifest.lora
    if lora is not None and model is None:
        raise CompareError("--lora goes with --model; without them the reference has the engines' own weights")
    if model is not None:
        adapter = Adapter.read(lora) if lora is not None else None
        if (merged and merged.hash) != (adapter and adapter.hash):
            there = f"the adapter {merged.name} ({merged.hash[:12]})" if merged else "no adapter"
            way_out = "name the same with --lora" if merged else "leave --lora out"
            raise CompareError(f"{engines.folder} has {there} merged; {way_out}")
        checkpoint = Checkpoint(resolve_model(model).folder)
        if adapter is not None:
            folder = Path(closing.enter_context(TemporaryDirectory())) / "merged"
            try:
                checkpoint = closing.enter_context(merged_checkpoint(checkpoint, adapter, folder))
            except OSError as error:
                raise CompareError(f"{folder}: {reason(error)}; TMPDIR names another place to merge in") from None
        _check_same(engines.checkpoint, checkpoint)
        return checkpoint
    if _is_quantised(engines.checkpoint):
        raise CompareError(
            f"{engines.folder} holds quantised weights, which Transformers does not load here; name the checkpoint that"
            " they were made from with --model"
        )
    return engines.checkpoint


def _check_same(checkpoint: Checkpoint, other: Checkpoint) -> None:
    """Refuse another model; a quantised one has other weights, so its shapes have to do."""
    same = checkpoint.hash == other.hash
    if not same and (_is_quantised(checkpoint) or _is_quantised(other)):
        same = (checkpoint.config.text, checkpoint.config.vision) == (other.config.text, other.config.vision)
    if not same:
        raise CompareError(
            f"{checkpoint.folder} (model {checkpoint.hash[:12]}) and {other.folder} (model {other.hash[:12]}) are"
            " different models; engines of one checkpoint can be compared"
        )


def _is_quantised(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.packed) or any(checkpoint.entry(name).dtype.itemsize == 1 for name in checkpoint.names)


def _cases(arguments: argparse.Namespace, engines: Engines, settings: PreprocessorSettings) -> list[Case]:
    from qwen2vl_trt.accuracy.inputs import digit_cases, photograph_cases, user_case

    if arguments.prompt is not None:
        return [user_case(arguments.prompt, arguments.image, arguments.video, settings)]
    return digit_cases() if engines.manifest.model.startswith("tiny") else photograph_cases()
