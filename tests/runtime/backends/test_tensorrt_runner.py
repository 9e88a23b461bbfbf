"""The TensorRT runner, whole, on the CPU: over a runtime that computes through ONNX Runtime what it is told to."""

import json
import logging
import random
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import qwen2vl_trt.runtime.backends.tensorrt_engine
import qwen2vl_trt.runtime.backends.tensorrt_runner
from qwen2vl_trt import Pipeline, PipelineOptions, Request, SamplingParams
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.errors import EngineError, LimitError
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.runtime.backends.tensorrt_runner import TensorRTDecoder
from qwen2vl_trt.windows import window_layout
from tests.support import fake_cuda, fake_tensorrt
from tests.support.engine_folders import (
    PROFILE,
    build,
    build_fake_tensorrt,
    fake_tensorrt_runtime,
    write_checkpoint,
    write_manifest,
    write_plans,
)

pytest.importorskip("onnxruntime", reason="it computes what the engines would")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tensorrt") / "checkpoint")


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    return build_fake_tensorrt(checkpoint, tmp_path_factory.mktemp("tensorrt") / "engines")


def copied(folder, target, stripped=False, **changes):
    """A copy of the folder, with another manifest."""
    shutil.copytree(folder, target)
    if stripped:
        changes["options"] = {"strip_weights": True}
    write_plans(target, replace(Manifest.read(folder), **changes), stripped)
    return target


@pytest.fixture(scope="module")
def reference(checkpoint, tmp_path_factory):
    """The torch backend on the same model."""
    return Pipeline.from_engine_dir(build(checkpoint, tmp_path_factory.mktemp("tensorrt") / "torch", "torch"))


@pytest.fixture
def fake(request):
    """The fake runtime in the place of TensorRT and of the GPU; an indirect parameter makes it TensorRT for RTX."""
    with fake_tensorrt_runtime(getattr(request, "param", "tensorrt")) as module:
        yield module


def opened(folder, cuda_graphs=True):
    """The folder's engines; with or without CUDA graphs."""
    engines = open_engines(folder, "cpu")
    if not cuda_graphs:
        engines.__dict__["decoder"] = TensorRTDecoder(
            qwen2vl_trt.runtime.backends.tensorrt_runner._load(engines, "decoder"),
            engines.checkpoint,
            PROFILE,
            cuda_graphs=False,
        )
    return engines


def requests(count=9):
    """Images of many sizes, several in a prompt, and none."""
    numbers = np.random.default_rng(0)
    found = []
    for n in range(count):
        sizes = numbers.integers(30, 180, (n % 3, 2))
        images = [numbers.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        found.append(Request("What digits are in the image? " * (1 + n % 2), images))
    return found


class TestAnswers:
    @pytest.mark.parametrize("cuda_graphs", [True, False])
    def test_they_are_those_of_the_torch_backend(self, fake, folder, reference, cuda_graphs):
        """More requests than slots, of different lengths, so that they join, leave and wait."""
        params = [SamplingParams(max_tokens=3 + 4 * (n % 3), ignore_eos=True) for n in range(9)]
        expected = [output.token_ids for output in reference.generate(requests(), params)]
        pipeline = Pipeline(opened(folder, cuda_graphs), PipelineOptions(max_num_tokens=20))
        found = [output.token_ids for output in pipeline.generate(requests(), params)]
        assert found == expected
        assert len({tuple(tokens) for tokens in found}) > 3, "answers that differ show what is mixed up"

    def test_embeddings(self, fake, folder, reference):
        images = [image for request in requests() for image in request.images]
        found = Pipeline(opened(folder)).embed_images(images)
        for ours, theirs in zip(found, reference.embed_images(images)):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    def test_hidden_states(self, fake, folder, reference):
        found = Pipeline(opened(folder)).hidden_states(requests(5))
        for ours, theirs in zip(found, reference.hidden_states(requests(5))):
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)

    def test_of_a_stripped_plan(self, fake, folder, tmp_path, reference):
        """Its weights come from the folder's safetensors file, byte for byte."""
        engines = opened(copied(folder, tmp_path / "engines", stripped=True))
        assert Pipeline(engines).generate(requests(1))[0].token_ids == reference.generate(requests(1))[0].token_ids
        weights, source = engines.decoder._engine.handle._weights, Checkpoint(tmp_path / "engines")
        assert len(weights) == len([name for name in source.names if not name.startswith("visual.")])
        for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
            stored = torch.from_numpy(weights[name].view(np.int16)).view(torch.bfloat16)
            assert torch.equal(stored, source.load(name).flatten())


