"""What the torch backend does on a GPU, run on the CPU: stand-ins for the fused kernels and for CUDA graphs.

Compared with the plain runners on the same weights. tests/gpu/test_torch_runner.py compares on a GPU.
"""

import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qwen2vl_trt import Pipeline, Request, SamplingParams, fused_ops, ops, varlen
from qwen2vl_trt.benchmarks.random_model import config_of
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.precision import BF16
from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.fused_modules import FusedSwiGLU
from qwen2vl_trt.fused_ops import FusedOps
from qwen2vl_trt.runtime.backends import torch_graphs, torch_runner, weight_only
from qwen2vl_trt.runtime.backends.paged_cache import PAGE, page_bytes
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.runtime.backends.torch_runner import CudaDecoder, CudaVision, TorchDecoder, TorchVision
from qwen2vl_trt.runtime.backends.weight_only import WeightOnlyLinear
from qwen2vl_trt.windows import window_layout
from tests.runtime.test_weight_only import checkpoint_of
from tests.support.compiled_steps import compilations, graph_breaks, need_a_compiler
from tests.support.engine_folders import PROFILE, build
from tests.support.models import edit_checkpoint, in_fp8_as_shared, relative_error, write_quantization
from tests.support.recorded_graph import RecordedGraphs, opaque
from tests.support.varlen_reference import flash_attention

CPU = torch.device("cpu")
MIXES = [((1, 2, 2),), ((1, 4, 10), (3, 6, 4), (1, 10, 18), (1, 2, 30)), ((1, 8, 8), (1, 8, 16)), ((2, 8, 8),)]


@pytest.fixture
def kernels(request, monkeypatch):
    """The fused kernels, in FP32 as well: rounding would hide small errors. False: none."""
    fused = getattr(request, "param", True)
    monkeypatch.setattr(varlen, "flash_attention", flash_attention)
    for question in ("has_packed_attention", "has_paged_attention"):
        monkeypatch.setattr(torch_runner, question, lambda *args: fused)


@pytest.fixture(autouse=True)
def steps(request, monkeypatch):
    """Plain steps between products, for compiling takes seconds; compiled ones where a test is parametrised so."""
    if getattr(request, "param", "plain") == "plain":
        monkeypatch.setattr(FusedOps, "compile", lambda self, runs: None)
        return
    need_a_compiler()
    compile_one = fused_ops._compiled
    monkeypatch.setattr(fused_ops, "_compiled", lambda function: opaque(compile_one(function)))


COMPILED = pytest.mark.parametrize("steps", ["compiled"], indirect=True)
PLAIN_AND_COMPILED = pytest.mark.parametrize("steps", ["plain", "compiled"], indirect=True)


@pytest.fixture(scope="module")
def fp8_checkpoint(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "random"
    shutil.copytree(checkpoint, folder)
    edit_checkpoint(folder, in_fp8_as_shared)
    write_quantization(folder)
    return folder


def compare_fp8(plain, fast, dtype=torch.float32):
    """A prompt, and steps of one and of two sequences."""
    fast.cache.allot(2, 64)
    steps = [[Chunk(0, 0, 3)], *([Chunk(0, 3 + n, 1)] for n in range(3))]
    steps += [[Chunk(0, 6, 1), Chunk(1, 0, 9)], *([Chunk(1, 9 + n, 1), Chunk(0, 7 + n, 1)] for n in range(3))]
    generator = torch.Generator().manual_seed(0)
    for chunks in steps:
        positions = torch.cat([torch.arange(chunk.start, chunk.end) for chunk in chunks]).expand(3, -1)
        embeds = torch.randn(positions.shape[1], plain.module.config.hidden_size, generator=generator).to(dtype)
        found, expected = (decoder.step(chunks, embeds, positions).logits for decoder in (fast, plain))
        assert likeness(found, expected) > 0.99


def pixels(layout, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*layout.sequence_position.shape, 1176, generator=generator).to(dtype)


def likeness(found, expected):
    """Cosine: a last bit may turn the rounding of an FP8 number, which is an eighth of it."""
    return float(torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0))


