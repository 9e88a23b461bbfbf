"""Installs the stand-in for TensorRT-LLM in ``tests/fake_packages`` for one test."""

import sys
from importlib import import_module
from pathlib import Path

FAKES = Path(__file__).parent / "fake_packages"


def install(monkeypatch):
    """Make ``import tensorrt_llm`` find the stand-in, fresh; returns it."""
    forget(monkeypatch)
    monkeypatch.syspath_prepend(str(FAKES))
    return import_module("tensorrt_llm")


def forget(monkeypatch):
    """Undo imports of it at the end, and those of earlier tests now."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        monkeypatch.delitem(sys.modules, name)
