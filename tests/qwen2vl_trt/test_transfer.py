"""Reading tensors through two small buffers, on the CPU; the same on a GPU is tests/gpu/test_torch_runner.py."""

import pytest
import torch
from safetensors.torch import save_file

from qwen2vl_trt.checkpoint import read_header
from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.transfer import PinnedReader


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "whole": torch.randn(7, 13, generator=generator),
        "half": torch.randn(5, 3, generator=generator).bfloat16(),
        "fp8": torch.randn(9, 2, generator=generator).to(torch.float8_e4m3fn),
        "scale": torch.tensor(0.5),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors", tensors


@pytest.mark.parametrize("buffer", [8, 24, 1 << 20])
def test_tensors_come_back_bit_for_bit(file, buffer):
    path, tensors = file
    reader = PinnedReader(torch.device("cpu"), buffer)
    found = {name: reader.read(location) for name, location in read_header(path).items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(
            found[name].view(torch.uint8) if tensor.ndim else found[name],
            tensor.view(torch.uint8) if tensor.ndim else tensor,
        )


def test_a_file_that_shrank(file):
    path, _ = file
    locations = read_header(path)
    last = max(locations.values(), key=lambda location: location.offset + location.length)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="is truncated"):
        PinnedReader(torch.device("cpu"), 16).read(last)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        PinnedReader(torch.device("cpu")).read(last)
