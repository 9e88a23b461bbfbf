"""The torch backend on a GPU: its fast paths against the plain runners there. Skipped, saying so, without one."""

import shutil
import warnings

import pytest
import torch
from torch._inductor import config, metrics

from qwen2vl_trt import varlen
from qwen2vl_trt.benchmarks.random_model import random_checkpoint
from qwen2vl_trt.checkpoint import Checkpoint, read_header
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.layers import FP8Linear
from qwen2vl_trt.ops import has_scaled_mm
from qwen2vl_trt.runtime.backends.paged_cache import PAGE
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.runtime.backends.torch_attention import PageCache, PageStep
from qwen2vl_trt.runtime.backends.torch_graphs import Shape
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
    for question in (varlen.has_packed_attention, varlen.has_paged_attention):
        question.cache_clear()
    assert varlen.has_packed_attention(GPU, torch.bfloat16, 16, 80), caplog.text  # the vision tower's
    for heads, kv_heads in ((16, 2), (28, 4)):
        assert varlen.has_paged_attention(GPU, torch.bfloat16, heads, kv_heads, 128), caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vision_equals_the_padded_tower(checkpoint, dtype):
    layout = window_layout(GRIDS, checkpoint.config.vision)
    pixels = noise(*layout.sequence_position.shape, checkpoint.config.vision.qwen2_vl_dim, dtype=dtype)
    found, expected = (kind(checkpoint, dtype, GPU)(pixels, layout) for kind in (CudaVision, TorchVision))
    assert relative_error(found, expected) < (1e-4 if dtype == torch.float32 else 5e-2)


def decode(decoder, tokens, starts, slots=None):
    """A step that appends a token to each slot."""
    chunks = [Chunk(slot, start, 1) for slot, start in zip(slots or range(len(starts)), starts)]
    return decoder.step(chunks, decoder.embed(tokens), torch.tensor(starts).expand(3, -1))


