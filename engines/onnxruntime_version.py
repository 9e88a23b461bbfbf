"""ONNX Runtime's version: older ones open the graphs and answer wrongly."""

from __future__ import annotations

from importlib import import_module

from qwen2vl_trt.errors import EngineError

OLDEST = (1, 28)
"""Before it, the mask of a causal Attention lies in the upper-left corner: a second chunk of a prompt sees few of its
keys."""


def check_onnxruntime() -> None:
    """Refuse a version that is too old.

    Raises:
        EngineError: it names the version and the way out.
    """
    version = str(import_module("onnxruntime").__version__)
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise EngineError(
            f"onnxruntime {version} answers wrongly when a prompt is read in chunks; {oldest} or newer is needed: pip"
            f" install 'onnxruntime>={oldest}' (or onnxruntime-gpu), or --backend torch"
        )