class TestVision:
    @pytest.mark.parametrize("grids", MIXES)
    def test_packed_equals_padded(self, checkpoint, kernels, grids):
        opened = Checkpoint(checkpoint)
        layout = window_layout(grids, opened.config.vision)
        plain, packed = (kind(opened, torch.float32, CPU) for kind in (TorchVision, CudaVision))
        seen = []
        packed.module.blocks[0].attn.register_forward_hook(lambda attn, inputs, output: seen.append(output.shape[:2]))
        found = packed(pixels(layout), layout)
        assert seen == [(1, int(layout.window_lengths.sum()))], "empty slots were computed"
        assert relative_error(found, plain(pixels(layout), layout)) < 1e-5
        assert relative_error(packed(pixels(layout), layout), found) == 0

    @pytest.mark.parametrize("grids", MIXES)
    def test_without_kernels_it_pads(self, checkpoint, grids):
        opened = Checkpoint(checkpoint)
        layout = window_layout(grids, opened.config.vision)
        plain, padded = (kind(opened, torch.float32, CPU) for kind in (TorchVision, CudaVision))
        assert relative_error(padded(pixels(layout), layout), plain(pixels(layout), layout)) < 1e-5

    def test_a_layout_goes_to_the_device_once(self, checkpoint, kernels, monkeypatch):
        opened = Checkpoint(checkpoint)
        sent = []
        monkeypatch.setattr(torch_runner, "to_device", lambda tensor, device: sent.append(1) or tensor)
        vision = CudaVision(opened, torch.float32, CPU)
        first, second = (window_layout(grids, opened.config.vision) for grids in MIXES[:2])
        for layout in (first, second, first, second):
            before = len(sent)
            vision(pixels(layout), layout)
        assert len(sent) == before

    def test_fp8(self, fp8_checkpoint, kernels):
        opened = Checkpoint(fp8_checkpoint)
        layout = window_layout(MIXES[1], opened.config.vision)
        plain, packed = (kind(opened, torch.float32, CPU) for kind in (TorchVision, CudaVision))
        assert isinstance(packed.module.blocks[0].mlp, FusedSwiGLU)
        assert likeness(packed(pixels(layout), layout), plain(pixels(layout), layout)) > 0.999


