"""The torch backend on a GPU: its fast paths against the plain runners there. Skipped, saying so, without one."""

import shutil
import warnings

import pytest
import torch
from torch._inductor import config, metrics

from qwen2vl_trt import varlen
from qwen2vl_trt.benchmarks.random_model import random_checkpoint
from qwen2vl_trt.checkpoint import Checkpoint, read_header
from qwen2vl_trt.decoder import SlotMapping
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.layers import FP8Linear
from qwen2vl_trt.ops import has_scaled_mm
from qwen2vl_trt.runtime.backends.torch_decode_graphs import Chunk, ChunkCache, NewTokenCache, NewTokens
from qwen2vl_trt.runtime.backends.torch_runner import CudaDecoder, CudaVision, TorchDecoder, TorchVision
from qwen2vl_trt.transfer import PinnedReader
from qwen2vl_trt.windows import window_layout
from tests.support.compiled_steps import compilations, graph_breaks
from tests.support.models import edit_checkpoint, in_fp8_as_shared, relative_error, write_quantization

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

PROFILE = BuildProfile(
    min_hw_dims=4, max_hw_dims=1024, max_batch_size=4, max_num_seqs=4, max_input_len=512, max_seq_len=1024
)
GPU = torch.device("cuda", 0)
KINDS = CudaVision, TorchVision
GRIDS = ((1, 4, 10), (3, 6, 4), (1, 10, 18), (1, 2, 30), (1, 32, 32))


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint(resolve_model("tiny").folder)


def noise(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(GPU, dtype)


def ampere():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@pytest.mark.skipif(not ampere(), reason="FlashAttention needs Ampere or later")
def test_the_published_sizes_have_kernels(caplog):
    caplog.set_level("INFO")  # why not
    for question in (varlen.has_packed_attention, varlen.has_cache_attention):
        question.cache_clear()
    assert varlen.has_packed_attention(GPU, torch.bfloat16, 16, 80), caplog.text  # the vision tower's
    for heads, kv_heads in ((16, 2), (28, 4)):
        assert varlen.has_cache_attention(GPU, torch.bfloat16, heads, kv_heads, 128), caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vision_equals_the_padded_tower(checkpoint, dtype):
    layout = window_layout(GRIDS, checkpoint.config.vision)
    pixels = noise(*layout.sequence_position.shape, checkpoint.config.vision.qwen2_vl_dim, dtype=dtype)
    found, expected = (kind(checkpoint, dtype, GPU)(pixels, layout) for kind in (CudaVision, TorchVision))
    assert relative_error(found, expected) < (1e-4 if dtype == torch.float32 else 5e-2)


def answer(decoder, prompts, tokens, follow=None):
    """Logits of every step over prompts in neighbouring slots; its tokens are greedy, or always ``follow``."""
    logits, rows = [], []
    for slot, prompt in enumerate(prompts):
        positions = torch.arange(len(prompt)).expand(3, 1, -1)
        step = decoder.step(slot, decoder.embed(prompt)[None], positions, [0])
        rows.append(int(step.logits[0].argmax()))
    for number in range(tokens):
        starts = [len(prompt) + number for prompt in prompts]
        positions = torch.tensor(starts).expand(3, -1)[:, :, None]
        rows = rows if follow is None else [follow] * len(prompts)
        step = decoder.step(0, decoder.embed(rows)[:, None], positions, starts)
        logits.append(step.logits.clone())
        rows = step.logits.argmax(-1).tolist()
        if step.greedy is not None:
            assert step.greedy.tolist() == rows
    return torch.stack(logits)


@pytest.mark.parametrize("prompts", [1, 3, 4])
def test_graphs_equal_eager_and_plain_steps_in_fp32(checkpoint, prompts):
    rows = [list(range(10 + 17 * number, 30 + 40 * number)) for number in range(prompts)]
    graphs, eager, plain = (
        answer(decoder, rows, 150)  # through a bucket's end
        for decoder in (
            CudaDecoder(checkpoint, PROFILE, torch.float32, GPU),
            CudaDecoder(checkpoint, PROFILE, torch.float32, GPU, cuda_graphs=False),
            TorchDecoder(checkpoint, PROFILE, torch.float32, GPU),
        )
    )
    assert relative_error(graphs, eager) < 1e-4
    assert relative_error(graphs, plain) < 1e-4


def test_graphs_are_captured(checkpoint, caplog):
    decoder = CudaDecoder(checkpoint, PROFILE, torch.bfloat16, GPU)
    answer(decoder, [[5, 6, 7]], 3)
    assert list(decoder._graphs._replays) == [(1, 128)]
    assert not caplog.records


@pytest.mark.skipif(not ampere(), reason="FlashAttention needs Ampere or later")
@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (16, 2)])
def test_the_fused_kernel_equals_the_masked_one(heads, kv_heads):
    q, k, v = noise(3, heads, 1, 128), noise(3, kv_heads, 1000, 128), noise(3, kv_heads, 1000, 128)
    q, k, v = (t.bfloat16() for t in (q, k, v))
    lengths = torch.tensor([1, 700, 512], device=GPU)
    slot_mapping = SlotMapping(torch.arange(3, device=GPU), lengths - 1)
    fused, masked = (
        NewTokenCache(k, v, NewTokens.of(slot_mapping, lengths, 1000, q.dtype, cu_seqlens)).attend(q)
        for cu_seqlens in (varlen.CuSeqlens.of(3, k), None)
    )
    assert relative_error(fused, masked) < 2e-2