def answer(decoder, prompts, tokens, follow=None):
    """Logits of every step over prompts; its tokens are greedy, or always ``follow``.

    The first prompts are read in one call; the last one in two, beside which the others already decode.
    """
    decoder.cache.allot(len(prompts), PROFILE.max_seq_len)
    logits, rows = [], []
    first = prompts[:-1] or prompts
    chunks = [Chunk(slot, 0, len(prompt)) for slot, prompt in enumerate(first)]
    positions = torch.cat([torch.arange(len(prompt)) for prompt in first]).expand(3, -1)
    step = decoder.step(chunks, decoder.embed([token for prompt in first for token in prompt]), positions)
    rows, starts = step.logits.argmax(-1).tolist(), [len(prompt) for prompt in first]
    if len(prompts) > 1:
        prompt, read = prompts[-1], 0
        for length in (len(prompt) // 2, len(prompt) - len(prompt) // 2):
            rows = rows if follow is None else [follow] * len(rows)
            chunks = [*(Chunk(slot, start, 1) for slot, start in enumerate(starts)), Chunk(len(first), read, length)]
            embeds = decoder.embed([*rows, *prompt[read : read + length]])
            positions = torch.cat([torch.tensor(starts), torch.arange(read, read + length)]).expand(3, -1)
            step = decoder.step(chunks, embeds, positions)
            read += length
            rows, starts = step.logits.argmax(-1).tolist(), [start + 1 for start in starts]
            last = rows.pop()
        rows, starts = [*rows, last], [*starts, len(prompt)]
    for _ in range(tokens):
        rows = rows if follow is None else [follow] * len(prompts)
        step = decode(decoder, rows, starts)
        logits.append(step.logits.clone())
        rows, starts = step.logits.argmax(-1).tolist(), [start + 1 for start in starts]
        if step.greedy is not None:
            assert step.greedy.tolist() == rows
    return torch.stack(logits)


@pytest.mark.parametrize("prompts", [1, 3, 4])
def test_graphs_equal_eager_and_plain_steps_in_fp32(checkpoint, prompts):
    rows = [list(range(10 + 17 * number, 30 + 40 * number)) for number in range(prompts)]  # 20 tokens and more
    graphs, eager, plain = (
        answer(decoder, rows, 300)  # through a page's end
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
    pages = PROFILE.max_seq_len // PAGE
    fused = decoder._steps._fused
    expected = [Shape(64, 9, pages, 64), Shape(1, 1, pages, 1)] if fused else [Shape(1, 1, 1, 1)]
    assert list(decoder._steps._replays) == expected
    assert not caplog.records


@pytest.mark.skipif(not ampere(), reason="FlashAttention needs Ampere or later")
@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (16, 2)])
@pytest.mark.parametrize("new", [(1, 1, 1), (200, 1, 33), (1, 400, 512)], ids=str)
def test_the_fused_kernel_equals_the_plain_one(heads, kv_heads, new):
    """Of answers, of chunks, and of both; what no sequence holds is NaN."""
    ends = (1 if new[0] == 1 else 700, 700, 512)
    k, v = (noise(13, PAGE, kv_heads, 128, dtype=torch.bfloat16).roll(shift, 0) for shift in range(2))
    table = 1 + torch.randperm(12, generator=torch.Generator().manual_seed(0)).view(3, 4)
    for row, end in enumerate(ends):
        for place in range(end, 4 * PAGE):
            k[table[row, place // PAGE], place % PAGE] = v[table[row, place // PAGE], place % PAGE] = torch.nan
    q = noise(1, heads, sum(new), 128, dtype=torch.bfloat16)
    cu_seqlens, lengths = (torch.tensor(of, dtype=torch.int32, device=GPU) for of in ([0, *new], ends))
    chunks = [Chunk(row, end - length, length) for row, (end, length) in enumerate(zip(ends, new))]
    fused, plain = (
        PageCache(
            k.to(dtype),
            v.to(dtype),
            PageStep(None, cu_seqlens.cumsum(0, dtype=torch.int32), lengths, table.int().to(GPU), max(new), on, chunks),
        ).attend(q.to(dtype))
        for on, dtype in ((True, torch.bfloat16), (False, torch.float32))
    )
    assert fused.isfinite().all()
    assert relative_error(fused, plain) < 2e-2


@pytest.mark.skipif(not ampere(), reason="FlashAttention needs Ampere or later")
def test_queries_before_the_first_key_give_zeros():
    """Those that fill up a captured step."""
    q, k = noise(6, 16, 128, dtype=torch.bfloat16), noise(1, PAGE, 2, 128, dtype=torch.bfloat16)
    bounds, lengths, table = (
        torch.tensor(of, dtype=torch.int32, device=GPU) for of in ([0, 5, 5, 6], [1, 1, 1], [[0], [0], [0]])
    )
    found = varlen.paged_attention(q, k, k, bounds, 5, lengths, table)
    assert not found[:4].any()
    assert relative_error(found[4:], k[0, :1].repeat_interleave(8, dim=1).expand(2, -1, -1)) < 2e-2


def test_a_step_never_waits_for_the_gpu(checkpoint):
    """What a step of the decoder does for a row: embed, step; the one wait is the caller's, for the tokens."""
    decoder = CudaDecoder(checkpoint, PROFILE, torch.bfloat16, GPU)
    answer(decoder, [[5, 6, 7], [8, 9, 10]], 3)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for number in range(4):
                step = decode(decoder, [1, 2], [8 + number, 7 + number])
            assert not [w for w in caught if "synchroniz" in str(w.message)]
            step.greedy.tolist()
        assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1, "the mode sees the caller's wait"
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_step_between_products_is_fused(checkpoint, dtype):
    """Four functions of the tower, and the decoder's five for one and for several tokens.

    PyTorch 2.11 makes one kernel of each, another release may make two; they are three to ten operators.
    """
    before = metrics.generated_kernel_count
    with config.patch(force_disable_caches=True):
        vision, decoder = CudaVision(checkpoint, dtype, GPU), CudaDecoder(checkpoint, PROFILE, dtype, GPU)
    assert 0 < metrics.generated_kernel_count - before <= 2 * (4 + 2 * 5)
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
        decoder.cache.allot(1, 8)
        steps = [decoder.step([Chunk(0, 0, 3)], decoder.embed([5, 6, 7]), torch.arange(3).expand(3, -1)).logits]
        steps += [decode(decoder, [start], [start]).logits.clone() for start in range(3, 7)]
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