class Pair:
    """A plain decoder and a fast one that are given the same steps; every output must agree.

    The plain one's rows are in FP32 or BF16 as the fast one's pages. Each slot of the fast one has pages for all that
    a slot may hold, spread over the cache; NaN is in all others and behind what a slot holds.
    """

    def __init__(self, checkpoint, dtype=torch.float32, tolerance=2e-5, profile=PROFILE, **options):
        self.capture, self.tolerance, self.dtype = RecordedGraphs(), tolerance, dtype
        self.plain = TorchDecoder(checkpoint, profile, dtype, CPU, quantized=options.get("quantized", False))
        self.fast = CudaDecoder(checkpoint, profile, dtype, CPU, **{"capture": self.capture} | options)
        self.width, self.capacity = checkpoint.config.text.hidden_size, profile.max_seq_len
        cache = self.fast.cache
        assert not any(tensor.any() for tensor in (*cache.k, *cache.v, cache.block_table)), "a trial left something"
        self.spread()

    def spread(self, seed=0):
        """Pages in a random order, and NaN in them all."""
        cache = self.fast.cache
        pages = 1 + np.random.default_rng(seed).permutation(cache.pages - 1)
        cache.block_table[:] = pages[: cache.block_table.size].reshape(cache.block_table.shape)
        for tensor in (*cache.k, *cache.v):
            tensor.fill_(torch.nan)
        self.held = [0] * self.fast.slots

    def step(self, chunks, seed, wanted=None):
        generator = torch.Generator().manual_seed(seed)
        tokens = sum(chunk.length for chunk in chunks)
        embeds = torch.randn(tokens + 3, self.width, generator=generator).to(self.dtype)[3:]  # a part of a prompt
        positions = torch.cat([torch.arange(chunk.start, chunk.end) for chunk in chunks])
        positions = torch.stack([positions, positions // 2, positions // 3])
        expected, found = (
            decoder.step(chunks, embeds, positions, wanted, hidden=True) for decoder in (self.plain, self.fast)
        )
        assert found.logits.shape == (len(chunks) if wanted is None else len(wanted), expected.logits.shape[1])
        assert found.hidden_states.shape == (tokens, self.width)
        assert relative_error(found.hidden_states, expected.hidden_states) < self.tolerance
        if len(found.logits):
            assert torch.equal(found.greedy, found.logits.argmax(-1))
            if self.dtype == torch.float32:
                assert relative_error(found.logits, expected.logits) < self.tolerance
        for chunk in chunks:
            self.held[chunk.slot] = chunk.end

    def mix(self, seed, steps, longest=None, most_tokens=10**6):
        """Random steps: answers beside chunks of several lengths, in any order of slots, some begun anew."""
        numbers, longest = random.Random(seed), longest or self.capacity
        for number in range(steps):
            left, chunks, lengths = most_tokens, [], numbers.choice([(0,), (0, 0, 0, 3), (0, 3, 90), (200,), (700,)])
            for slot in numbers.sample(range(len(self.held)), numbers.randint(1, len(self.held))):
                start, most = self.held[slot], numbers.choice(lengths)
                if start >= longest or (most and numbers.random() < 0.3) or not (start or left):
                    start = 0
                length = 1 if not most and start else numbers.randint(1, max(min(most, longest - start, left), 1))
                if length > 1 or not start:
                    if length > left:
                        continue
                    left -= length
                chunks.append(Chunk(slot, start, length))
            if not chunks:
                continue
            some = [number for number in range(len(chunks)) if numbers.random() < 0.7]
            self.step(chunks, 1000 * seed + number, numbers.choice([None, some]))


FUSED = pytest.mark.parametrize("kernels", [True, False], indirect=True, ids=["fused", "masked"])
MANY = replace(PROFILE, max_num_seqs=12)
"""More sequences than the smaller graphs for prompts take."""


class TestDecoder:
    @FUSED
    @pytest.mark.parametrize("profile", [PROFILE, MANY], ids=["4 slots", "12 slots"])
    @pytest.mark.parametrize("graphs", [True, False])
    def test_random_mixes_equal_the_plain_decoder(self, checkpoint, kernels, profile, graphs):
        pair = Pair(Checkpoint(checkpoint), profile=profile, cuda_graphs=graphs)
        where = [cache.data_ptr() for cache in pair.fast.cache.k]
        for seed in range(3):
            pair.mix(seed, 25)
            pair.plain.reset()
            pair.fast.reset()
            pair.spread(seed + 1)
        assert [cache.data_ptr() for cache in pair.fast.cache.k] == where, "graphs have its address"
        assert (pair.capture.replays > pair.capture.captures > 3) == graphs

    @FUSED
    def test_bf16(self, checkpoint, kernels):
        pair = Pair(Checkpoint(checkpoint), torch.bfloat16, 5e-2, MANY)
        pair.mix(0, 12, longest=600)
        for step in range(4):
            pair.step([Chunk(slot, pair.held[slot], 1) for slot in range(12)], step)
        assert pair.capture.captures > 2
        assert pair.capture.replays >= 3

    def test_fp8(self, fp8_checkpoint, kernels):
        opened, capture = Checkpoint(fp8_checkpoint), RecordedGraphs()
        plain = TorchDecoder(opened, PROFILE, torch.float32, CPU)
        fast = CudaDecoder(opened, PROFILE, torch.float32, CPU, True, capture)
        compare_fp8(plain, fast)
        assert capture.replays == 5

    @pytest.mark.parametrize("profile", [PROFILE, MANY], ids=["4 slots", "12 slots"])
    def test_every_token_bucket_of_prompts(self, checkpoint, kernels, profile):
        """Of a few sequences and of more; twice each, first as it is and then replayed. Above the largest: eager."""
        pair = Pair(Checkpoint(checkpoint), profile=profile)
        for sequences in {3, profile.max_num_seqs}:
            for tokens in (sequences + 1, 63, 64, 65, 128, 200, 512, 513, 1024, 1900, 2048, 2049):
                shares = [tokens // sequences + (number < tokens % sequences) for number in range(sequences)]
                for again in range(2):
                    chunks = [Chunk(slot, again, length) for slot, length in enumerate(shares[: sequences - 1])]
                    chunks.append(Chunk(sequences - 1, 0, shares[-1]))
                    if max(chunk.end for chunk in chunks) > profile.max_seq_len:
                        continue
                    pair.step(chunks, tokens)
        shapes = list(pair.fast._steps._replays)
        assert {shape.tokens for shape in shapes} == {64, 128, 256, 512, 1024, 2048}
        assert len(shapes) == pair.capture.captures == (12 if profile is MANY else 6)
        assert pair.capture.replays > pair.capture.captures

    @FUSED
    def test_decode_buckets(self, checkpoint, kernels):
        pair = Pair(Checkpoint(checkpoint), profile=MANY)
        counts = range(1, 13)
        pair.step([Chunk(slot, 0, 2 + 20 * slot) for slot in range(12)], 0)
        before = pair.capture.captures
        for count in (*counts, *counts):
            pair.step([Chunk(slot, pair.held[slot], 1) for slot in reversed(range(12 - count, 12))], count)
        decode = [shape for shape in pair.fast._steps._replays if shape.longest == 1]
        assert sorted({shape.sequences for shape in decode}) == [1, 2, 4, 8, 12]
        assert pair.capture.captures - before == len(decode) <= (5 if pair.fast._steps._fused else 10)
        assert pair.capture.replays == 24 - len(decode)

    def test_the_first_step_of_a_shape_runs_eagerly_and_the_second_replays(self, checkpoint, kernels):
        pair = Pair(Checkpoint(checkpoint))
        done = []
        for start in range(3):
            pair.step([Chunk(2, start, 1), Chunk(0, start, 1)], start)
            done.append((pair.capture.captures, pair.capture.replays))
        for start in (0, 40, 80):
            pair.step([Chunk(1, start, 40)], start)
            done.append((pair.capture.captures, pair.capture.replays))
        assert done == [(1, 0), (1, 1), (1, 2), (2, 2), (2, 3), (2, 4)]

    def test_a_number_of_the_host_in_a_captured_step_shows(self, checkpoint, kernels, monkeypatch):
        """What the recording is for: with the first step's keys built into it, the second step is wrong."""
        stale = {}
        made = torch_graphs.PageStep

        def baked(mapping, cu_seqlens, lengths, *others):
            return made(mapping, cu_seqlens, stale.setdefault(len(lengths), lengths.clone()), *others)

        monkeypatch.setattr(torch_graphs, "PageStep", baked)
        pair = Pair(Checkpoint(checkpoint))
        pair.step([Chunk(0, 0, 1)], 0)
        with pytest.raises(AssertionError):
            pair.step([Chunk(0, 1, 1)], 1)

    @FUSED
    def test_shared_pages(self, checkpoint, kernels):
        """Two sequences with the same first page, which only the first wrote."""
        pair = Pair(Checkpoint(checkpoint))
        shared = PAGE + 40
        pair.step([Chunk(0, 0, shared)], 0)
        pair.plain.cache.copy_prefix(0, 3, PAGE)
        pair.fast.cache.block_table[3, 0] = pair.fast.cache.block_table[0, 0]
        first = pair.fast.cache.k[0][pair.fast.cache.block_table[0, 0]].clone()
        pair.step([Chunk(3, PAGE, 30), Chunk(0, shared, 1)], 1)
        for step in range(4):
            pair.step([Chunk(slot, pair.held[slot], 1) for slot in (3, 0)], 2 + step)
        assert torch.equal(pair.fast.cache.k[0][pair.fast.cache.block_table[0, 0]], first)

    @FUSED
    def test_nan_of_another_never_arrives(self, checkpoint, kernels):
        """In the embeddings of one request: in its own results alone, whatever pads later steps with what it left."""
        pair = Pair(Checkpoint(checkpoint), profile=MANY)
        for length in (70, 1):
            chunks = [Chunk(slot, 0, length) for slot in range(3)]
            embeds, positions = torch.zeros(3 * length, pair.width), torch.zeros(3, 3 * length, dtype=torch.long)
            embeds[length:] = torch.nan
            states = pair.fast.step(chunks, embeds, positions, hidden=True).hidden_states
            assert states[:length].isfinite().all()
            assert states[length:].isnan().all()
        pair.step([Chunk(slot, 0, 65) for slot in (0, 5, 6)], 0)  # of 256: 61 tokens pad
        for number in range(6):  # of 4: one pads
            pair.step([Chunk(slot, pair.held[slot], 1) for slot in (0, 5, 6)], number)

    @FUSED
    @pytest.mark.parametrize("sequences", [1, 4, 12])
    def test_a_warm_up_captures_every_shape_that_later_steps_use(self, checkpoint, kernels, sequences):
        for most_tokens, longest in ((512, 700), (30, 250), (90, 600)):
            pair = Pair(Checkpoint(checkpoint), profile=replace(PROFILE, max_num_seqs=sequences))
            pair.fast.warm_up(most_tokens, longest)
            captured = pair.capture.captures
            assert 0 < captured <= 26
            pair.spread()
            before = pair.capture.replays
            pair.mix(0, 40, longest, most_tokens)
            assert pair.capture.captures == captured, "captured while an answer waited"
            assert pair.capture.replays - before > (25 if pair.fast._steps._fused else 5)

    @pytest.mark.parametrize(("sequences", "graphs"), [(64, 7 + 12), (256, 9 + 17)])
    def test_graphs_are_few(self, checkpoint, kernels, sequences, graphs):
        """Whatever prompts and answers meet."""
        profile = replace(PROFILE, max_num_seqs=sequences)
        decoder = CudaDecoder(Checkpoint(checkpoint), profile, torch.float32, CPU, False, pages=4)
        steps = decoder._steps
        made = [steps._shape(chunks, sum(chunk.length for chunk in chunks)) for chunks in steps.shapes(700, 512)]
        assert len(made) == len(set(made)) == graphs
        numbers = random.Random(0)
        for _ in range(300):
            lengths = [numbers.choice([1, 1, numbers.randint(1, 500)]) for _ in range(numbers.randint(1, sequences))]
            if sum(lengths) <= torch_graphs.MOST_CAPTURED:
                chunks = [Chunk(slot, 0, length) for slot, length in enumerate(lengths)]
                assert steps._shape(chunks, sum(lengths)) in made

    def test_what_fails_to_be_captured_runs_as_it_is(self, checkpoint, kernels, caplog):
        def refuse(body):
            raise RuntimeError("operation not permitted when stream is capturing")

        Pair(Checkpoint(checkpoint), capture=refuse).mix(0, 20)
        assert [r.message for r in caplog.records] == [
            "the decoder goes on without CUDA graphs, which costs time:"
            " operation not permitted when stream is capturing"
        ]

    def test_full_slots(self, checkpoint, kernels):
        """The last position may be written, beside others; what pads writes to page 0 alone."""
        pair = Pair(Checkpoint(checkpoint))
        full = PROFILE.max_seq_len
        pair.step([Chunk(0, 0, full - 2), Chunk(1, 0, 5), Chunk(2, 0, full)], 0)
        cache = pair.fast.cache
        kept = cache.k[0][cache.block_table[2]].clone()
        for step in range(2):
            pair.step([Chunk(1, 5 + step, 1), Chunk(0, full - 2 + step, 1), Chunk(3, step, 1)], step)
        assert torch.equal(cache.k[0][cache.block_table[2]].nan_to_num(), kept.nan_to_num())


class TestMemory:
    """Pages are as many as GPU memory has room for."""

    def config(self, name, **options):
        return Qwen2VLConfig.from_dict(config_of(name, **options)).text

    def pages(self, config, profile, free, monkeypatch, most=None):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
        made = []
        monkeypatch.setattr(torch_runner, "PagedKVCache", lambda *args: made.append(args))
        decoder = CudaDecoder.__new__(CudaDecoder)
        decoder.slots, decoder.device, decoder._most_pages = profile.max_num_seqs, torch.device("cuda", 0), most
        decoder._allocate(config, profile.max_seq_len, torch.bfloat16)
        return made[0][3]

    def test_7b_beside_139_gib(self, monkeypatch):
        """A token takes 2 x 28 layers x 4 heads x 128 numbers and a row of 3,584 embeddings, 64,512 bytes in BF16."""
        config = self.config("Qwen2.5-VL-7B")
        assert page_bytes(config, torch.bfloat16) == 256 * 64_512
        profile = replace(PROFILE, max_num_seqs=256, max_seq_len=32_768)
        tokens = 256 * self.pages(config, profile, 139 * 2**30, monkeypatch)
        assert tokens == 2_082_048  # 0.9 x 139 GiB / 64,512, in whole pages
        profile = replace(profile, max_num_seqs=4)
        assert self.pages(config, profile, 139 * 2**30, monkeypatch) == 1 + 4 * 128, "no more than slots can hold"

    def test_one_sequence_must_fit(self, monkeypatch):
        config = self.config("Qwen2.5-VL-7B")
        profile = replace(PROFILE, max_num_seqs=4, max_seq_len=32_768)
        with pytest.raises(EngineError) as refused:
            self.pages(config, profile, 2 * 2**30, monkeypatch)
        assert str(refused.value) == (
            "the cache of one sequence of 32,768 tokens takes 2.0 GiB, and the GPU has 1.8 GiB for it."
            " Lower --max-seq-len, or free GPU memory."
        )
        needed = 129 * page_bytes(config, torch.bfloat16)
        assert self.pages(config, profile, int(needed / 0.9) + 2, monkeypatch) == 129, "page 0, and one sequence"

    def test_a_number_that_is_given(self, monkeypatch):
        assert self.pages(self.config("Qwen2.5-VL-3B"), PROFILE, 0, monkeypatch, most=7) == 1 + 7


class TestCompiled:
    """The steps between matrix products, compiled for a CPU."""

    @COMPILED
    @pytest.mark.parametrize("fused", [True, False])
    def test_vision(self, checkpoint, request, fused):
        if fused:
            request.getfixturevalue("kernels")
        opened = Checkpoint(checkpoint)
        plain, packed = (kind(opened, torch.float32, CPU) for kind in (TorchVision, CudaVision))
        before = compilations()
        for grids in MIXES:
            layout = window_layout(grids, opened.config.vision)
            assert relative_error(packed(pixels(layout), layout), plain(pixels(layout), layout)) < 1e-5
        assert compilations() == before, "a layout compiled something anew"

    @COMPILED
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_random_mixes_of_steps(self, checkpoint, kernels, dtype):
        pair = Pair(Checkpoint(checkpoint), dtype, 2e-5 if dtype == torch.float32 else 5e-2)
        before = compilations()
        for seed in range(3):
            pair.mix(seed, 25)
            pair.plain.reset()
            pair.fast.reset()
            pair.spread(seed + 1)
        assert pair.capture.replays > pair.capture.captures > 3
        assert compilations() == before, "a step or its capture compiled something anew"
        assert not graph_breaks()

    @COMPILED
    def test_callers_in_inference_mode_compile_nothing_anew(self, checkpoint, kernels):
        opened = Checkpoint(checkpoint)
        vision, decoder = (
            CudaVision(opened, torch.float32, CPU),
            CudaDecoder(opened, PROFILE, torch.float32, CPU, False),
        )
        before, width = compilations(), opened.config.text.hidden_size
        with torch.inference_mode():
            layout = window_layout(MIXES[0], opened.config.vision)
            vision(pixels(layout), layout)
            for chunks in ([Chunk(0, 0, 5)], [Chunk(0, 5, 1)], [Chunk(0, 6, 1), Chunk(1, 0, 1)]):
                tokens = sum(chunk.length for chunk in chunks)
                decoder.step(chunks, torch.randn(tokens, width), torch.zeros(3, tokens).long())
        assert compilations() == before

    @COMPILED
    def test_fp8(self, fp8_checkpoint, kernels, monkeypatch):
        """Products of FP8 numbers, which PyTorch has on the CPU too: steps give them FP8, and BF16 is never stored."""
        monkeypatch.setattr(ops, "has_scaled_mm", lambda device: True)
        opened, capture, dtype = Checkpoint(fp8_checkpoint), RecordedGraphs(), torch.bfloat16
        layout = window_layout(MIXES[1], opened.config.vision)
        plain, packed = (kind(opened, dtype, CPU) for kind in (TorchVision, CudaVision))
        assert (
            likeness(packed(pixels(layout, dtype), layout).float(), plain(pixels(layout, dtype), layout).float()) > 0.99
        )
        plain = TorchDecoder(opened, PROFILE, dtype, CPU)
        fast = CudaDecoder(opened, PROFILE, dtype, CPU, True, capture)
        seen = []
        for layer in fast.module.model.layers:
            for part in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
                part.register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0].dtype))
        compare_fp8(plain, fast, dtype)
        assert set(seen) == {torch.float8_e4m3fn}
        assert capture.replays == 5

    @COMPILED
    def test_what_cannot_be_compiled_runs_as_it_is(self, checkpoint, kernels, monkeypatch, caplog):
        def refuse(*args):
            raise RuntimeError("Cannot find a working triton installation.\n  More information on installing")

        monkeypatch.setattr(fused_ops, "_compiled", lambda function: refuse)
        Pair(Checkpoint(checkpoint)).mix(0, 20)
        assert [r.message for r in caplog.records] == [
            "the steps between matrix products are not compiled, which costs time:"
            " RuntimeError: Cannot find a working triton installation. More information on installing"
        ]

    @COMPILED
    def test_it_can_be_turned_off(self, checkpoint):
        opened, before = Checkpoint(checkpoint), compilations()
        decoder = CudaDecoder(opened, PROFILE, torch.float32, CPU, False, compiled=False)
        decoder.step([Chunk(0, 0, 1)], torch.zeros(1, opened.config.text.hidden_size), torch.zeros(3, 1).long())
        CudaVision(opened, torch.float32, CPU, compiled=False)
        assert compilations() == before