@pytest.mark.skipif(not ampere(), reason="FlashAttention needs Ampere or later")
@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (16, 2)])
@pytest.mark.parametrize("start", [0, 1, 300])
def test_the_fused_chunk_equals_the_masked_one(heads, kv_heads, start):
    q, k, v = noise(1, heads, 200, 128), noise(1, kv_heads, 1000, 128), noise(1, kv_heads, 1000, 128)
    end = start + q.shape[2]
    slot_mapping = SlotMapping(torch.zeros(200, dtype=torch.int64, device=GPU), torch.arange(start, end, device=GPU))
    fused = ChunkCache(k.bfloat16(), v.bfloat16(), Chunk(0, end, True, slot_mapping)).attend(q.bfloat16())
    assert relative_error(fused, ChunkCache(k, v, Chunk(0, end, False, slot_mapping)).attend(q)) < 2e-2


def test_a_step_never_waits_for_the_gpu(checkpoint):
    """What a step of the decoder does for a row: embed, step; the one wait is the caller's, for the tokens."""
    decoder = CudaDecoder(checkpoint, PROFILE, torch.bfloat16, GPU)
    answer(decoder, [[5, 6, 7], [8, 9]], 3)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for number in range(4):
                starts = [6 + number, 5 + number]
                positions = torch.tensor(starts).expand(3, -1)[:, :, None]
                step = decoder.step(0, decoder.embed([1, 2])[:, None], positions, starts)
            assert not [w for w in caught if "synchroniz" in str(w.message)]
            step.greedy.tolist()
        assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1, "the mode sees the caller's wait"
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_step_between_products_is_one_kernel(checkpoint, dtype):
    """Seven functions, one and several tokens: of the tower's four and the decoder's five, the latter twice."""
    before = metrics.generated_kernel_count
    with config.patch(force_disable_caches=True):
        vision, decoder = CudaVision(checkpoint, dtype, GPU), CudaDecoder(checkpoint, PROFILE, dtype, GPU)
    packs = varlen.has_packed_attention(GPU, dtype, vision.module.config.num_heads, vision.module.config.head_dim)
    assert metrics.generated_kernel_count - before == (4 if packs else 3) + 2 * 5
    assert decoder._ops.compiled
    assert vision._ops.compiled


def test_serving_compiles_nothing(checkpoint):
    """Nor does a capture, in which nothing could be compiled."""
    vision, decoder = (
        CudaVision(checkpoint, torch.bfloat16, GPU),
        CudaDecoder(checkpoint, PROFILE, torch.bfloat16, GPU),
    )
    before = compilations()
    for grids in ((GRIDS[0],), GRIDS):
        layout = window_layout(grids, checkpoint.config.vision)
        vision(noise(*layout.sequence_position.shape, vision.module.config.qwen2_vl_dim, dtype=torch.bfloat16), layout)
    for prompts in (1, 3, 4):
        answer(decoder, [list(range(5, 6 + 9 * number)) for number in range(prompts)], 5)
    assert compilations() == before
    assert not graph_breaks()


