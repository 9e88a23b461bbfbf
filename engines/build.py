"""From a model to an engine folder that loads."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwen2vl_trt import __version__
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import BuildError, EngineError, program, reason
from qwen2vl_trt.hub import ResolvedModel
from qwen2vl_trt.lora import Adapter
from qwen2vl_trt.quantization import fp8_layers
from qwen2vl_trt.quantized.linear import Numbers
from qwen2vl_trt.weights import checkpoint_names

from .backends import BACKENDS, Backend, BuildJob
from .host_memory import warn_of_memory
from .manifest import BuiltFile, Manifest, MergedAdapter, NoEngineError
from .precision import Precision
from .profile import BuildProfile, flag
from .progress import BuildSteps, progress_bar
from .staging import LOCK, MANIFEST_FILE, MODEL_FILES, alone, staged

logger = logging.getLogger(__name__)

_WAY_OUT = "Pass --force to replace them, or give another --engine-dir"


def build_engines(
    model: ResolvedModel,
    backend: Backend,
    precision: str,
    profile: BuildProfile,
    folder: Path,
    force: bool = False,
    adapter: Adapter | None = None,
) -> bool:
    """Build both engines of a model, unless the folder already holds the same; damaged ones are built again.

    Args:
        backend: with ``precision``, from :func:`qwen2vl_trt.engines.backends.find_backend`.
        folder: where the engines go; made if missing.
        force: build whatever the folder holds; older engines work until the new ones do.
        adapter: to merge into the model; with quantised weights that was done before they were.

    Returns:
        Whether anything was built.

    Raises:
        CheckpointError: the model cannot be read or does not fit its configuration, or the adapter does not fit it.
        BuildError: the folder cannot be written, holds other engines (named; ``force`` replaces them), or holds a model
            that no build put there; the model is not of the precision's kind (quantised or not).
    """
    checkpoint = Checkpoint(model.folder)
    numbers = backend.precision(precision)
    check_quantization(checkpoint, numbers)
    planned = Manifest(
        model=model.name,
        model_hash=checkpoint.hash,
        backend=backend.name,
        precision=precision,
        profile=profile,
        files={},
        versions={"qwen2vl-trt": __version__, **backend.versions()},
        options=backend.options.as_dict() if backend.options else {},
        lora=MergedAdapter(adapter.name, adapter.hash, checkpoint.hash) if adapter else None,
    )
    if not force and _is_built(planned, folder):
        return False
    positions = checkpoint.config.text.max_position_embeddings
    if profile.max_seq_len > positions:
        logger.warning(
            "%s: max_position_embeddings is %d; answers beyond may be poor, and --max-seq-len is %d",
            model.folder,
            positions,
            profile.max_seq_len,
        )
    if not torch.cuda.is_available():  # engines for a GPU need no memory here
        warn_of_memory(checkpoint, backend, numbers)
    if folder.is_dir() and folder.samefile(model.folder):
        raise BuildError(f"{folder} is the checkpoint itself; give --engine-dir another folder")
    if checkpoint.format is not None and not numbers.weight_only:
        logger.warning(
            "%s (%s): its weights are dequantised to compute in %s, in the time and the memory of an unquantised model",
            checkpoint.folder,
            checkpoint.format.method,
            precision,
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_ours(folder)
        with alone(folder):  # two builds at once: the second waits, then finds the first one's work
            if not force and _is_built(planned, folder, logging.DEBUG):  # what is damaged has been said
                return False
            with staged(folder) as staging, progress_bar() as progress:
                merges = adapter is not None and numbers.weights is None
                steps = BuildSteps(progress, model.name, backend.steps + merges)
                with ExitStack() as merging:
                    if adapter is not None and merges:
                        from qwen2vl_trt.export.weights import merged_checkpoint  # SymPy, which a run needs not

                        steps("merging the adapter")
                        merged = merged_checkpoint(checkpoint, adapter, staging / ".merged")
                        checkpoint = merging.enter_context(merged)
                    files = backend.build(BuildJob(backend, checkpoint, staging, folder, numbers, profile, steps))
                    built = {path.name: BuiltFile.of(path) for path in files}
                    replace(planned, model_hash=checkpoint.hash, files=built).write(staging)
    except OSError as error:
        raise BuildError(f"{folder}: {reason(error)}; what it held is unchanged") from None
    return True


def _check_ours(folder: Path) -> None:
    """A build clears its folder of older models: never one that is somebody's checkpoint."""
    if (folder / MANIFEST_FILE).exists() or (folder / LOCK).exists():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in MODEL_FILES:
            raise BuildError(f"{folder} holds {path.name}, which no build put there; give --engine-dir a new folder")


def _is_built(planned: Manifest, folder: Path, level: int = logging.WARNING) -> bool:
    """Whether the folder holds what is planned; logs at ``level`` what is damaged.

    Raises:
        BuildError: it holds other engines, or some that cannot be known.
    """
    found = engines_in(folder)
    if found is None:
        return False
    differing = differences(planned, found)
    if differing:
        raise BuildError(f"{in_words(folder, differing)}. {_WAY_OUT}")
    try:
        found.verify(folder)
    except EngineError as error:
        logger.log(level, "%s It is built again.", error)
        return False
    return True