@PLAIN_AND_COMPILED
def test_answers_equal_those_of_the_plain_runners(checkpoint, tmp_path, kernels):
    """The whole pipeline: images, prompts of all lengths, slots that come and go, greedy and sampled."""
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
        for size in ((60, 170), (84, 84), (200, 60), (33, 95))
    ]
    requests = [Request("What digits are in the image?", [image]) for image in images]
    requests += [Request("Who are you?"), Request("What digits are in the images?", images[:2])]
    params = [
        SamplingParams(max_tokens=5 + 7 * number, ignore_eos=True, temperature=number % 2, seed=number)
        for number in range(len(requests))
    ]
    folder = build(checkpoint, tmp_path, "torch", "fp32")
    plain = Pipeline.from_engine_dir(folder, "cpu")
    engines, capture = open_engines(folder, "cpu"), RecordedGraphs()
    engines.__dict__["vision"] = CudaVision(engines.checkpoint, engines.dtype, CPU)
    engines.__dict__["decoder"] = CudaDecoder(
        engines.checkpoint, engines.manifest.profile, engines.precision.decoder, CPU, True, capture
    )
    fast = Pipeline(engines)
    for _ in range(2):
        answers = [[o.token_ids for o in pipeline.generate(requests, params)] for pipeline in (plain, fast)]
        assert answers[0] == answers[1]
    assert capture.replays > capture.captures > 1


