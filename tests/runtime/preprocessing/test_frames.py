"""The CPU's way, beyond what the comparison with Transformers in test_preprocessor.py covers."""

import numpy as np
import pytest
import torch

from qwen2vl_trt.runtime.preprocessing import frames
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor
from tests.support.pictures import CONFIG, natural


@pytest.mark.parametrize("chunk", [1, 1 << 28])
def test_the_chunk_changes_nothing(chunk, monkeypatch):
    images = [natural(280, 308), natural(112, 112), natural(112, 112), natural(224, 140)]
    clip = [natural(280, 364, seed) for seed in range(3)]
    expected = Preprocessor(CONFIG).preprocess(images, [clip]).pixel_values
    monkeypatch.setattr(frames, "_CHUNK", chunk)
    assert torch.equal(Preprocessor(CONFIG).preprocess(images, [clip]).pixel_values, expected)


def test_bfloat16_ties_go_to_even():
    values = torch.cat([torch.randn(5000), torch.tensor([1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 256, 0.0])])
    bits = values.numpy().copy()
    frames._round_to_bfloat16(bits)
    assert torch.equal(torch.from_numpy(bits.view(np.int32)).short().view(torch.bfloat16), values.bfloat16())
