"""What the torch backend does of its own on a CPU."""

import pytest
import torch

from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.runtime.backends import torch_runner
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.windows import window_layout
from tests.support.engine_folders import build
from tests.support.models import relative_error


@pytest.mark.parametrize(
    "grids", [((1, 2, 2),), ((1, 4, 10), (3, 6, 4), (1, 10, 18), (1, 2, 30)), ((1, 8, 8), (1, 8, 16))]
)
def test_leaving_empty_slots_out_changes_nothing(tmp_path, monkeypatch, grids):
    engines = open_engines(build(resolve_model("tiny").folder, tmp_path, "torch", "fp32"), "cpu")
    layout = window_layout(grids, engines.checkpoint.config.vision)
    pixels = torch.randn(*layout.sequence_position.shape, 1176, generator=torch.Generator().manual_seed(0))
    found = {}
    for share in (-1.0, 1.0):  # always, never
        monkeypatch.setattr(torch_runner, "_MIN_PADDING", share)
        found[share] = engines.vision(pixels, layout)
    assert relative_error(found[-1.0], found[1.0]) < 1e-5
