"""AutoAWQ's layers, against the format's description in plain loops and against a writer that packs bit by bit."""

import re

import pytest
import torch

from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.quantized.awq import AWQ
from tests.support.quantized import awq, layer_of, random_words, settings_of

CHANNEL_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def test_every_bit_pattern():
    channels, out, size = 64, 24, 32
    qweight, qzeros = random_words(channels, out // 8), random_words(channels // size, out // 8, seed=1)
    scales = torch.rand(channels // size, out).half()
    layer = layer_of({"qweight": qweight, "qzeros": qzeros, "scales": scales})
    form = AWQ.of(settings_of(bits=4, group_size=size, version="gemm", zero_point=True))
    assert form.shape(layer) == (out, channels)
    found = form.read(layer).dequantize()
    for row in range(channels):
        for word in range(out // 8):
            for nibble in range(8):
                column = 8 * word + CHANNEL_OF_NIBBLE[nibble]
                number = (int(qweight[row, word]) >> (4 * nibble)) & 15
                zero = (int(qzeros[row // size, word]) >> (4 * nibble)) & 15
                assert float(found[column, row]) == (number - zero) * float(scales[row // size, column])


@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_what_a_writer_meant(group_size):
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    tensors, meant = awq(weight, group_size)
    form = AWQ.of(settings_of(bits=4, group_size=group_size, version="gemm"))
    assert form.shape(layer_of(tensors)) == (40, 96)
    read = form.read(layer_of(tensors))
    assert torch.equal(read.dequantize(), meant)
    assert (meant - weight).abs().max() < 0.6, "four bits"
    assert read.values.dtype == read.zero_points.dtype == torch.uint8
    assert int(read.values.max()) == 15


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 8}, "config.json: quantization_config.bits is 8; 4 can be read. Take the unquantised checkpoint"),
        ({"bits": 4, "version": "gemv"}, "quantization_config.version is 'gemv'; 'gemm', 'GEMM' can be read"),
        ({"bits": 4, "format": "marlin"}, "quantization_config.format is 'marlin'; 'gemm', 'GEMM' can be read"),
        ({"bits": 4, "group_size": 0}, "quantization_config.group_size is 0; positive numbers and -1 can be read"),
        ({"bits": 4, "group_size": "128"}, "quantization_config.group_size is '128'; positive numbers"),
        ({"bits": 4, "zero_point": False}, "quantization_config.zero_point is False; True can be read"),
        ({"bits": [4]}, "quantization_config.bits is [4]; 4 can be read"),
    ],
)
def test_settings_that_are_not_read(settings, said):
    with pytest.raises(CheckpointError, match=re.escape(said)):
        AWQ.of(settings_of(**settings))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scales": None}, "folder: model.layers.0.mlp.up_proj has no scales. Fetch the checkpoint again"),
        ({"qzeros": None}, "model.layers.0.mlp.up_proj has no qzeros."),
        (
            {"scales": torch.ones(3, 40, dtype=torch.float16)},
            "up_proj.scales is torch.float16 [3, 40], where [6, 40] is expected by its other tensors and the",
        ),
        ({"scales": torch.ones(6, 40).long()}, "scales is torch.int64 [6, 40], where torch.bfloat16 or torch.float16"),
        ({"qzeros": torch.zeros(6, 10).int()}, "qzeros is torch.int32 [6, 10], where [6, 5] is expected"),
        ({"qweight": torch.zeros(480).int()}, "qweight is torch.int32 [480], where a matrix is expected"),
        ({"qweight": torch.zeros(90, 5).int()}, "has 90 input channels, no multiple of group_size 16"),
    ],
)
def test_tensors_that_do_not_fit(change, said):
    tensors = awq(torch.randn(40, 96), 16)[0] | change
    layer = layer_of({name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=re.escape(said)):
        AWQ(16).shape(layer)
