"""Weight-stripped plans, whose weights are read from the checkpoint's safetensors files when the plan is loaded.

Weights are named one by one (``REFIT_INDIVIDUAL``): all that the graph reads from the checkpoint, no other.
``trt.OnnxParserRefitter`` would read every weight into host memory first; here TensorRT copies from the mapped file.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qwen2vl_trt.errors import BuildError, EngineError

from .onnx_file import read_onnx


@dataclass(frozen=True)
class StoredWeight:
    """Where a weight lies: ``length`` bytes from ``offset`` on, in a file beside the graph."""

    file: str
    offset: int
    length: int


def stored_weights(path: Path) -> dict[str, StoredWeight]:
    """The weights that an ONNX file reads from other files, by their name there and in TensorRT.

    Raises:
        EngineError: it cannot be read, or is corrupt.
    """
    weights = {}
    with read_onnx(path) as model:
        for value in model.graph.initializer:
            if value.data_location == onnx.TensorProto.EXTERNAL:
                entry = {field.key: field.value for field in value.external_data}
                weights[value.name] = StoredWeight(entry["location"], int(entry["offset"]), int(entry["length"]))
    return weights


def strip_weights(trt: Any, network: Any, config: Any, path: Path) -> None:
    """Have the plan of a network, parsed from an ONNX file, built without the checkpoint's weights.

    Raises:
        BuildError: TensorRT does not know a weight by the graph's name for it.
    """
    config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    for name in stored_weights(path):
        if not network.mark_weights_refittable(name):
            raise BuildError(
                f"{path.name}: {trt.__name__} {trt.__version__} has no weights {name!r} to leave out of the plan;"
                " build without --strip-weights"
            )


def refit(trt: Any, engine: Any, log: Any, path: Path) -> None:
    """Give an engine the weights that its plan lacks.

    Args:
        engine: deserialised from a stripped plan.
        log: see :func:`qwen2vl_trt.engines.tensorrt_callbacks.tensorrt_log`.
        path: the ONNX file that it was built from, with the weights beside it.

    Raises:
        EngineError: the files do not have what the engine asks for, or TensorRT's own reason.
    """
    weights, files = stored_weights(path), {}
    refitter = trt.Refitter(engine, log)
    log.clear()
    try:
        for name in refitter.get_all_weights():
            if name not in weights:
                raise EngineError(f"{path.name} has no weights {name!r}, which the engine needs. Rebuild.")
            stored, wanted = weights[name], refitter.get_weights_prototype(name)
            if wanted.nbytes != stored.length:
                raise EngineError(
                    f"{path.name}: weights {name!r} have {stored.length:,} bytes, the engine needs {wanted.nbytes:,}."
                    " Rebuild."
                )
            if stored.file not in files:
                files[stored.file] = _map(path.parent / stored.file)
            address = files[stored.file].ctypes.data + stored.offset
            if not refitter.set_named_weights(name, trt.Weights(wanted.dtype, address, wanted.size)):
                raise EngineError(f"{path.name}: TensorRT does not take weights {name!r}{_reason(log)}. Rebuild.")
        missing = refitter.get_missing_weights()
        if missing:
            raise EngineError(f"{path.name}: the engine still lacks weights {missing[0]!r}. Rebuild.")
        if not refitter.refit_cuda_engine():
            raise EngineError(f"{path.name}: TensorRT cannot give the engine its weights{_reason(log)}")
    except OSError as error:
        raise EngineError(f"{error.filename}: {error.strerror}; the engine's weights are there. Rebuild.") from None


def _map(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _reason(log: Any) -> str:
    return f": {'; '.join(log.errors)}" if log.errors else ""
