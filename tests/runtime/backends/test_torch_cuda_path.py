"""What the torch backend does on a GPU, run on the CPU: stand-ins for the fused kernels and for CUDA graphs.

Compared with the plain runners on the same weights. tests/gpu/test_torch_runner.py compares on a GPU.
"""

import random
import shutil
from types import SimpleNamespace

import pytest
import torch

from qwen2vl_trt import Pipeline, Request, SamplingParams, fused_ops, ops, varlen
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.fused_modules import FusedSwiGLU
from qwen2vl_trt.fused_ops import FusedOps
from qwen2vl_trt.runtime.backends import torch_runner
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.backends.torch_runner import CudaDecoder, CudaVision, TorchDecoder, TorchVision
from qwen2vl_trt.windows import window_layout
from tests.support.compiled_steps import compilations, graph_breaks, need_a_compiler
from tests.support.engine_folders import PROFILE, build
from tests.support.models import edit_checkpoint, in_fp8_as_shared, relative_error, write_quantization
from tests.support.recorded_graph import RecordedGraphs, opaque
from tests.support.varlen_reference import flash_attention

CPU = torch.device("cpu")
MIXES = [((1, 2, 2),), ((1, 4, 10), (3, 6, 4), (1, 10, 18), (1, 2, 30)), ((1, 8, 8), (1, 8, 16)), ((2, 8, 8),)]


@pytest.fixture
def kernels(monkeypatch):
    """The fused kernels, in FP32 as well: rounding would hide small errors."""
    monkeypatch.setattr(varlen, "flash_attention", flash_attention)
    monkeypatch.setattr(torch_runner, "has_packed_attention", lambda *args: True)
    monkeypatch.setattr(torch_runner, "has_cache_attention", lambda *args: True)


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


class Lockstep:
    """Two decoders given the same steps; every output must agree."""

    def __init__(self, plain, fast, tolerance):
        self.plain, self.fast, self.tolerance = plain, fast, tolerance

    def step(self, first, inputs_embeds, position_ids, starts, rows=None):
        expected = self.plain.step(first, inputs_embeds, position_ids, starts, hidden=True)
        found = self.fast.step(first, inputs_embeds, position_ids, starts, hidden=True)
        rows = range(len(starts)) if rows is None else rows
        for row in rows:
            assert relative_error(found.logits[row], expected.logits[row]) < self.tolerance
            assert relative_error(found.hidden_states[row], expected.hidden_states[row]) < self.tolerance
            assert int(found.greedy[row]) == int(found.logits[row].argmax())


class Near(Lockstep):
    """Two decoders in BF16: the likeliest token is the decoder's own."""

    def step(self, first, inputs_embeds, position_ids, starts, rows=None):
        expected = self.plain.step(first, inputs_embeds, position_ids, starts, hidden=True)
        found = self.fast.step(first, inputs_embeds, position_ids, starts, hidden=True)
        for row in range(len(starts)) if rows is None else rows:
            assert relative_error(found.hidden_states[row], expected.hidden_states[row]) < self.tolerance
            assert int(found.greedy[row]) == int(found.logits[row].argmax())


def random_steps(pair, seed, steps, slots, capacity, width, dtype=torch.float32):
    """Chunks of prompts and steps of neighbouring slots, some of which only stand between others."""
    numbers, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    held = [0] * slots
    for _ in range(steps):
        if numbers.random() < 0.3 or not any(held):
            slot = numbers.randrange(slots)
            start = numbers.choice([0, held[slot]])
            length = numbers.randint(1, min(numbers.choice([3, 200]), max(capacity - start, 1)))
            if start + length > capacity:
                start = 0
            embeds = torch.randn(1, length + 3, width, generator=generator).to(dtype)[:, 3:]  # a part of a prompt
            pair.step(slot, embeds, (torch.arange(length) + start).expand(3, 1, -1), [start])
            held[slot] = start + length
            continue
        first = numbers.randrange(slots)
        rows = range(first, numbers.randint(first, slots - 1) + 1)
        starts = [min(held[row], capacity - 1) for row in rows]
        embeds = torch.randn(len(rows), 1, width, generator=generator).to(dtype)
        positions = torch.tensor(starts).expand(3, -1)[:, :, None]
        taking_part = [number for number, row in enumerate(rows) if held[row] and numbers.random() < 0.8]
        pair.step(first, embeds, positions, starts, taking_part)
        for number in taking_part:
            held[rows[number]] = starts[number] + 1


