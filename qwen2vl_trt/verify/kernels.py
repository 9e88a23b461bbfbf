"""What a GPU could get wrong, each beside something plainer; on a CPU the same functions over what runs there.

Letters: H query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen2vl_trt import ops, varlen
from qwen2vl_trt.accuracy.recorder import in_patch_order
from qwen2vl_trt.benchmarks.cases import Case
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.hub import TINY, resolve_model
from qwen2vl_trt.layers import FP8Linear
from qwen2vl_trt.runtime.backends import torch_runner
from qwen2vl_trt.runtime.backends.paged_cache import PAGE, pages_of
from qwen2vl_trt.runtime.backends.runners import Engines, open_engines
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.runtime.backends.torch_attention import PageCache, PageStep
from qwen2vl_trt.runtime.backends.torch_runner import CudaDecoder, TorchVision
from qwen2vl_trt.runtime.options import PipelineOptions
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor, PreprocessorSettings

from .finding import Finding, equal, within
from .requests import GREEDY, requests

_VISION_HEADS = (16, 80)
_DECODER_HEADS = ((16, 2, 128), (28, 4, 128))
"""Of 3B and 7B."""
_LENGTHS = (1, 700, 512)
_AMPERE = (8, 0)


def fused_attention(device: torch.device, flash: bool | None = None) -> Finding:
    """Attention at the published head sizes, fused, beside softmax(q k) v in FP32.

    Args:
        device: of the tensors.
        flash: PyTorch's FlashAttention in BF16, by default on a GPU; else its scaled dot product in FP32.
    """
    flash = device.type == "cuda" if flash is None else flash
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _AMPERE:
        return Finding("skipped", "FlashAttention needs compute capability 8.0")
    dtype = torch.bfloat16 if flash else torch.float32
    errors = []
    heads, size = _VISION_HEADS
    q, k, v = (_noise((sum(_LENGTHS), heads, size), device, dtype, seed) for seed in range(3))
    parts = [[t.transpose(0, 1)[None] for t in each] for each in zip(*(t.split(_LENGTHS) for t in (q, k, v)))]
    if flash:
        bounds = torch.tensor([0, *accumulate(_LENGTHS)], dtype=torch.int32, device=device)
        found = varlen.packed_attention(q, k, v, bounds, max(_LENGTHS))
    else:
        found = torch.cat([ops.full_attention(q, k, v, causal=False)[0].transpose(0, 1) for q, k, v in parts])
    errors.append(_error(found, torch.cat([_plain(*part)[0].transpose(0, 1) for part in parts])))
    for heads, kv_heads, size in _DECODER_HEADS:
        pages = 1 + sum(map(pages_of, _LENGTHS))
        k, v = (_noise((pages, PAGE, kv_heads, size), device, dtype, seed) for seed in range(2))
        for new in ((1, 1, 1), (1, 200, 512)):  # a decode step, and one with prompts
            errors.append(_paged_error(_noise((sum(new), heads, size), device, dtype, 2), k, v, new, flash))
    words = "FlashAttention, BF16" if flash else "scaled dot product, FP32"
    return within(max(errors), 2e-2 if flash else 1e-5, words, "relative error")


@dataclass(frozen=True)
class _EagerTorch:
    """The torch backend with a decoder that captures no CUDA graph."""

    compiled: bool

    def load_vision(self, engines: Engines) -> TorchVision:
        return torch_runner.load_vision(engines)

    def load_decoder(self, engines: Engines) -> CudaDecoder:
        given = (engines.checkpoint, engines.manifest.profile, engines.precision.decoder, engines.device)
        return CudaDecoder(*given, cuda_graphs=False, compiled=self.compiled)

    def default_device(self) -> str:
        return torch_runner.default_device()


def decode_graphs(folder: Path, device: torch.device) -> Finding:
    """The torch backend's answers in FP32, as it decodes here (CUDA graphs on a GPU), beside the GPU's path without."""
    engines = open_engines(folder, str(device))
    eager = replace(engines, runner=_EagerTorch(compiled=device.type == "cuda"))
    found, expected = (_answers(each, PipelineOptions()) for each in (engines, eager))
    return equal(found, expected, "CUDA graphs, eager" if device.type == "cuda" else "plain steps, the GPU's steps")


def overlap(folder: Path, device: torch.device) -> Finding:
    """Answers with media on threads and vision on a stream of its own, beside one thing after the other."""
    engines = open_engines(folder, str(device))
    found, expected = (_answers(engines, PipelineOptions(overlap=overlap)) for overlap in (True, False))
    return equal(found, expected, "overlapped, serial")


@torch.no_grad()
def fp8_products(device: torch.device) -> Finding:
    """A linear layer over FP8 numbers beside the FP32 product of the same numbers."""
    dtype = torch.bfloat16
    layer = FP8Linear(nn.Linear(256, 512)).to(device)
    layer.bias.data = _noise((512,), device, dtype, 2)
    layer.weight.copy_((_noise((512, 256), device, torch.float32, 0) * 50).to(torch.float8_e4m3fn))
    layer.weight_scale.fill_(0.003)
    layer.input_scale.fill_(0.01)
    x = _noise((21, 256), device, dtype, 1)
    weight = ops.dequantize_fp8(layer.weight, layer.weight_scale, x.float())
    expected = ops.round_to_fp8(x.float(), layer.input_scale) @ weight.t() + layer.bias
    words = "torch._scaled_mm" if ops.has_scaled_mm(device) else "a product of the numbers in BF16"
    return within(_error(layer(x), expected), 2e-2, words, "relative error")


def preprocessor(device: torch.device) -> Finding:
    """Patches of many images in one call, made on the device, beside those of each alone on the CPU: bit for bit."""
    checkpoint = Checkpoint(resolve_model(TINY).folder)
    config, settings = checkpoint.config.vision, PreprocessorSettings.from_folder(checkpoint.folder)
    host, there = (Preprocessor(config, settings, place) for place in ("cpu", device))
    sizes = ((448, 448), (613, 847), (56, 84), (300, 64), (112, 130))
    images = Case("processor", "", sizes).make_images(device)
    expected = torch.cat([_patches(host, [image]).cpu() for image in images])
    same = _patches(there, images).cpu().equal(expected)
    return Finding("passed" if same else "failed", "bit for bit", len(sizes), "images")


def _patches(preprocessor: Preprocessor, images: list[Tensor]) -> Tensor:
    packed = preprocessor.preprocess(images)
    return in_patch_order(packed.pixel_values, packed.layout, preprocessor.config)


def _answers(engines: Engines, options: PipelineOptions) -> list[list[int]]:
    pipeline = Pipeline(engines, options)
    try:
        return [output.token_ids for output in pipeline.generate(requests(6), GREEDY)]
    finally:
        pipeline.close()


def _paged_error(q: Tensor, k: Tensor, v: Tensor, new: tuple[int, ...], flash: bool) -> float:
    """Of attention of the last ``new`` tokens of sequences of ``_LENGTHS``, packed ``[T, H, D]``, to a paged cache."""
    device, table = q.device, torch.zeros(len(new), max(map(pages_of, _LENGTHS)), dtype=torch.int32)
    order = iter(reversed(range(1, len(k))))  # neither page 0 nor neighbours
    for row, length in enumerate(_LENGTHS):
        for page in range(pages_of(length)):
            table[row, page] = next(order)
    chunks = [Chunk(row, length - count, count) for row, (length, count) in enumerate(zip(_LENGTHS, new))]
    cu_seqlens, lengths = (
        torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in ([0, *accumulate(new)], _LENGTHS)
    )
    table = table.to(device)
    step = PageStep(lengths, cu_seqlens, lengths, table, max(new), flash, chunks)  # nothing is written
    found = PageCache(k, v, step).attend(q.transpose(0, 1)[None])[0].transpose(0, 1).split(new)
    expected = []
    for row, (query, length) in enumerate(zip(q.split(new), _LENGTHS)):
        keys, values = (t[table[row].long()].flatten(0, 1)[:length].transpose(0, 1)[None] for t in (k, v))
        expected.append(_plain(query.transpose(0, 1)[None], keys, values)[0].transpose(0, 1))
    return _error(torch.cat(found), torch.cat(expected))


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q ``[B, H, S, D]`` to k, v ``[B, Hkv, N, D]``, in FP32; lower-right causal where H and Hkv differ (a decoder)."""
    grouped = q.shape[1] // k.shape[1]
    q, k, v = q.float(), *(t.float().repeat_interleave(grouped, 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    if grouped > 1:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def _noise(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((found.float() - expected).abs().max() / expected.abs().max())
