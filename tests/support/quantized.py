"""Checkpoints as the tools write them that quantise, rounded to nearest; packed bit by bit from each format's text."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qwen2vl_trt.quantized.stored import Layer, Settings

LAYER = "model.layers.0.mlp.up_proj"


def layer_of(tensors):
    """A quantised layer with these tensors."""
    return Layer(LAYER, "folder", tensors, lambda name: tensors[name.removeprefix(f"{LAYER}.")])


def read_layer(form, tensors):
    """The weight of a layer with these tensors, once they are found to fit."""
    layer = layer_of(tensors)
    shape = form.shape(layer)
    found = form.read(layer).dequantize()
    assert found.shape == shape
    return found


def settings_of(**settings):
    """What stands in ``quantization_config``."""
    return Settings("config.json: quantization_config", settings)


def random_words(*shape, seed=0):
    """int32 of all bit patterns, negative ones too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).int()


def is_decoder_linear(name):
    return ".layers." in name and name.endswith("_proj.weight")


def quantize(weight, bits, group_size, symmetric=False):
    """Round to nearest: unsigned numbers ``[out, in]``, scales FP16 and unsigned zero points ``[out, G]``."""
    groups = weight.float().unflatten(1, (-1, weight.shape[1] if group_size == -1 else group_size))
    most = 2**bits - 1
    if symmetric:
        scales = (groups.abs().amax(-1) / (2 ** (bits - 1) - 1)).half()
        zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.int64)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / most).half()
        zeros = (-low / scales.float()).round().clamp(0, most).long()
    numbers = (groups / scales.float()[..., None]).round() + zeros[..., None]
    return numbers.clamp(0, most).long().flatten(1), scales, zeros


