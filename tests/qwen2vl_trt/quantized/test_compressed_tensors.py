"""compressed-tensors' layers, against the description in plain loops and against a writer that packs bit by bit."""

import re

import pytest
import torch

from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.quantized.compressed_tensors import CompressedTensors
from tests.support.quantized import (
    E2M1,
    LAYER,
    fp8_tensors,
    int8_tensors,
    nvfp4,
    packed_tensors,
    pairs,
    random_words,
    read_layer,
    settings_of,
)


def form_of(format="pack-quantized", targets=("Linear",), ignore=("lm_head", "re:visual.*"), **weights):
    groups = {"group_0": {"targets": list(targets), "weights": {"num_bits": 4, "type": "int"} | weights}}
    return CompressedTensors.of(settings_of(format=format, config_groups=groups, ignore=list(ignore)))


@pytest.mark.parametrize("bits", [4, 8])
def test_every_bit_pattern(bits):
    """Packed, with packed zero points and groups in no order."""
    out, channels, groups, count = 12, 40, 4, 32 // bits
    packed, zeros = random_words(out, channels // count), random_words(-(-out // count), groups, seed=1)
    scales = torch.rand(out, groups).bfloat16()
    g_idx = torch.randint(groups, (channels,), generator=torch.Generator().manual_seed(2)).int()
    form = form_of(num_bits=bits, strategy="group", group_size=10, symmetric=False, actorder="group")
    tensors = {"weight_packed": packed, "weight_scale": scales, "weight_zero_point": zeros, "weight_g_idx": g_idx}
    found = read_layer(form, tensors | {"weight_shape": torch.tensor([out, channels])})
    half = 2 ** (bits - 1)
    for row in range(out):
        for column in range(channels):
            group = int(g_idx[column])
            number = (int(packed[row, column // count]) >> (column % count * bits)) % 2**bits - half
            zero = (int(zeros[row // count, group]) >> (row % count * bits)) % 2**bits - half
            expected = (number - zero) * float(scales[row, group])
            assert float(found[row, column]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"symmetric": False},
        {"symmetric": False, "zeros_packed": False},
        {"symmetric": False, "desc_act": True},
    ],
    ids=str,
)
def test_packed_integers(bits, group_size, how):
    """36 output channels fill no whole number of words; of 100 input channels neither do a row's."""
    weight = torch.randn(36, 96 if group_size > 0 else 100, generator=torch.Generator().manual_seed(0))
    tensors, meant = packed_tensors(weight, bits, group_size, **how)
    strategy = {"strategy": "group", "group_size": group_size} if group_size > 0 else {"strategy": "channel"}
    form = form_of(num_bits=bits, symmetric=how.get("symmetric", True), **strategy)
    assert torch.equal(read_layer(form, tensors), meant)
    assert (meant - weight).abs().max() < (0.6 if bits == 4 else 0.04)


@pytest.mark.parametrize("format", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int8(format, strategy, symmetric):
    weight = torch.randn(36, 100, generator=torch.Generator().manual_seed(0))
    tensors, meant = int8_tensors(weight, strategy, symmetric)
    form = form_of(format, num_bits=8, strategy=strategy, symmetric=symmetric, group_size=None)
    assert torch.equal(read_layer(form, tensors), meant)
    assert (meant - weight).abs().max() < 0.04


@pytest.mark.parametrize("format", ["float-quantized", "naive-quantized"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_fp8(format, strategy):
    """Blocks of 32 fill neither side."""
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    tensors, meant = fp8_tensors(weight, strategy, block=32)
    form = form_of(format, num_bits=8, type="float", strategy=strategy, block_structure=[32, 32])
    assert torch.equal(read_layer(form, tensors), meant)
    assert (meant - weight).abs().max() < 0.15


def test_nvfp4():
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    codes, scales, overall, meant = nvfp4(weight)
    assert sorted(set(codes.flatten().tolist()) | {8}) == list(range(16)), "all but -0"
    tensors = {"weight_packed": pairs(codes), "weight_scale": scales, "weight_global_scale": 1 / overall.reshape(1)}
    form = form_of("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
    found = read_layer(form, tensors)
    torch.testing.assert_close(found, meant, rtol=1e-6, atol=0)
    for row in range(24):
        for column in range(64):
            octet = int(tensors["weight_packed"][row, column // 2])
            number = E2M1[octet >> 4 if column % 2 else octet & 15]
            expected = number * float(scales[row, column // 16]) * float(overall)
            assert float(found[row, column]) == pytest.approx(expected, rel=1e-6)


class TestGroups:
    """Which group a layer is in; the tensors' names and those of config.json may be of either dialect."""

    @pytest.mark.parametrize(
        "target",
        [
            "Linear",
            LAYER,
            LAYER.replace("model.", "model.language_model."),
            "re:.*up_proj",
            r"re:model\.language_model\.layers\.\d+\.mlp",
        ],
    )
    def test_it_is_named(self, target):
        tensors, meant = packed_tensors(torch.randn(8, 32), 4, 32)
        form = form_of(targets=["re:.*down_proj", target], group_size=32)
        assert torch.equal(read_layer(form, tensors), meant)

    def test_a_name_counts_more_than_a_pattern_and_that_more_than_a_class(self):
        groups = {
            name: {"targets": [target], "weights": {"num_bits": bits, "group_size": size}}
            for name, target, bits, size in (("a", "Linear", 4, 8), ("b", LAYER, 4, 32), ("c", "re:.*up_proj", 4, 16))
        }
        groups["attention"] = {"targets": ["re:.*self_attn"], "weights": None}
        weight, settings = torch.randn(8, 32), {"format": "pack-quantized", "config_groups": groups}
        for size in (32, 16, 8):
            tensors, meant = packed_tensors(weight, 4, size)
            assert torch.equal(read_layer(CompressedTensors.of(settings_of(**settings)), tensors), meant)
            del groups[next(name for name in groups if groups[name]["weights"]["group_size"] == size)]

    def test_each_may_have_a_format(self):
        groups = {
            "a": {"targets": ["Linear"], "format": "int-quantized", "weights": {"num_bits": 8, "strategy": "channel"}},
            "b": {
                "targets": ["re:.*up_proj"],
                "format": "pack-quantized",
                "weights": {"num_bits": 4, "group_size": 16},
            },
        }
        form = CompressedTensors.of(settings_of(format="mixed-precision", config_groups=groups))
        tensors, meant = packed_tensors(torch.randn(8, 32), 4, 16)
        assert torch.equal(read_layer(form, tensors), meant)

    @pytest.mark.parametrize(
        ("how", "said"),
        [
            ({"targets": ["re:.*down_proj"]}, "no group of config_groups names it"),
            ({"ignore": [LAYER]}, "ignore names it"),
            ({"ignore": ["re:.*mlp.*"]}, "ignore names it"),
        ],
    )
    def test_it_is_not(self, how, said):
        tensors, _ = packed_tensors(torch.randn(8, 32), 4, 32)
        said = f"{LAYER} is quantised, but by config.json it is not: {said}. Take the unquantised"
        with pytest.raises(CheckpointError, match=re.escape(said)):
            read_layer(form_of(group_size=32, **how), tensors)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            {"num_bits": 3, "group_size": 32},
            "config_groups.group_0 is pack-quantized: int, 3 bits, a scale a group; pack-",
        ),
        ({"format": "marlin-24"}, "config_groups.group_0 is marlin-24: int, 4 bits, a scale a tensor; pack-quantized,"),
        (
            {"format": "mxfp4-pack-quantized", "type": "float", "group_size": 32},
            "is mxfp4-pack-quantized: float, 4 bits",
        ),
        ({"format": "int-quantized"}, "is int-quantized: int, 4 bits, a scale a tensor"),
        ({"strategy": "group"}, "config_groups.group_0.weights.group_size is None; a group needs a positive one"),
        ({"num_bits": "4"}, "config_groups.group_0.weights.num_bits is '4'; expected `int`, got `str`"),
        ({"ignore": ["re:("]}, "has the pattern 're:('"),
    ],
)
def test_settings_that_are_not_read(how, said):
    with pytest.raises(CheckpointError, match=re.escape(said)):
        form_of(**how)


@pytest.mark.parametrize(
    ("name", "nothing", "value"),
    [
        ("transform_config", {"config_groups": {}}, {"config_groups": {"R1": {"type": "hadamard"}}}),
        (
            "sparsity_config",
            {"format": "dense", "targets": ["Linear"]},
            {"format": "sparse-24-bitmask", "targets": ["Linear"]},
        ),
    ],
)
def test_what_is_more_than_quantised(name, nothing, value):
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}}
    settings = {"format": "pack-quantized", "config_groups": groups}
    for given in ({}, None, nothing):
        CompressedTensors.of(settings_of(**settings, **{name: given}))
    with pytest.raises(
        CheckpointError, match=rf"quantization_config\.{name} is .*; checkpoints without one can be read"
    ):
        CompressedTensors.of(settings_of(**settings, **{name: value}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight_scale": None}, f"folder: {LAYER} has no weight_scale. Fetch the checkpoint again"),
        ({"weight_shape": None}, f"{LAYER} has no weight_shape."),
        ({"weight_packed": None}, f"{LAYER} has no weight_packed."),
        ({"weight_zero_point": None}, f"{LAYER} has no weight_zero_point."),
        ({"weight_shape": torch.tensor([36, 88])}, "weight_packed is torch.int32 [36, 12], where [36, 11] is expected"),
        ({"weight_scale": torch.ones(36, 6)}, "weight_scale is torch.float32 [36, 6], where [36, 3] is expected"),
        ({"weight_zero_point": torch.zeros(36, 3).int()}, "is torch.int32 [36, 3], where [5, 3] is expected"),
        ({"weight_g_idx": torch.full((96,), 3)}, "weight_g_idx names groups 3 to 3 of 3."),
        ({"weight": torch.zeros(36, 96)}, "has both weight and weight_packed"),
    ],
)
def test_tensors_that_do_not_fit(change, said):
    tensors = packed_tensors(torch.randn(36, 96), 4, 32, symmetric=False)[0] | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    form = form_of(group_size=32, symmetric=False)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read_layer(form, tensors)
