"""Puts the stand-in for TensorRT-LLM of ``tests/support/fake_packages`` in its place, for one test."""

import sys
from importlib import import_module
from pathlib import Path

FAKES = Path(__file__).parent / "fake_packages"


def installed(monkeypatch):
    """A fixture's body: ``import tensorrt_llm`` finds the stand-in, fresh, until the test ends."""
    before = forget()
    monkeypatch.syspath_prepend(str(FAKES))
    yield import_module("tensorrt_llm")
    forget()
    sys.modules.update(before)


def forget():
    """Undo all imports of it; returns them."""
    names = [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]
    return {name: sys.modules.pop(name) for name in names}