def pack(numbers, bits, places=None):
    """Unsigned numbers ``[n, m]`` into int32 ``[n, m * bits / 32]``, row by row.

    Args:
        places: which number of a word is the first, counted from its lowest bits on, the second and so on.
    """
    count = 32 // bits
    words = np.zeros((numbers.shape[0], numbers.shape[1] // count), dtype=np.uint32)
    for place, number in enumerate(places or range(count)):
        for word in range(words.shape[1]):
            words[:, word] |= numbers[:, word * count + number].numpy().astype(np.uint32) << np.uint32(place * bits)
    return torch.from_numpy(words.view(np.int32))


def awq(weight, group_size):
    """Tensors by AutoAWQ's names, and the weight that they mean."""
    numbers, scales, zeros = quantize(weight, 4, group_size)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {"qweight": pack(numbers.T, 4, order), "qzeros": pack(zeros.T, 4, order), "scales": scales.T}
    return tensors, dequantized(numbers, scales, zeros)


def gptq(weight, group_size, bits=4, symmetric=True, desc_act=False, stored_offset=1, bias=False):
    """Tensors by AutoGPTQ's names, and the weight that they mean."""
    channels = weight.shape[1]
    size = channels if group_size == -1 else group_size
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(0)) if desc_act else torch.arange(channels)
    numbers, scales, zeros = quantize(weight[:, order], bits, group_size, symmetric)
    meant = dequantized(numbers, scales, zeros)[:, order.argsort()]
    tensors = {
        "qweight": pack(numbers[:, order.argsort()], bits).T,
        "qzeros": pack(zeros.T - stored_offset & 2**bits - 1, bits),
        "scales": scales.T,
        "g_idx": (order.argsort() // size).int(),
    }
    if bias:
        tensors["bias"] = torch.zeros(len(weight), dtype=torch.float16)
    return tensors, meant


def dequantized(numbers, scales, zeros):
    """``(q - z) * s``, group by group."""
    groups = numbers.unflatten(1, (scales.shape[1], -1)) - zeros[..., None]
    return (groups.float() * scales.float()[..., None]).flatten(1)


def quantized_checkpoint(source: Path, folder: Path, settings: dict, write, layer=is_decoder_linear):
    """Write a checkpoint with its layers quantised, and in ``plain`` beside them what they mean.

    Args:
        source: a checkpoint of one file.
        folder: a new one; gets ``quantized`` and ``plain``.
        settings: of ``quantization_config``.
        write: a weight to the tensors of its layer, by the rest of their names, and the weight that they mean.
        layer: which weights.
    """
    for name in ("quantized", "plain"):
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    (folder / "quantized" / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    tensors = {name: tensor.half() for name, tensor in load_file(source / "model.safetensors").items()}
    quantized = {name: tensor for name, tensor in tensors.items() if not layer(name)}
    for name in tensors.keys() - quantized.keys():
        parts, meant = write(tensors[name])
        tensors[name] = meant.half()
        named = {name.removesuffix("weight") + leaf: part.contiguous() for leaf, part in parts.items()}
        quantized = named | quantized  # a bias of the model's own stays
    for name, content in (("quantized", quantized), ("plain", tensors)):
        save_file(content, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder / "quantized", folder / "plain"


def packed_tensors(weight, bits, group_size, symmetric=True, desc_act=False, zeros_packed=True):
    """Tensors of compressed-tensors' ``pack-quantized``, and the weight that they mean."""
    channels = weight.shape[1]
    size = channels if group_size == -1 else group_size
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(0)) if desc_act else torch.arange(channels)
    numbers, scales, zeros = quantize(weight[:, order], bits, group_size, symmetric)
    meant = dequantized(numbers, scales, zeros)[:, order.argsort()]
    numbers, count = numbers[:, order.argsort()], 32 // bits
    tensors = {
        "weight_packed": pack(torch.nn.functional.pad(numbers, (0, -channels % count)), bits),
        "weight_shape": torch.tensor(weight.shape),
        "weight_scale": scales,
    }
    if not symmetric:
        padded = torch.nn.functional.pad(zeros.T, (0, -len(weight) % count))
        tensors["weight_zero_point"] = pack(padded, bits).T if zeros_packed else (zeros - 2 ** (bits - 1)).char()
    if desc_act:
        tensors["weight_g_idx"] = (order.argsort() // size).int()
    return tensors, meant


def int8_tensors(weight, strategy="channel", symmetric=True):
    """Tensors of compressed-tensors' ``int-quantized``, and the weight that they mean."""
    rows = weight.reshape(1, -1) if strategy == "tensor" else weight
    numbers, scales, zeros = quantize(rows, 8, -1, symmetric)
    meant = dequantized(numbers, scales, zeros).view(weight.shape)
    tensors = {"weight": (numbers - 128).char().view(weight.shape), "weight_scale": scales}
    if strategy == "tensor":
        tensors["weight_scale"] = scales[0]
    if not symmetric:
        tensors["weight_zero_point"] = (zeros - 128).char().view(tensors["weight_scale"].shape)
    return tensors, meant


def fp8_tensors(weight, strategy="channel", block=128):
    """Tensors of compressed-tensors' ``float-quantized``, and the weight that they mean."""
    weight, (out, channels) = weight.float(), weight.shape
    rows, columns = {"tensor": (out, channels), "channel": (1, channels), "block": (block, block)}[strategy]
    scales, numbers = torch.zeros(-(-out // rows), -(-channels // columns)), torch.zeros(out, channels)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = (weight[part].abs().max() / 448).bfloat16()
            numbers[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn).float()
    meant = torch.stack([numbers[i] * scales[i // rows].repeat_interleave(columns)[:channels] for i in range(out)])
    tensors = {
        "weight": numbers.to(torch.float8_e4m3fn),
        "weight_scale": (scales[0] if strategy == "tensor" else scales).bfloat16(),
    }
    if strategy == "tensor":  # FP8 static
        tensors["input_scale"] = torch.ones(1).bfloat16()
    return tensors, meant


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def nvfp4(weight):
    """Codes ``[out, in]``, E4M3 scales ``[out, in / 16]``, their own FP32 scale, and the weight that they mean."""
    groups = weight.float().unflatten(1, (-1, 16))
    overall = groups.abs().max() / (6 * 448)
    scales = (groups.abs().amax(-1) / 6 / overall).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    step = scales.float()[..., None] * overall
    numbers = torch.tensor(E2M1)
    codes = ((groups / step)[..., None] - numbers).abs().argmin(-1)
    return codes.flatten(1), scales, overall, (numbers[codes] * step).flatten(1)


def pairs(codes):
    """Two numbers of 4 bits a byte, the first in the lower bits: ``[n, m]`` to ``[n, m / 2]`` uint8."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).byte()


def modelopt_nvfp4(weight, smoothing=None):
    """Tensors of Model Optimizer's NVFP4, and the weight that they mean."""
    weight = weight if smoothing is None else weight / smoothing
    codes, scales, overall, meant = nvfp4(weight)
    tensors = {"weight": pairs(codes), "weight_scale": scales, "weight_scale_2": overall, "input_scale": torch.ones(())}
    return tensors | _smoothed(smoothing), meant if smoothing is None else meant * smoothing


def modelopt_int4(weight, group_size, smoothing=None):
    """Tensors of Model Optimizer's INT4-AWQ, and the weight that they mean."""
    numbers, scales, zeros = quantize(
        weight if smoothing is None else weight / smoothing, 4, group_size, symmetric=True
    )
    meant = dequantized(numbers, scales, zeros)
    tensors = {"weight": pairs((numbers - zeros[:, :1] & 15).T).T, "weight_scale": scales.float()}
    return tensors | _smoothed(smoothing), meant if smoothing is None else meant * smoothing


def _smoothed(smoothing):
    return {} if smoothing is None else {"pre_quant_scale": smoothing}
