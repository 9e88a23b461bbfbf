"""GPTQ's layers, against the format's description in plain loops and against a writer that packs bit by bit."""

import re

import pytest
import torch

from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.quantized.gptq import GPTQ
from tests.support.quantized import gptq, layer_of, random_words, settings_of


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("version", "offset"), [("gptq", 1), ("gptq_v2", 0)])
def test_every_bit_pattern(bits, version, offset):
    """With groups in no order; a stored zero point of all ones is the -1 of a zero point of 0."""
    channels, out, groups, count = 64, 16, 4, 32 // bits
    qweight, qzeros = random_words(channels // count, out), random_words(groups, out // count, seed=1)
    qzeros[0, 0] = -1
    scales = torch.rand(groups, out).half()
    g_idx = torch.randint(groups, (channels,), generator=torch.Generator().manual_seed(2)).int()
    layer = layer_of({"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx})
    form = GPTQ.of(settings_of(bits=bits, group_size=16, desc_act=True, checkpoint_format=version))
    assert form.shape(layer) == (out, channels)
    found = form.read(layer).dequantize()
    for row in range(channels):
        for column in range(out):
            group = int(g_idx[row])
            number = (int(qweight[row // count, column]) >> (row % count * bits)) % 2**bits
            zero = (int(qzeros[group, column // count]) >> (column % count * bits)) % 2**bits
            zero = (zero + offset) % 2**bits
            assert float(found[column, row]) == pytest.approx((number - zero) * float(scales[group, column]), rel=1e-6)


@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_a_writer_meant(group_size, symmetric, desc_act, bits):
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    tensors, meant = gptq(weight, group_size, bits, symmetric, desc_act)
    form = GPTQ.of(settings_of(bits=bits, group_size=group_size, desc_act=desc_act, sym=symmetric))
    assert form.shape(layer_of(tensors)) == (40, 96)
    read = form.read(layer_of(tensors))
    assert torch.equal(read.dequantize(), meant)
    assert (meant - weight).abs().max() < (0.6 if bits == 4 else 0.04)
    in_order = not desc_act or group_size == -1
    assert (read.group_index is None) == in_order, "one group for all is in order"
    if in_order:
        del tensors["g_idx"]
        form = GPTQ.of(settings_of(bits=bits, group_size=group_size))
        form.shape(layer_of(tensors))
        assert torch.equal(form.read(layer_of(tensors)).dequantize(), meant)


def test_a_last_group_that_is_not_whole():
    """GPTQModel rounds the number of groups up."""
    tensors, meant = gptq(torch.randn(16, 96), 48)
    tensors["scales"], tensors["qzeros"] = tensors["scales"][[0, 1]], tensors["qzeros"][[0, 1]]
    tensors["qweight"], tensors["g_idx"] = tensors["qweight"][:10], tensors["g_idx"][:80]
    form = GPTQ.of(settings_of(bits=4, group_size=48))
    assert form.shape(layer_of(tensors)) == (16, 80)
    assert torch.equal(form.read(layer_of(tensors)).dequantize(), meant[:, :80])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 3}, "config.json: quantization_config.bits is 3; 4, 8 can be read. Take the unquantised checkpoint"),
        ({"bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; 'gptq', 'gptq_v2' can be read"),
        ({"bits": 4, "group_size": -2}, "group_size is -2; positive numbers and -1 can be read"),
        ({"bits": 4, "desc_act": "yes"}, "desc_act is 'yes'; False, True can be read"),
    ],
)
def test_settings_that_are_not_read(settings, said):
    with pytest.raises(CheckpointError, match=re.escape(said)):
        GPTQ.of(settings_of(**settings))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scales": None}, "folder: model.layers.0.mlp.up_proj has no scales. Fetch the checkpoint again"),
        ({"g_idx": None}, "model.layers.0.mlp.up_proj has no g_idx."),
        (
            {"scales": torch.ones(3, 40, dtype=torch.float16)},
            "up_proj.scales is torch.float16 [3, 40], where [6, 40] is expected by its other tensors and the",
        ),
        ({"qzeros": torch.zeros(6, 10).int()}, "qzeros is torch.int32 [6, 10], where [6, 5] is expected"),
        ({"qweight": torch.zeros(24, 40).int()}, "scales is torch.float16 [6, 40], where [12, 40] is expected"),
        ({"g_idx": torch.full((96,), 6).int()}, "up_proj.g_idx names groups 6 to 6 of 6."),
    ],
)
def test_tensors_that_do_not_fit(change, said):
    tensors = gptq(torch.randn(40, 96), 16, desc_act=True)[0] | change
    layer, form = (
        layer_of({name: tensor for name, tensor in tensors.items() if tensor is not None}),
        GPTQ(4, 16, 1, True),
    )
    with pytest.raises(CheckpointError, match=re.escape(said)):
        form.shape(layer) and form.read(layer)