class TestDecoder:
    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("graphs", [True, False])
    def test_random_mixes_equal_the_plain_decoder(self, checkpoint, request, fused, graphs):
        if fused:
            request.getfixturevalue("kernels")
        opened, capture = Checkpoint(checkpoint), RecordedGraphs()
        plain = TorchDecoder(opened, PROFILE, torch.float32, CPU)
        fast = CudaDecoder(opened, PROFILE, torch.float32, CPU, graphs, capture)
        where = [cache.data_ptr() for cache in fast.cache.k]
        for seed in range(3):
            random_steps(
                Lockstep(plain, fast, 2e-5), seed, 60, fast.slots, PROFILE.max_seq_len, opened.config.text.hidden_size
            )
            plain.reset()
            fast.reset()
        assert [cache.data_ptr() for cache in fast.cache.k] == where, "graphs have its address"
        assert (capture.replays > 3 * capture.captures > 6) == graphs

    def test_fp8(self, fp8_checkpoint, kernels):
        opened, capture = Checkpoint(fp8_checkpoint), RecordedGraphs()
        plain = TorchDecoder(opened, PROFILE, torch.float32, CPU)
        fast = CudaDecoder(opened, PROFILE, torch.float32, CPU, True, capture)
        embeds = torch.randn(8, 1, opened.config.text.hidden_size, generator=torch.Generator().manual_seed(0))
        for start, row in enumerate(embeds[:, None]):
            found, expected = (d.step(0, row, torch.full((3, 1, 1), start), [start]).logits for d in (fast, plain))
            assert likeness(found, expected) > 0.99
        assert capture.replays == 7

    def test_what_fails_to_be_captured_runs_as_it_is(self, checkpoint, caplog):
        def refuse(body):
            raise RuntimeError("operation not permitted when stream is capturing")

        opened = Checkpoint(checkpoint)
        plain = TorchDecoder(opened, PROFILE, torch.float32, CPU)
        fast = CudaDecoder(opened, PROFILE, torch.float32, CPU, True, refuse)
        width = opened.config.text.hidden_size
        random_steps(Lockstep(plain, fast, 2e-5), 0, 30, fast.slots, PROFILE.max_seq_len, width)
        assert [r.message for r in caplog.records] == [
            "decoding goes on without CUDA graphs, which costs time: operation not permitted when stream is capturing"
        ]

    def test_a_step_reads_no_more_than_its_bucket(self, checkpoint):
        """Keys beyond it may hold anything: here what would poison every sum."""
        opened = Checkpoint(checkpoint)
        fast = CudaDecoder(opened, PROFILE, torch.float32, CPU, True, RecordedGraphs())
        for cache in (*fast.cache.k, *fast.cache.v):
            cache[:, :, 128:] = torch.nan
        embeds = torch.ones(2, 1, opened.config.text.hidden_size)
        for start in range(3):
            step = fast.step(0, embeds, torch.full((3, 2, 1), start), [start, start])
            assert step.logits.isfinite().all()

    def test_a_full_slot_in_the_way(self, checkpoint):
        """Slot 0 is full, so a step of slot 1 cannot take it along: it runs without a graph, and right."""
        opened, capture = Checkpoint(checkpoint), RecordedGraphs()
        plain = TorchDecoder(opened, PROFILE, torch.float32, CPU)
        fast = CudaDecoder(opened, PROFILE, torch.float32, CPU, True, capture)
        pair, width, full = Lockstep(plain, fast, 2e-5), opened.config.text.hidden_size, PROFILE.max_seq_len
        generator = torch.Generator().manual_seed(0)
        pair.step(0, torch.randn(1, full, width, generator=generator), torch.arange(full).expand(3, 1, -1), [0])
        kept = fast.cache.k[0][0].clone()
        pair.step(1, torch.randn(1, 1, width, generator=generator), torch.zeros(3, 1, 1).long(), [0])
        assert capture.captures == 0
        assert torch.equal(fast.cache.k[0][0], kept)


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
        opened, capture = Checkpoint(checkpoint), RecordedGraphs()
        plain = TorchDecoder(opened, PROFILE, dtype, CPU)
        fast = CudaDecoder(opened, PROFILE, dtype, CPU, True, capture)
        assert not any(cache.any() for cache in (*fast.cache.k, *fast.cache.v)), "the trial left something behind"
        before, width = compilations(), opened.config.text.hidden_size
        pair = Lockstep(plain, fast, 2e-5) if dtype == torch.float32 else Near(plain, fast, 5e-2)
        for seed in range(3):
            random_steps(pair, seed, 60, fast.slots, PROFILE.max_seq_len, width, dtype)
            plain.reset()
            fast.reset()
        assert capture.replays > 3 * capture.captures > 6
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
            decoder.step(0, torch.randn(1, 5, width), torch.zeros(3, 1, 5).long(), [0])
            for slots in (1, 2):
                decoder.step(0, torch.randn(slots, 1, width), torch.zeros(3, slots, 1).long(), [5] * slots)
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
        embeds = torch.randn(8, 1, opened.config.text.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
        for start, row in enumerate(embeds[:, None]):
            found, expected = (d.step(0, row, torch.full((3, 1, 1), start), [start]).logits for d in (fast, plain))
            assert likeness(found, expected) > 0.99
        assert set(seen) == {torch.float8_e4m3fn}
        assert capture.replays == 7

    @COMPILED
    def test_what_cannot_be_compiled_runs_as_it_is(self, checkpoint, kernels, monkeypatch, caplog):
        def refuse(*args):
            raise RuntimeError("Cannot find a working triton installation.\n  More information on installing")

        monkeypatch.setattr(fused_ops, "_compiled", lambda function: refuse)
        opened = Checkpoint(checkpoint)
        plain = TorchDecoder(opened, PROFILE, torch.float32, CPU)
        fast = CudaDecoder(opened, PROFILE, torch.float32, CPU, True, RecordedGraphs())
        width = opened.config.text.hidden_size
        random_steps(Lockstep(plain, fast, 2e-5), 0, 30, fast.slots, PROFILE.max_seq_len, width)
        assert [r.message for r in caplog.records] == [
            "the steps between matrix products are not compiled, which costs time:"
            " RuntimeError: Cannot find a working triton installation. More information on installing"
        ]

    @COMPILED
    def test_it_can_be_turned_off(self, checkpoint):
        opened, before = Checkpoint(checkpoint), compilations()
        decoder = CudaDecoder(opened, PROFILE, torch.float32, CPU, False, compiled=False)
        decoder.step(0, torch.zeros(1, 1, opened.config.text.hidden_size), torch.zeros(3, 1, 1).long(), [0])
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
            torch_runner, name, lambda *args, name=name: made.setdefault(args[-1].type, []).append(name)
        )
    for device in ("cpu", "cuda"):
        engines = SimpleNamespace(
            checkpoint=None,
            dtype=None,
            device=torch.device(device),
            manifest=SimpleNamespace(profile=None),
            precision=SimpleNamespace(decoder=None),
        )
        torch_runner.load_vision(engines)
        torch_runner.load_decoder(engines)
    assert made == {"cpu": ["TorchVision", "TorchDecoder"], "cuda": ["CudaVision", "CudaDecoder"]}