class TestDecoder:
    def random_step(self, decoder, generator, first, count, length, starts):
        """Of neighbours; ``length`` is of each, or a list."""
        lengths = [length] * count if isinstance(length, int) else length
        chunks = [Chunk(first + n, start, length) for n, (start, length) in enumerate(zip(starts, lengths))]
        embeds = torch.randn(sum(lengths), decoder._engine.tensors["inputs_embeds"].shape[2], generator=generator)
        positions = torch.cat([torch.arange(chunk.start, chunk.end) for chunk in chunks])
        return chunks, embeds, positions.expand(3, -1)

    def same_tokens(self, ours, theirs, held):
        """The caches' tokens of every slot are equal."""
        for one, other in zip((*ours.cache.k, *ours.cache.v), (*theirs.cache.k, *theirs.cache.v)):
            for row, tokens in enumerate(held):
                torch.testing.assert_close(one[row, :, :tokens], other[row, :, :tokens], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("fake", ["tensorrt", "tensorrt_rtx"], indirect=True)
    def test_a_graph_gives_what_a_plain_step_gives(self, fake, folder):
        """Random neighbours and lengths, over a cache that both fill the same way; slots beside the step stay whole.

        Some slots are only in between: they write behind their own tokens, and no one wants their logits.
        """
        plain, graphed = (opened(folder, cuda_graphs).decoder for cuda_graphs in (False, True))
        numbers, generator = random.Random(3), torch.Generator().manual_seed(3)
        held = [0] * plain.slots
        for _ in range(40):
            first = numbers.randrange(plain.slots)
            count = numbers.randint(1, plain.slots - first)
            length = [1] * count if numbers.random() < 0.7 else [numbers.randint(1, 6) for _ in range(count)]
            starts = held[first : first + count]
            step = self.random_step(plain, generator, first, count, length, starts)
            wanted = [number for number in range(count) if numbers.random() < 0.7]
            expected, found = (decoder.step(*step, wanted, hidden=True) for decoder in (plain, graphed))
            assert len(found.logits) == len(wanted)
            torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.hidden_states, expected.hidden_states, atol=1e-4, rtol=1e-4)
            for number in wanted:
                held[first + number] += length[number]
            self.same_tokens(graphed, plain, held)
        contexts = graphed._engine.handle._contexts
        assert len(contexts) == 1 + 3, "context profile; graphs of 1, 2 and 4 slots"
        assert len(plain._engine.handle._contexts) == 2

    @pytest.mark.parametrize("wanted", [None, [], [1], [0, 2]], ids=str)
    def test_chunks_of_different_lengths_equal_each_alone(self, fake, folder, wanted):
        """The longest ends where the cache does; what pads the others lies behind their tokens."""
        together, alone = (opened(folder).decoder for _ in range(2))
        generator, lengths = torch.Generator().manual_seed(5), [9, 2, 31]
        starts = [PROFILE.max_seq_len - 31, 0, PROFILE.max_seq_len - 31]
        for decoder in (together, alone):
            for cache in (*decoder.cache.k, *decoder.cache.v):
                cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(6)))
        held = [0, *(start + length for start, length in zip(starts, lengths))]
        chunks, embeds, positions = self.random_step(together, generator, 1, 3, lengths, starts)
        found = together.step(chunks, embeds, positions, wanted, hidden=True)
        expected = [
            alone.step([chunk], one, where, hidden=True)
            for chunk, one, where in zip(chunks, embeds.split(lengths), positions.split(lengths, dim=1))
        ]
        logits = [expected[number].logits for number in (range(3) if wanted is None else wanted)]
        assert len(found.logits) == len(logits)
        if logits:
            torch.testing.assert_close(found.logits, torch.cat(logits), atol=1e-4, rtol=1e-4)
        states = torch.cat([step.hidden_states for step in expected])
        torch.testing.assert_close(found.hidden_states, states, atol=1e-4, rtol=1e-4)
        self.same_tokens(together, alone, held)
        for decode in range(2):  # the next tokens overwrite what padded
            step = self.random_step(together, generator, 1, 2, 1, [held[1] + decode, held[2] + decode])
            ours, theirs = (decoder.step(*step).logits for decoder in (together, alone))
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    def test_padding_must_fit_the_cache_too(self, fake, folder):
        decoder, most = opened(folder).decoder, PROFILE.max_seq_len
        step = self.random_step(decoder, torch.Generator(), 0, 2, [5, 1], [most - 6, most - 4])
        with pytest.raises(LimitError, match=rf"{most + 1} tokens do not fit the cache of {most}"):
            decoder.step(*step)

    def test_a_full_slot_beside_the_step(self, fake, folder):
        """It has no place that a graph could write to."""
        decoder = opened(folder).decoder
        decoder.cache.lengths[0] = decoder.cache.capacity
        before = decoder.cache.k[0][0].clone()
        step = self.random_step(decoder, torch.Generator().manual_seed(0), 1, 1, 1, [0])
        assert decoder.step(*step).logits.isfinite().all()
        assert not decoder._graphs._graphs
        assert torch.equal(decoder.cache.k[0][0], before)

    def test_what_cannot_be_captured_still_runs(self, fake, folder, monkeypatch, caplog):
        monkeypatch.setattr(fake_tensorrt.CpuDevice, "captures", False)
        decoder, plain = opened(folder).decoder, opened(folder, cuda_graphs=False).decoder
        for start in range(3):
            step = self.random_step(decoder, torch.Generator().manual_seed(start), 0, 2, 1, [start, start])
            torch.testing.assert_close(decoder.step(*step).logits, plain.step(*step).logits)
        (record,) = caplog.records
        assert (record.levelno, "goes on without a CUDA graph" in record.message) == (logging.WARNING, True)

    def test_the_cache_is_whole_from_the_start_and_stays(self, fake, folder):
        decoder = opened(folder).decoder
        assert decoder.cache.capacity == PROFILE.max_seq_len
        addresses = [cache.data_ptr() for cache in (*decoder.cache.k, *decoder.cache.v)]
        decoder.step(*self.random_step(decoder, torch.Generator(), 0, 1, 4, [0]))
        decoder.reset()
        assert [cache.data_ptr() for cache in (*decoder.cache.k, *decoder.cache.v)] == addresses
        with pytest.raises(LimitError, match=rf"do not fit the cache of {PROFILE.max_seq_len}"):
            decoder.step(*self.random_step(decoder, torch.Generator(), 0, 1, 1, [PROFILE.max_seq_len]))

    def test_a_profiler_hears_of_every_layer(self, fake, folder):
        """Of those under a CUDA graph TensorRT knows no time, so there is none while it listens."""
        decoder, plain = opened(folder).decoder, opened(folder, cuda_graphs=False).decoder
        heard = []
        for start in range(4):
            if start == 2:
                decoder.profile(lambda layer, milliseconds: heard.append((layer, milliseconds)))
            step = self.random_step(decoder, torch.Generator().manual_seed(start), 0, 2, 1, [start, start])
            torch.testing.assert_close(decoder.step(*step).logits, plain.step(*step).logits)
        outputs = [name for name, tensor in decoder._engine.tensors.items() if not tensor.is_input]
        assert sorted(heard) == sorted([(f"layer of {name}", 0.5) for name in outputs] * 2)

    def test_profiles(self, fake, folder):
        """One new token runs in the generation profile, several in the context profile."""
        decoder = opened(folder, cuda_graphs=False).decoder
        for length in (1, 3, 1):
            decoder.step(*self.random_step(decoder, torch.Generator(), 0, 2, length, [0, 0]))
        runs = {context._profile: context._runs for context in decoder._engine.handle._contexts}
        assert runs == {0: 1, 1: 2}

    def test_unchanged_shapes_are_not_told_again(self, fake, folder, monkeypatch):
        """Each costs TensorRT a new plan of its memory."""
        decoder, told = opened(folder, cuda_graphs=False).decoder, []
        tell = fake_tensorrt.IExecutionContext.set_input_shape
        monkeypatch.setattr(
            fake_tensorrt.IExecutionContext,
            "set_input_shape",
            lambda self, name, shape: told.append(name) or tell(self, name, shape),
        )
        counts = []
        for first, count in ((0, 2), (1, 2), (0, 3)):
            decoder.step(*self.random_step(decoder, torch.Generator(), first, count, 1, [0] * count))
            counts.append(len(told))
        inputs = sum(tensor.is_input for tensor in decoder._engine.tensors.values())
        assert counts == [inputs, inputs, 2 * inputs]

    def test_a_prompt_longer_than_the_profile(self, fake, folder):
        decoder = opened(folder).decoder
        with pytest.raises(LimitError, match=r"decoder engine: inputs_embeds is 1 x 401 x 128; .* to 4 x 400 x 128"):
            decoder.step(*self.random_step(decoder, torch.Generator(), 0, 1, 401, [0]))

    def test_not_enough_memory_for_the_cache(self, fake, folder, monkeypatch):
        monkeypatch.setattr(fake_tensorrt.CpuDevice, "free", 2_200_000)
        with pytest.raises(EngineError) as refused:
            _ = opened(folder).decoder
        message = str(refused.value)
        assert re.search(r"needs 2\.9 MB for --max-num-seqs 4 x --max-seq-len 700, and [12]\.\d MB of GPU", message), (
            message
        )
        assert "what fits: --max-num-seqs 1 at this length or --max-seq-len 256" in message

    def streaming(self, folder, monkeypatch, streamable):
        """An engine some of whose weights may stay on the host; that takes memory for each context."""
        monkeypatch.setattr(fake_tensorrt.CpuDevice, "free", 20_000_000)
        load = fake_tensorrt.Runtime.deserialize_cuda_engine

        def loaded(self, plan):
            engine = load(self, plan)
            engine.streamable_weights_size, engine._scratch = streamable, 1000
            return engine

        monkeypatch.setattr(fake_tensorrt.Runtime, "deserialize_cuda_engine", loaded)
        return opened(folder).decoder

    def needed(self, handle, folder):
        """Bytes of the cache, the text embeddings, and the activations of both profiles."""
        cache = 2 * 2 * 4 * PROFILE.max_seq_len * 2 * 32 * 4  # k and v, layers, slots, length, heads, width, FP32
        activations = sum(handle.get_device_memory_size_for_profile_v2(profile) for profile in range(2))
        return cache + activations + Checkpoint(folder).config.text.vocab_size * 128 * 4

    def test_weight_streaming(self, fake, folder, monkeypatch, caplog):
        """Everything off the GPU, then as much back as all else leaves room for; no graph can hold what is streamed."""
        decoder = self.streaming(folder, monkeypatch, 10**9)
        handle = decoder._engine.handle
        assert handle._streams
        assert handle._budgets == [0, 20_000_000 - self.needed(handle, folder)]
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert re.search(r"decoder engine: 9\d\d\.\d MB of 1\.00 GB weights do not fit.* costs time", record.message)
        plain = opened(folder, cuda_graphs=False).decoder
        for start in range(3):
            step = self.random_step(decoder, torch.Generator().manual_seed(start), 0, 2, 1, [start, start])
            torch.testing.assert_close(decoder.step(*step).logits, plain.step(*step).logits)

    def test_weights_that_all_fit_are_not_streamed(self, fake, folder, monkeypatch, caplog):
        decoder = self.streaming(folder, monkeypatch, 5_000_000)
        assert decoder._engine.handle._budgets == [0, 5_000_000]
        decoder.step(*self.random_step(decoder, torch.Generator(), 0, 2, 1, [0, 0]))
        assert decoder._graphs._graphs
        assert not caplog.records

    def test_a_budget_that_tensorrt_does_not_take(self, fake, folder, monkeypatch):
        """The call says so, and the bindings drop it."""
        monkeypatch.setattr(
            fake_tensorrt.ICudaEngine, "weight_streaming_budget_v2", property(lambda self: 7, lambda *_: 0)
        )
        with pytest.raises(EngineError, match=r"decoder engine: 0\.0 MB of its weights cannot be kept on the GPU"):
            self.streaming(folder, monkeypatch, 10**9)

    def test_shapes_that_failed_are_told_again(self, fake, folder, monkeypatch):
        """The second time with the same shapes it does not go on with what the first left."""
        decoder, infer = opened(folder, cuda_graphs=False).decoder, fake_tensorrt.IExecutionContext.infer_shapes
        step = self.random_step(decoder, torch.Generator(), 0, 2, 1, [0, 0])
        monkeypatch.setattr(fake_tensorrt.IExecutionContext, "infer_shapes", lambda self: infer(self) or ["kv_lengths"])
        for _ in range(2):
            with pytest.raises(EngineError, match="decoder engine: the shape of kv_lengths is not known"):
                decoder.step(*step)
        monkeypatch.setattr(fake_tensorrt.IExecutionContext, "infer_shapes", infer)
        assert decoder.step(*step).logits.isfinite().all()

    def test_memory_that_is_not_known(self, fake, folder, monkeypatch):
        """0 is an answer for shapes that need none, and the sign of an error."""
        decoder = opened(folder, cuda_graphs=False).decoder
        monkeypatch.setattr(
            fake_tensorrt.IExecutionContext,
            "update_device_memory_size_for_shapes",
            lambda self: int(self._fail("shapes are odd")),
        )
        with pytest.raises(
            EngineError, match="decoder engine: the memory that its shapes need is not known: shapes are"
        ):
            decoder.step(*self.random_step(decoder, torch.Generator(), 0, 2, 1, [0, 0]))

    def with_lengths(self, folder, tmp_path):
        return copied(folder, tmp_path / "engines", options={"attention_mask": "lengths"})

    def test_attention_that_keeps_to_its_lengths(self, fake, folder, tmp_path):
        """As the stand-in's does; a plan that was built for a mask is not tried."""
        decoder = opened(self.with_lengths(folder, tmp_path)).decoder
        assert sum(context._runs for context in decoder._engine.handle._contexts) > 0
        assert not any(cache.any() for cache in (*decoder.cache.k, *decoder.cache.v))
        assert decoder.cache.lengths == [0] * decoder.slots
        assert not opened(folder).decoder._engine.handle._contexts

    @pytest.mark.parametrize("profile", [0, 1], ids=["in prompts", "in decode steps"])
    def test_attention_beyond_its_lengths_is_refused(self, fake, folder, tmp_path, monkeypatch, profile):
        """As TensorRT 11.1's is reported to be, for some GPUs."""
        run = fake_tensorrt._Work.__call__

        def longer(self):
            if self.context._profile == profile and "kv_lengths" in self.addresses:
                lengths = fake_tensorrt._at(self.addresses["kv_lengths"], self.shapes["kv_lengths"], np.int64)
                lengths += 2
            run(self)

        monkeypatch.setattr(fake_tensorrt._Work, "__call__", longer)
        with pytest.raises(EngineError, match=r"attention does not keep to its lengths .* --attention-mask explicit"):
            _ = opened(self.with_lengths(folder, tmp_path)).decoder

    @pytest.mark.parametrize("wrong", [None, 0, 1], ids=["they agree", "wrong in prompts", "wrong in decode steps"])
    def test_either_kind_of_attention(self, fake, folder, tmp_path, monkeypatch, caplog, wrong):
        """Lengths where they agree with masks, else masks; one decoder at a time is in memory."""
        target = copied(folder, tmp_path / "engines", options={"attention_mask": "either"})
        shutil.copy(target / "decoder.engine", target / "decoder-lengths.engine")
        run, load = fake_tensorrt._Work.__call__, qwen2vl_trt.runtime.backends.tensorrt_runner.load_engine
        loaded, held = [], []

        def loading(*arguments):
            assert not any(engine() for engine in held)
            engine = load(*arguments)
            loaded.append(arguments[-1])
            held.append(weakref.ref(engine))
            return engine

        def longer(self):
            if loaded[-1] and self.context._profile == wrong and "kv_lengths" in self.addresses:
                fake_tensorrt._at(self.addresses["kv_lengths"], self.shapes["kv_lengths"], np.int64)[:] += 2
            run(self)

        monkeypatch.setattr(qwen2vl_trt.runtime.backends.tensorrt_runner, "load_engine", loading)
        monkeypatch.setattr(fake_tensorrt._Work, "__call__", longer)
        caplog.set_level(logging.INFO)
        decoder = opened(target).decoder
        assert loaded == [None, "decoder-lengths"] + [None] * (wrong is not None)
        assert ("goes by lengths, which agree with explicit masks" in caplog.text) == (wrong is None)
        assert ("explicit masks, so a decode step reads the whole cache" in caplog.text) == (wrong is not None)
        assert not any(cache.any() for cache in (*decoder.cache.k, *decoder.cache.v))

    def test_masks_where_no_decoder_with_lengths_was_built(self, fake, folder, tmp_path, caplog):
        decoder = opened(copied(folder, tmp_path / "engines", options={"attention_mask": "either"})).decoder
        assert decoder.step(*self.random_step(decoder, torch.Generator(), 0, 2, 1, [0, 0])).logits.isfinite().all()
        assert "decoder-lengths.engine cannot be read" in caplog.text

    def test_names_of_layers_are_markers_enough(self, fake, folder):
        decoder = opened(folder).decoder
        decoder.step(*self.random_step(decoder, torch.Generator(), 0, 2, 1, [0, 0]))
        (context,) = decoder._engine.handle._contexts
        assert context.nvtx_verbosity is fake_tensorrt.ProfilingVerbosity.LAYER_NAMES_ONLY


