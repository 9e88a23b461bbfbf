"""Model Optimizer's layers of 4 bits, against the description in plain loops, our own writer and the library's."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.quantized.modelopt import ModelOptimizer
from tests.support.quantized import E2M1, LAYER, modelopt_int4, modelopt_nvfp4, read_layer, settings_of

TINY = resolve_model("tiny").folder


def octets(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).byte()


def test_every_bit_pattern_of_nvfp4():
    packed, scales = octets(8, 32), torch.rand(8, 4).to(torch.float8_e4m3fn)
    tensors = {"weight": packed, "weight_scale": scales, "weight_scale_2": torch.tensor(0.3)}
    found = read_layer(ModelOptimizer.of(settings_of(quant_algo="NVFP4", group_size=16)), tensors)
    for row in range(8):
        for column in range(64):
            octet = int(packed[row, column // 2])
            number = E2M1[octet >> 4 if column % 2 else octet & 15]
            expected = number * float(scales[row, column // 16]) * 0.3
            assert float(found[row, column]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stated", [{"group_size": 16}, {}])
def test_every_bit_pattern_of_int4(stated):
    packed, scales, smoothing = octets(8, 32), torch.rand(16, 2), torch.rand(32).bfloat16()
    tensors = {"weight": packed, "weight_scale": scales, "pre_quant_scale": smoothing}
    found = read_layer(ModelOptimizer.of(settings_of(quant_algo="W4A16_AWQ", **stated)), tensors)
    for row in range(16):
        for column in range(32):
            octet = int(packed[row // 2, column])
            number = octet >> 4 if row % 2 else octet & 15
            number -= 16 if number > 7 else 0
            expected = number * float(scales[row, column // 16]) * float(smoothing[column])
            assert float(found[row, column]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(
    ("algorithm", "write"), [("NVFP4", modelopt_nvfp4), ("NVFP4_AWQ", modelopt_nvfp4), ("W4A16_AWQ", modelopt_int4)]
)
def test_what_a_writer_meant(algorithm, write, smoothed):
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    smoothing = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5 if smoothed else None
    group = {"group_size": 32} if write is modelopt_int4 else {}
    tensors, meant = write(weight, **group, smoothing=smoothing)
    found = read_layer(ModelOptimizer.of(settings_of(quant_algo=algorithm, **group)), tensors)
    torch.testing.assert_close(found, meant, rtol=1e-6, atol=1e-7)
    assert (meant - weight).abs().max() < 0.8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"quant_algo": "W8A16"},
            "_config.quant_algo is 'W8A16'; 'FP8', 'NVFP4', 'W4A16_NVFP4', 'NVFP4_AWQ'",
        ),
        ({"quant_algo": "MIXED_PRECISION"}, "quant_algo is 'MIXED_PRECISION'; 'FP8',"),
        (
            {"quant_algo": "NVFP4", "group_size": 32},
            "group_size is 32; 16 can be read. Take the unquantised",
        ),
        ({"quant_algo": "W4A16_AWQ", "has_zero_point": True}, "has_zero_point is True; False can be read"),
    ],
)
def test_settings_that_are_not_read(settings, said):
    with pytest.raises(CheckpointError, match=re.escape(said)):
        ModelOptimizer.of(settings_of(**settings))


@pytest.mark.parametrize(
    ("algorithm", "change", "said"),
    [
        ("NVFP4", {"weight_scale": None}, f"{LAYER} has no weight_scale."),
        ("NVFP4", {"weight_scale_2": None}, f"{LAYER} has no weight_scale_2."),
        (
            "NVFP4",
            {"weight_scale": torch.ones(24, 4)},
            "weight_scale is torch.float32 [24, 4], where torch.float8_e4m3fn",
        ),
        (
            "NVFP4",
            {"weight": torch.zeros(24, 64).to(torch.float8_e4m3fn)},
            "weight is torch.float8_e4m3fn [24, 64], where",
        ),
        ("W4A16_AWQ", {"weight_scale": None}, f"{LAYER} has no weight_scale."),
        ("W4A16_AWQ", {"weight_scale": torch.ones(24, 4)}, "is torch.float32 [24, 4], where [24, 2] is expected"),
        (
            "W4A16_AWQ",
            {"pre_quant_scale": torch.ones(32)},
            "pre_quant_scale is torch.float32 [32], where [64] is",
        ),
    ],
)
def test_tensors_that_do_not_fit(algorithm, change, said):
    weight = torch.randn(24, 64)
    tensors = (modelopt_nvfp4(weight) if algorithm == "NVFP4" else modelopt_int4(weight, 32))[0] | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read_layer(ModelOptimizer(algorithm, 32 if algorithm == "W4A16_AWQ" else 16), tensors)


@pytest.fixture
def exported(tmp_path):
    """The decoder of tiny, quantised and exported by Model Optimizer itself; before the export, ``seen`` sees it."""
    mtq = pytest.importorskip("modelopt.torch.quantization", reason="the quantize extra is not installed")
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import Qwen2_5_VLForConditionalGeneration

    def calibrate(model):
        ids = torch.randint(400, (4, 40), generator=torch.Generator().manual_seed(0))
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    @torch.no_grad()
    def export(recipe, seen=lambda model: None):
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
        model.config.architectures = [type(model).__name__]
        config = copy.deepcopy(getattr(mtq, recipe))
        config["quant_cfg"].append({"quantizer_name": "*visual*", "enable": False})
        mtq.quantize(model, config, calibrate)
        seen(model)
        export_hf_checkpoint(model, export_dir=tmp_path)
        return Checkpoint(tmp_path)

    return export


@pytest.mark.parametrize("recipe", ["NVFP4_DEFAULT_CFG", "W4A16_NVFP4_CFG"])
def test_nvfp4_as_the_library_writes_it(exported, recipe):
    """Against the library's own dequantisation, and, for what that has in common with ours, the original."""
    checkpoint, original = exported(recipe), Checkpoint(TINY)
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    tensors = load_file(checkpoint.folder / "model.safetensors")
    assert len(checkpoint.packed) == 28
    for name in checkpoint.packed:
        packed = NVFP4QTensor(torch.Size(checkpoint.entry(name).shape), torch.float32, tensors[name])
        scales = {"scale": tensors[f"{name}_scale"], "double_scale": tensors[f"{name}_scale_2"]}
        expected = packed.dequantize(torch.float32, **scales, block_sizes={-1: 16})
        torch.testing.assert_close(checkpoint.load(name), expected, rtol=1e-6, atol=0, msg=name)
        difference = checkpoint.load(name) - original.load(name).float()
        assert difference.norm() < 0.15 * expected.norm(), name


def test_int4_awq_as_the_library_writes_it(exported):
    """Against the library's fake quantisation. AWQ moves scales into norms and quantises the layers behind them again:
    of those, norm and weight together are within the rounding of the original."""
    meant = {}

    def seen(model):
        for name, module in model.model.language_model.layers.named_modules():
            if name.endswith("_proj"):
                weight = module.weight_quantizer(module.weight) * module.input_quantizer.pre_quant_scale
                meant[f"model.layers.{name}.weight"] = weight

    checkpoint, original = exported("INT4_AWQ_CFG", seen), Checkpoint(TINY)
    assert checkpoint.packed.keys() == meant.keys()
    for name, expected in meant.items():
        weight = checkpoint.load(name)
        if not name.endswith(("o_proj.weight", "down_proj.weight")):
            norm = "post_attention_layernorm" if ".mlp." in name else "input_layernorm"
            norm = f"{name.rsplit('.', 3)[0]}.{norm}.weight"
            weight, expected = (one.load(norm).float() * one.load(name).float() for one in (checkpoint, original))
            assert (weight - expected).norm() < 0.15 * expected.norm(), name
        else:
            torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6, msg=name)
