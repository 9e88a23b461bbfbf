"""Engines of TensorRT for RTX, which builds without a GPU; where it is not installed these tests are skipped."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.engine_folders import build, write_checkpoint


@pytest.fixture(scope="session")
def trt():
    return pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux and Windows on x86-64 only"
    )


@pytest.fixture(scope="session")
def rtx_checkpoint(tmp_path_factory) -> Path:
    """Random weights in the tiny model's shape. Do not write into it."""
    return write_checkpoint(tmp_path_factory.mktemp("rtx") / "checkpoint")


@pytest.fixture(scope="session")
def rtx_engines(trt, rtx_checkpoint, tmp_path_factory) -> SimpleNamespace:
    """Folders of engines by precision, built when asked for. Do not write into them."""
    parent, built = tmp_path_factory.mktemp("engines"), {}

    def folder(precision: str) -> Path:
        if precision not in built:
            built[precision] = build(rtx_checkpoint, parent / precision, "tensorrt-rtx", precision)
        return built[precision]

    return SimpleNamespace(folder=folder, parent=parent)