def engines_in(folder: Path) -> Manifest | None:
    """What a folder holds already, or None.

    Raises:
        BuildError: its manifest cannot be read: who knows what it holds, and with what limits.
    """
    try:
        return Manifest.read(folder)
    except NoEngineError:
        return None
    except EngineError as error:
        raise BuildError(f"{error} {_WAY_OUT}") from None


def default_engine_dir(model: str, backend: str, precision: str) -> Path:
    """Where engines land unless told otherwise, from the current folder."""
    return Path("artifacts") / f"{model}-{backend}-{precision}"


def check_quantization(checkpoint: Checkpoint, precision: Precision) -> None:
    """Refuse a model that is not of the precision's kind.

    Raises:
        BuildError: an unquantised model for a quantised precision, or one in other numbers; an FP8 one for another.
        CheckpointError: a quantisation that is not supported.
    """
    layers = fp8_layers(checkpoint)
    if precision.weight_only is not None:
        _check_numbers(checkpoint, precision.weight_only)
    if precision.fp8 and checkpoint.format is not None:
        raise BuildError(
            f"{checkpoint.folder} is quantised ({checkpoint.format.method}), and FP8 is made of an unquantised"
            " checkpoint alone: take that one, or another --precision"
        )
    if precision.fp8 and not layers:
        raise BuildError(
            f"{checkpoint.folder} is not quantised; {program('build_engines.py')} --precision fp8 does that first"
        )
    if layers and not precision.fp8:
        raise BuildError(
            f"{checkpoint.folder} is quantised to FP8 and cannot be built in {precision.name}: --precision fp8"
        )
    if not precision.fp8_vision and any(layer.startswith("visual.") for layer in layers):
        raise BuildError(
            f"{checkpoint.folder} has FP8 layers in its vision tower, where TensorRT-LLM takes none: give the"
            " unquantised checkpoint with --precision fp8, which quantises the decoder alone, or one like that"
        )


def _check_numbers(checkpoint: Checkpoint, wanted: Numbers) -> None:
    names = checkpoint_names(checkpoint)
    held = {
        weight.numbers
        for ours, theirs in names.items()
        if not ours.startswith("visual.") and (weight := checkpoint.packed.get(theirs)) is not None
    }
    if wanted in held:
        return
    if checkpoint.format is None:
        raise BuildError(
            f"{checkpoint.folder} is not quantised to {wanted}; {program('build_engines.py')} --precision {wanted} does"
            " that first, with an unquantised model"
        )
    others = sorted(numbers for numbers in held if numbers is not None)
    ways = [f"--precision {numbers} computes in what it has" for numbers in others]
    raise BuildError(
        f"{checkpoint.folder} is quantised ({checkpoint.format.method}) to {', '.join(others) or 'other numbers'}, not"
        f" to {wanted}: {'; '.join([*ways, '--precision bf16 or fp32 dequantises it'])}"
    )


def differences(wanted: Manifest, found: Manifest) -> list[str]:
    """What a build would have to change, option by option, as found and as wanted.

    Names of models do not count, nor versions of packages, but for ``Backend.bound_to``.
    """
    pairs: list[tuple[str, Any, Any]] = [("--backend", found.backend, wanted.backend)]
    if _given(found) != _given(wanted):
        pairs.append(("--model", _model(found), _model(wanted)))
    if (found.lora and found.lora.hash) != (wanted.lora and wanted.lora.hash):
        pairs.append(("--lora", _adapter(found), _adapter(wanted)))
    if found.backend == wanted.backend:
        pairs.append(("--precision", found.precision, wanted.precision))
        for name in sorted({*found.options, *wanted.options}):
            label = flag(name) if name != "vision" else "TensorRT-LLM's input"  # read off the release, no option
            pairs.append((label, _value(found.options.get(name)), _value(wanted.options.get(name))))
        package = BACKENDS[wanted.backend].bound_to if wanted.backend in BACKENDS else None
        if package:
            pairs.append((package, found.versions.get(package), wanted.versions.get(package)))
    limits = found.profile.as_dict(), wanted.profile.as_dict()
    pairs += [(flag(name), limits[0][name], limits[1][name]) for name in limits[0]]
    return [f"{option} {there} there, {asked} wanted" for option, there, asked in pairs if there != asked]


def in_words(folder: Path, differing: list[str]) -> str:
    """What is said of a folder with other engines than those that are asked for."""
    return f"{folder} holds other engines: {'; '.join(differing)}"


def _given(manifest: Manifest) -> str:
    """The hash of the model that was given: of one with an adapter, before the merge."""
    return manifest.lora.model_hash if manifest.lora else manifest.model_hash


def _model(manifest: Manifest) -> str:
    return f"{manifest.model} ({_given(manifest)[:12]})"


def _adapter(manifest: Manifest) -> str:
    return f"{manifest.lora.name} ({manifest.lora.hash[:12]})" if manifest.lora else "none"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "default" if value is None else str(value)
