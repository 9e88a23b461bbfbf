"""Index tensors are made once for layouts that come again, in every vision runner that puts them on a device."""

import torch

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.runtime.backends.common import cached_layouts
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.windows import WindowLayout, window_layout


def test_those_used_last_are_kept(checkpoint):
    config, made = Checkpoint(checkpoint).config.vision, []
    place = cached_layouts(lambda layout: made.append(layout) or len(made))
    layouts = [window_layout(((1, 2, 2 * n),), config) for n in range(1, 66)]
    assert [place(layout) for layout in layouts[:64]] == list(range(1, 65))
    assert place(layouts[0]) == 1
    assert place(layouts[64]) == 65
    assert [place(layouts[0]), place(layouts[1])] == [1, 66], "the second was used longest ago"


def test_onnxruntime_asks_a_layout_for_its_tensors_once(engine_dirs, monkeypatch):
    engines, asked = open_engines(engine_dirs["onnxruntime"], "cpu"), []
    tensors = WindowLayout.index_tensors.fget
    monkeypatch.setattr(WindowLayout, "index_tensors", property(lambda self: asked.append(1) or tensors(self)))
    config = engines.checkpoint.config.vision
    layout = window_layout(((1, 4, 6),), config)
    pixels = torch.ones(*layout.sequence_position.shape, config.qwen2_vl_dim)
    first, second = engines.vision(pixels, layout), engines.vision(pixels, layout)
    assert len(asked) == 1
    assert torch.equal(first, second)