class TestVision:
    def test_memory_follows_the_sizes_in_use(self, fake, folder):
        """The profile's largest batch, of strips, would need several times that."""
        engines = opened(folder)
        config = engines.checkpoint.config.vision
        sizes = []
        for grids in (((1, 4, 4),), ((1, 8, 8), (1, 4, 12)), ((1, 4, 4),)):
            layout = window_layout(grids, config)
            pixels = torch.zeros(*layout.sequence_position.shape, config.qwen2_vl_dim)
            assert engines.vision(pixels, layout).shape == (len(layout.merge_index), 128)
            sizes.append(engines.vision._contexts._memory._block.numel())
        assert 0 < sizes[0] < sizes[1] == sizes[2]
        assert sizes[1] < engines.vision._engine.handle.get_device_memory_size_for_profile_v2(0) / 4

    def test_memory_that_is_too_small_is_given_back(self, fake, folder, monkeypatch):
        """Before the larger is taken: together they might not fit."""
        engines = opened(folder)
        config = engines.checkpoint.config.vision
        small = window_layout(((1, 4, 4),), config)
        engines.vision(torch.zeros(*small.sequence_position.shape, config.qwen2_vl_dim), small)
        block = weakref.ref(engines.vision._contexts._memory._block)
        gone, allocate = [], torch.empty
        monkeypatch.setattr(
            "qwen2vl_trt.runtime.backends.tensorrt_context.torch.empty",
            lambda size, **given: (gone.append(block() is None) if size else None, allocate(size, **given))[1],
        )
        engines.vision._contexts._memory.reserve(10**7)
        assert gone == [True]

    def test_a_layout_goes_to_the_gpu_once(self, fake, folder, monkeypatch):
        engines, sent = opened(folder), []
        stage = fake_tensorrt.CpuDevice.pinned
        monkeypatch.setattr(
            fake_tensorrt.CpuDevice, "pinned", lambda self, tensor: sent.append(1) or stage(self, tensor)
        )
        config, counts, found = engines.checkpoint.config.vision, [], []
        for grids in (((1, 4, 4),), ((1, 8, 8),), ((1, 4, 4),), ((1, 8, 8),)):
            layout = window_layout(grids, config)
            pixels = torch.ones(*layout.sequence_position.shape, config.qwen2_vl_dim)
            sent.clear()
            found.append(engines.vision(pixels, layout))
            counts.append(len(sent))
        whole = 1 + len(layout.index_tensors)
        assert counts == [whole, whole, 1, 1], "pixels alone where the sizes come again"
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], found[3])

    def test_a_batch_outside_the_profile(self, fake, folder):
        engines = opened(folder)
        config = engines.checkpoint.config.vision
        layout = window_layout(((1, 2, 2),) * 5, config)
        pixels = torch.zeros(*layout.sequence_position.shape, config.qwen2_vl_dim)
        with pytest.raises(LimitError, match=r"vision engine: sequence_index is 5 x 4; it was built for 1 x 4 to 4 x"):
            engines.vision(pixels, layout)

    def test_types_are_the_engines_own(self, fake, folder):
        """Whatever the manifest's precision says: the two engines may differ."""
        engines = opened(folder)
        config = engines.checkpoint.config.vision
        layout = window_layout(((1, 4, 4),), config)
        pixels = torch.ones(*layout.sequence_position.shape, config.qwen2_vl_dim)
        assert torch.equal(engines.vision(pixels.to(torch.bfloat16), layout), engines.vision(pixels, layout))