@pytest.mark.skipif(torch.cuda.is_available() and not has_scaled_mm(GPU), reason="FP8 products need Ada (8.9) or later")
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_fp8_products_equal_dequantised_ones(monkeypatch, bias):
    layer = FP8Linear(torch.nn.Linear(256, 512, bias=bias)).to(GPU)
    if bias:
        layer.bias.data = layer.bias.data.bfloat16()
    layer.weight.copy_((noise(512, 256) * 50).to(torch.float8_e4m3fn))
    layer.weight_scale.fill_(0.003)
    layer.input_scale.fill_(0.01)
    x = noise(3, 7, 256, dtype=torch.bfloat16)
    found = layer(x)
    monkeypatch.setattr("qwen2vl_trt.ops.has_scaled_mm", lambda device: False)
    assert relative_error(found, layer(x)) < 2e-2


@pytest.mark.skipif(torch.cuda.is_available() and not has_scaled_mm(GPU), reason="FP8 products need Ada (8.9) or later")
def test_fp8_engines_equal_dequantised_ones(tmp_path, monkeypatch, caplog):
    """Both of the tiny model, its layers joined and, where a side is no multiple of 16, padded; under CUDA graphs."""
    folder = shutil.copytree(resolve_model("tiny").folder, tmp_path / "tiny-fp8")
    edit_checkpoint(folder, in_fp8_as_shared)
    write_quantization(folder)
    checkpoint = Checkpoint(folder)
    layout = window_layout(GRIDS, checkpoint.config.vision)
    pixels = noise(*layout.sequence_position.shape, checkpoint.config.vision.qwen2_vl_dim, dtype=torch.bfloat16)
    found = []
    for product in (True, False):
        monkeypatch.setattr("qwen2vl_trt.ops.has_scaled_mm", lambda device, product=product: product)
        decoder = CudaDecoder(checkpoint, PROFILE, torch.bfloat16, GPU)
        steps = [decoder.step(0, decoder.embed([5, 6, 7])[None], torch.arange(3).expand(3, 1, -1), [0]).logits]
        for start in range(3, 7):
            position = torch.full((3, 1, 1), start)
            steps.append(decoder.step(0, decoder.embed([start])[None], position, [start]).logits.clone())
        found.append((CudaVision(checkpoint, torch.bfloat16, GPU)(pixels, layout), torch.stack(steps)))
    assert not caplog.records
    for one, other in zip(*found):
        assert torch.cosine_similarity(one.float().flatten(), other.float().flatten(), dim=0) > 0.99


@pytest.fixture(scope="module")
def published_widths(tmp_path_factory):
    """3B's, random weights, 2 layers and 8 blocks, of which the last sees whole images."""
    return Checkpoint(random_checkpoint("Qwen2.5-VL-3B", 2, 8, tmp_path_factory.mktemp("random")))


def test_vision_of_the_published_widths(published_widths):
    layout = window_layout(GRIDS, published_widths.config.vision)
    pixels = noise(*layout.sequence_position.shape, published_widths.config.vision.qwen2_vl_dim)
    expected = TorchVision(published_widths, torch.float32, GPU)(pixels, layout)
    found, plain = (kind(published_widths, torch.bfloat16, GPU)(pixels.bfloat16(), layout) for kind in KINDS)
    assert relative_error(found, expected) < 1.5 * relative_error(plain, expected) < 0.1


def test_decoder_of_the_published_widths(published_widths):
    rows = [list(range(10 + 17 * number, 30 + 140 * number)) for number in range(4)]
    expected, found, plain = (
        answer(decoder, rows, 20, follow=7)
        for decoder in (
            TorchDecoder(published_widths, PROFILE, torch.float32, GPU),
            CudaDecoder(published_widths, PROFILE, torch.bfloat16, GPU),
            TorchDecoder(published_widths, PROFILE, torch.bfloat16, GPU),
        )
    )
    assert relative_error(found, expected) < 1.5 * relative_error(plain, expected) < 0.1


def test_weights_arrive_bit_for_bit(checkpoint):
    """Through buffers far smaller than a tensor, so that both are in flight."""
    reader = PinnedReader(GPU, 4096)
    for path in {checkpoint.locate(name).path for name in checkpoint.names}:
        for name, location in read_header(path).items():
            assert torch.equal(reader.read(location).cpu(), checkpoint.load(name)), name