def test_a_gpu_gets_the_fast_runners(monkeypatch):
    made = {}
    for name in ("TorchVision", "CudaVision", "TorchDecoder", "CudaDecoder"):
        monkeypatch.setattr(
            torch_runner, name, lambda *args, name=name, **others: made.setdefault(args[-1].type, []).append(name)
        )
    for device in ("cpu", "cuda"):
        engines = SimpleNamespace(
            checkpoint=None,
            dtype=None,
            device=torch.device(device),
            manifest=SimpleNamespace(profile=None),
            precision=BF16,
            adapters={},
        )
        torch_runner.load_vision(engines)
        torch_runner.load_decoder(engines)
    assert made == {"cpu": ["TorchVision", "TorchDecoder"], "cuda": ["CudaVision", "CudaDecoder"]}


@FUSED
@pytest.mark.parametrize("name", ["awq", "gptq", "nvfp4"])
def test_weights_of_4_and_8_bits(name, kernels, monkeypatch):
    """Layers that nothing joins. In FP32, as those for which a GPU has no product: its own are rounded to BF16."""
    monkeypatch.setattr(weight_only, "int4_rows", lambda: 0)
    monkeypatch.setattr(weight_only, "has_int8", lambda: False)
    pair = Pair(Checkpoint(checkpoint_of(name)), quantized=True)
    layers = pair.fast.module.model.layers
    assert all(isinstance(layer.self_attn.q_proj, WeightOnlyLinear) for layer in layers)
    assert all(isinstance(layer.mlp.gate_proj, WeightOnlyLinear) for layer in layers)
    pair.mix(0, 12)