class TestStreams:
    """The stand-in finds what a GPU might do in another order, and addresses that TensorRT does not take."""

    def pixels(self, engines):
        """Of one window, the second of two: 256 bytes do not divide where it begins."""
        config = engines.checkpoint.config.vision
        layout = window_layout(((1, 4, 4),), config)
        windows, patches = layout.sequence_position.shape
        assert windows == 1
        return torch.ones(2 * patches * config.qwen2_vl_dim + 1)[1:].view(2, patches, -1)[1:], layout

    def test_vision_and_decoder_have_streams_of_their_own(self, fake, folder):
        """Where both have work, the GPU takes the decoder's first."""
        engines = opened(folder)
        vision, decoder = (engine._engine.device._stream for engine in (engines.vision, engines.decoder))
        assert vision is not decoder
        assert (vision.priority, decoder.priority) == (0, -1)

    def test_what_is_not_aligned_is_copied(self, fake, folder, monkeypatch):
        engines = opened(folder)
        pixels, layout = self.pixels(engines)
        assert pixels.data_ptr() % 256
        assert torch.equal(engines.vision(pixels, layout), engines.vision(pixels.clone(), layout))
        monkeypatch.setattr(fake_tensorrt.CpuDevice, "alignment", 1)
        with pytest.raises(EngineError, match=r"pixel_values cannot lie at .*, which is no multiple of 256"):
            engines.vision(pixels, layout)

    @pytest.mark.parametrize("missing", ["the runner waits for its caller", "the caller waits for the runner"])
    def test_a_wait_that_is_missing_is_found(self, fake, folder, monkeypatch, missing):
        engines = opened(folder)
        pixels, layout = self.pixels(engines)
        stream, wait = engines.vision._engine.device._stream, fake_cuda.Stream.wait_stream

        def waits(self, other):
            if (self is stream) != missing.startswith("the runner"):
                wait(self, other)

        monkeypatch.setattr(fake_cuda.Stream, "wait_stream", waits)
        with pytest.raises(AssertionError, match="nothing orders that after"):
            engines.vision(pixels, layout).sum()
        del pixels
        fake_cuda.FakeCuda.active.freed_early.clear()

    def test_memory_that_another_stream_still_reads_is_found(self, fake):
        cuda, other = fake_cuda.FakeCuda.active, torch.cuda.Stream()
        read = torch.ones(3)
        other.wait_stream(cuda.current)
        with torch.cuda.stream(other):
            read.sum()
        del read
        (found,) = cuda.freed_early
        assert found.startswith("12 bytes")
        cuda.freed_early.clear()


