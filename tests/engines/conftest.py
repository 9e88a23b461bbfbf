"""Engines of TensorRT for RTX, which builds without a GPU; where it is not installed these tests are skipped."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.engine_folders import build, write_checkpoint
from tests.support.shared import shared


@pytest.fixture(scope="session")
def trt():
    return pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux and Windows on x86-64 only"
    )


@pytest.fixture(scope="session")
def rtx_checkpoint() -> Path:
    """Random weights in the tiny model's shape. Do not write into it."""
    return shared("rtx-checkpoint", write_checkpoint)


@pytest.fixture(scope="session")
def rtx_engines(trt, rtx_checkpoint) -> SimpleNamespace:
    """Folders of engines by precision, built when asked for. Do not write into them."""

    def folder(precision: str) -> Path:
        return shared(f"rtx-{precision}", lambda where: build(rtx_checkpoint, where, "tensorrt-rtx", precision))

    return SimpleNamespace(folder=folder)