class TestRefused:
    """One line each."""

    def refused(self, folder, load=lambda engines: engines.vision):
        with pytest.raises(EngineError) as error:
            load(open_engines(folder, "cpu"))
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_no_gpu(self, folder, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(EngineError, match=r"run on an NVIDIA GPU, and PyTorch \S+ sees none here.* --backend onn"):
            open_engines(folder)

    def test_the_cpu_by_name(self, folder):
        assert "run on an NVIDIA GPU, not on cpu" in self.refused(folder)

    def test_another_release(self, fake, folder, tmp_path):
        path = copied(folder, tmp_path / "engines", versions={"tensorrt": "11.0.0.114"})
        said = f"was built with tensorrt 11.0.0.114 and {fake_tensorrt.VERSION} is installed"
        assert said in self.refused(path)

    def test_another_gpu(self, fake, folder, tmp_path):
        path = copied(folder, tmp_path / "engines", options={"compute_capabilities": ["8.6", "12.0"]})
        assert "for GPUs of compute capability 8.6, 12.0; a GPU has 8.9" in self.refused(path)

    @pytest.mark.parametrize("content", [b"", b'{"graph": "'], ids=["empty", "truncated"])
    def test_a_plan_that_does_not_load(self, fake, folder, tmp_path, content):
        """The manifest agrees with it: TensorRT's own reason is what there is to say."""
        path = copied(folder, tmp_path / "engines")
        (path / "vision.engine").write_bytes(content)
        write_manifest(path, Manifest.read(path))
        message = self.refused(path)
        assert ("cannot mmap an empty file" if not content else "plan->header.magicTag == PLAN_MAGIC") in message
        assert "Rebuild" in message

    def test_a_truncated_plan(self, fake, folder, tmp_path):
        path = copied(folder, tmp_path / "engines")
        content = (path / "vision.engine").read_bytes()
        (path / "vision.engine").write_bytes(content[:-1])
        assert f"it has {len(content) - 1:,} bytes instead of {len(content):,}" in self.refused(path)

    def test_an_engine_of_another_folder(self, fake, folder, tmp_path):
        """The manifest agrees with the file, and the file is not what the limits say."""
        path = copied(folder, tmp_path / "engines")
        plan = json.loads((path / "decoder.engine").read_text())
        plan["profiles"][1]["batch"][2] = 3
        (path / "decoder.engine").write_text(json.dumps(plan))
        write_manifest(path, Manifest.read(path))
        message = self.refused(path, lambda engines: engines.decoder)
        assert "decoder.engine is not of this folder: profiles of tensor 'cache_start'" in message

    def test_weights_that_are_gone(self, fake, folder, tmp_path):
        path = copied(folder, tmp_path / "engines", stripped=True)
        engines = open_engines(path, "cpu")
        (path / "model.safetensors").unlink()
        with pytest.raises(EngineError, match=r"model\.safetensors: No such file.*the engine's weights are there"):
            _ = engines.vision

    def test_runtime_failures_have_its_reason(self, fake, folder, monkeypatch):
        engines = opened(folder)
        monkeypatch.setattr(
            fake_tensorrt.IExecutionContext, "execute_async_v3", lambda self, stream: self._fail("out of luck")
        )
        layout = window_layout(((1, 4, 4),), engines.checkpoint.config.vision)
        pixels = torch.zeros(*layout.sequence_position.shape, engines.checkpoint.config.vision.qwen2_vl_dim)
        with pytest.raises(EngineError, match="vision engine: it cannot be run: out of luck"):
            engines.vision(pixels, layout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
class TestCommandsWithoutAGPU:
    """One line, before a build that could not be run here."""

    def run(self, *arguments):
        done = subprocess.run([sys.executable, "run.py", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        return done.stderr

    def test_a_folder(self, folder):
        said = self.run("--engine-dir", str(folder), "--prompt", "Who are you?")
        assert said.startswith("error: TensorRT engines run on an NVIDIA GPU, and PyTorch ")

    def test_a_model(self, tmp_path):
        pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux and Windows on x86-64 only")
        where = tmp_path / "engines"
        options = ("--model", "tiny", "--backend", "tensorrt-rtx", "--engine-dir", str(where))
        assert "run on an NVIDIA GPU" in self.run(*options, "--prompt", "Who are you?")
        assert not where.exists()

    def test_the_cpu_by_name(self, folder):
        said = self.run("--engine-dir", str(folder), "--device", "cpu", "--prompt", "Who are you?")
        assert "run on an NVIDIA GPU, not on cpu" in said
