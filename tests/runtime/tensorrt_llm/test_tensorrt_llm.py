"""Pipelines whose decoder runs in TensorRT-LLM. It has run on no GPU: a stand-in with its signatures answers here.

The stand-in computes with the torch backend's decoder, so answers must be the torch backend's own.
"""

import json
import sys
import time
from dataclasses import replace

import pytest

from qwen2vl_trt import Pipeline, PipelineOptions, Request, SamplingParams, StructuredOutputsParams
from qwen2vl_trt.building.calibration import Calibration, training_data
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.engines.options import TensorRTLLMOptions
from qwen2vl_trt.errors import DeadlineError, EngineError, ExecutionError, LimitError, SamplingError
from qwen2vl_trt.export.quantize import quantize_checkpoint
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.quantization import fp8_layers
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.tensorrt_llm import runner as tensorrt_llm_runner
from tests.support import fake_tensorrt_llm
from tests.support.engine_folders import PROFILE, build
from tests.support.requests import answers, clip, picture, random_request

REQUESTS = [random_request(seed) for seed in range(10)]  # text alone, images, videos, mixed, in their own places
LENGTHS = [SamplingParams(max_tokens=4 + 3 * seed, ignore_eos=seed == 3) for seed in range(10)]


@pytest.fixture
def trtllm(monkeypatch):
    monkeypatch.setattr(tensorrt_llm_runner, "gpu_count", lambda: 2)
    yield from fake_tensorrt_llm.installed(monkeypatch)


@pytest.fixture
def own_vision(trtllm, monkeypatch):
    """A release whose prototype API is not there."""
    monkeypatch.delattr(sys.modules["tensorrt_llm.llmapi.llm"], "PreprocessedInputs")


def engine_dir(checkpoint, folder, **options):
    backend, precision = find_backend("tensorrt-llm", "bf16")
    backend = replace(backend, options=TensorRTLLMOptions(**options))
    build_engines(resolve_model(checkpoint), backend, precision, replace(PROFILE, max_num_seqs=3), folder)
    return folder


@pytest.fixture
def folder(trtllm, checkpoint, tmp_path):
    return engine_dir(checkpoint, tmp_path / "engines")


@pytest.fixture
def pipeline(folder):
    # The order in which requests reach it is looked at.
    found = Pipeline.from_engine_dir(folder, "cpu", PipelineOptions(overlap=False))
    yield found
    assert not found.busy, "the test left requests in the pipeline"


def llm(trtllm):
    return trtllm.LLM.made[-1]


@pytest.fixture(scope="module")
def torch_pipeline(checkpoint, tmp_path_factory):
    return Pipeline.from_engine_dir(build(checkpoint, tmp_path_factory.mktemp("bf16"), "torch", "bf16"), "cpu")


@pytest.fixture(scope="module")
def expected(torch_pipeline):
    """The torch backend's answers, one request at a time: in BF16 those of a batch may round otherwise."""
    return [answers(torch_pipeline.generate(r, p))[0] for r, p in zip(REQUESTS, LENGTHS, strict=True)]


class TestAnswers:
    def test_are_the_torch_backends(self, pipeline, trtllm, expected):
        outputs = pipeline.generate(REQUESTS, LENGTHS)
        assert answers(outputs) == expected
        assert llm(trtllm).arguments["max_batch_size"] == 3  # its name for most requests
        assert llm(trtllm).most_together > 1  # batched in flight
        counters = pipeline.counters()
        assert counters.finished == counters.started == 10
        assert counters.generated_tokens == sum(len(output.token_ids) for output in outputs)
        assert counters.prompt_tokens_computed == sum(output.prompt_tokens for output in outputs)
        assert all(0 < output.timings.time_to_first_token <= output.timings.total for output in outputs)

    def test_stream(self, pipeline, torch_pipeline):
        settings = SamplingParams(max_tokens=12)
        found = [(e.token_id, e.text) for e in pipeline.stream(REQUESTS[1], settings)]
        assert found == [(e.token_id, e.text) for e in torch_pipeline.stream(REQUESTS[1], settings)]

    def test_stop_text(self, pipeline, trtllm, torch_pipeline):
        whole = torch_pipeline.generate(REQUESTS[1], SamplingParams(max_tokens=40))[0].text
        stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
        settings = SamplingParams(max_tokens=40, stop=(stop,))
        found = pipeline.generate(REQUESTS[1], settings)
        assert answers(found) == answers(torch_pipeline.generate(REQUESTS[1], settings))
        assert found[0].finish_reason == "stop"
        assert stop not in found[0].text
        assert len(llm(trtllm).requests) == 1

    @pytest.mark.parametrize(("keeps", "which"), [(True, 0), (False, 1)])
    def test_end_of_sequence_is_part_of_the_answer(self, pipeline, trtllm, torch_pipeline, monkeypatch, keeps, which):
        # Whether a release keeps the token is not documented. Here the third token of an answer is made to end it.
        request, settings = REQUESTS[1], SamplingParams(max_tokens=9)
        end = torch_pipeline.generate(request, settings)[0].token_ids[2]
        ends = (end, 1) if which == 0 else (1, end)
        for each in (pipeline, torch_pipeline):
            monkeypatch.setattr(each._preparer, "_eos_token_ids", ends)
        monkeypatch.setattr(pipeline._executor(), "_ends", replace(pipeline._executor()._ends, eos_token_ids=ends))
        monkeypatch.setattr(trtllm.LLM, "keeps_end_id", keeps)
        found = pipeline.generate(request, settings)
        assert answers(found) == answers(torch_pipeline.generate(request, settings))
        assert found[0].finish_reason == "stop"
        assert found[0].token_ids[-1] == end

    def test_draws(self, pipeline, trtllm):
        settings = SamplingParams(max_tokens=5, temperature=0.7, top_k=20, top_p=0.8, ignore_eos=True)
        (output,) = pipeline.generate(REQUESTS[0], settings)
        assert len(output.token_ids) == 5
        _, params, _, _ = llm(trtllm).requests[0]
        assert (params.temperature, params.top_k, params.top_p, params.seed) == (0.7, 20, 0.8, None)

    def test_one_image_is_not_taken_for_another(self, pipeline, torch_pipeline, trtllm):
        # Both prompts have the same tokens, by which TensorRT-LLM finds the blocks of keys and values again.
        requests = [Request("Read it", [picture(seed, 84, 84)]) for seed in (1, 2, 1)]
        settings = SamplingParams(max_tokens=12)
        one = answers(torch_pipeline.generate(requests[:1], settings))[0]
        two = answers(torch_pipeline.generate(requests[1:2], settings))[0]
        assert answers(pipeline.generate(requests, settings)) == [one, two, one]
        salts = [salt for _, _, salt, _ in llm(trtllm).requests]
        assert salts[0] == salts[2] != salts[1]
        pipeline.generate(Request("Text"), settings)
        assert llm(trtllm).requests[-1][2] is None
        pipeline.generate([Request("Text", cache_salt=salt) for salt in ("one", "two", "one")], settings)
        salts = [salt for _, _, salt, _ in llm(trtllm).requests[-3:]]
        assert salts[0] == salts[2] != salts[1]
        assert None not in salts

    def test_prefixes_are_not_kept_where_they_are_not_wanted(self, folder, trtllm):
        pipeline = Pipeline.from_engine_dir(folder, "cpu", PipelineOptions(reuse_prefixes=False))
        pipeline.generate(REQUESTS[0], SamplingParams(max_tokens=1))
        assert not llm(trtllm).arguments["kv_cache_config"].enable_block_reuse
        pipeline.clear_caches()


@pytest.fixture(scope="module")
def fp8_decoder(tmp_path_factory):
    """The tiny model with its decoder alone in FP8, by Model Optimizer over two scenes."""
    pytest.importorskip("modelopt", reason="NVIDIA Model Optimizer is not installed: the quantize extra")
    tiny = Checkpoint(resolve_model("tiny").folder)
    samples = list(Calibration(tiny, training_data(8)))[:2]
    return quantize_checkpoint(tiny, tmp_path_factory.mktemp("fp8") / "tiny-fp8-decoder", samples, vision=False)


def test_fp8_of_the_decoder(trtllm, fp8_decoder, tmp_path):
    assert {layer.partition(".")[0] for layer in fp8_layers(fp8_decoder)} == {"model"}
    both = [tmp_path / name for name in ("tensorrt-llm", "torch")]
    found, wanted = (
        Pipeline.from_engine_dir(build(fp8_decoder.folder, folder, folder.name, "fp8"), "cpu") for folder in both
    )
    settings = SamplingParams(max_tokens=8)
    expected = [answers(wanted.generate(request, settings))[0] for request in REQUESTS[:3]]
    assert answers(found.generate(REQUESTS[:3], settings)) == expected


class TestOwnVision:
    """A release that runs its own vision tower; here Transformers' tower and processor stand in for it."""

    def test_answers(self, own_vision, folder, trtllm, torch_pipeline):
        pipeline = Pipeline.from_engine_dir(folder, "cpu", PipelineOptions(overlap=False))
        assert pipeline.engines.manifest.options["vision"] == "own"
        settings = SamplingParams(max_tokens=3)
        requests = [Request("How many <image> digits?", [picture(3, 140, 100)]), Request("Hello")]
        found = pipeline.generate(requests, settings)
        assert [output.error for output in found] == [None, None]
        text = torch_pipeline.generate(requests[1], settings)
        assert answers(found[1:]) == answers(text)
        inputs = llm(trtllm).requests[0][0]
        (image,) = inputs["multi_modal_data"]["image"]
        assert inputs["prompt"].count("<|image_pad|>") == 1
        assert (image.width % 28, image.height % 28) == (0, 0)
        # The prompt that its processor made of it is the one made here: _take compares them.
        assert (
            llm(trtllm).requests[0][3].prompt_token_ids.count(pipeline.engines.checkpoint.config.image_token_id)
            == image.width * image.height // 28**2
        )

    def test_another_prompt_is_refused(self, own_vision, folder):
        # Enlarged beyond what the checkpoint's own processor allows, which shrinks it again.
        pipeline = Pipeline.from_engine_dir(folder, "cpu")
        executor = pipeline._executor()
        executor._picture = lambda image: type(executor)._picture(executor, image).resize((28 * 7, 28 * 7))
        (output,) = pipeline.generate(Request("Read", [picture(3, 60, 60)]), SamplingParams(max_tokens=3))
        with pytest.raises(ExecutionError, match=r"TensorRT-LLM read another prompt .* resizes images otherwise"):
            output.text  # noqa: B018
        (output,) = pipeline.generate(Request("a <|im_end|> b"), SamplingParams(max_tokens=3))
        with pytest.raises(ExecutionError, match=r"TensorRT-LLM read another prompt .* special tokens that a text"):
            output.text  # noqa: B018
        assert not pipeline.busy

    def test_videos_are_refused(self, own_vision, folder):
        pipeline = Pipeline.from_engine_dir(folder, "cpu")
        found = pipeline.generate([Request("Watch", videos=[clip(1)]), Request("Hello")], SamplingParams(max_tokens=2))
        assert isinstance(found[0].error, LimitError)
        assert "give a video's frames as images" in str(found[0].error)
        assert len(found[1].token_ids) <= 2

    def test_a_folder_of_the_other_kind(self, folder, trtllm, monkeypatch):
        monkeypatch.delattr(sys.modules["tensorrt_llm.llmapi.llm"], "PreprocessedInputs")
        with pytest.raises(EngineError, match="takes the vision engine's embeddings; the one installed takes pixels"):
            Pipeline.from_engine_dir(folder, "cpu")


class TestEnds:
    def test_cancel(self, pipeline, trtllm, expected):
        settings = SamplingParams(max_tokens=200, ignore_eos=True)
        doomed, kept = pipeline.submit(REQUESTS[0], settings), pipeline.submit(REQUESTS[1], LENGTHS[1])
        while not (doomed.finished or doomed.timings.time_to_first_token):
            pipeline.step()
        pipeline.cancel(doomed)
        tokens = list(doomed.token_ids)
        while pipeline.busy:
            pipeline.step()
        assert doomed.finish_reason == "cancelled"
        assert doomed.token_ids == tokens
        assert answers([kept]) == expected[1:2]
        deadline = time.monotonic() + 10
        while [result.aborted for *_, result in llm(trtllm).requests] != [1, 0] and time.monotonic() < deadline:
            time.sleep(0.01)  # it is told on its own thread
        assert [result.aborted for *_, result in llm(trtllm).requests] == [1, 0]

    @pytest.mark.parametrize("ignore_eos", [False, True])
    def test_stop_tokens(self, pipeline, torch_pipeline, ignore_eos):
        whole = torch_pipeline.generate(REQUESTS[:1], SamplingParams(20, ignore_eos=True))[0].token_ids
        settings = SamplingParams(20, ignore_eos=ignore_eos, stop_token_ids=(whole[4],))
        found, wanted = (each.generate(REQUESTS[:1], settings) for each in (pipeline, torch_pipeline))
        assert answers(found) == answers(wanted)
        assert found[0].finish_reason == "stop"

    def test_a_deadline_before_the_first_token(self, folder):
        now = [0.0]
        pipeline = Pipeline(
            Pipeline.from_engine_dir(folder, "cpu").engines, PipelineOptions(overlap=False), clock=lambda: now[0]
        )
        output = pipeline.submit(replace(REQUESTS[0], deadline=1.0), SamplingParams(max_tokens=5))
        pipeline._take_in()
        assert pipeline.counters().running == 1
        now[0] = 2.0
        while pipeline.busy:
            pipeline.step()
        with pytest.raises(DeadlineError, match="passed before the answer's first token"):
            output.text  # noqa: B018

    def test_a_failure_in_the_engine_is_one_requests_alone(self, pipeline, trtllm, expected, monkeypatch):
        monkeypatch.setattr(trtllm.LLM, "fails_at", 1)
        found = pipeline.generate(REQUESTS[:3], LENGTHS[:3])
        assert str(found[1].error) == "TensorRT-LLM failed: RuntimeError: CUDA error: an illegal memory access"
        assert answers([found[0], found[2]]) == [expected[0], expected[2]]
        assert pipeline.counters().failed == 1

    def test_an_answer_that_it_cuts_off(self, pipeline, trtllm):
        pipeline.submit(REQUESTS[0], SamplingParams(max_tokens=9, ignore_eos=True))
        pipeline.step()
        (output,) = pipeline._executor()._running
        until = time.monotonic() + 20
        while not llm(trtllm).requests and time.monotonic() < until:  # it takes them on a thread of its own
            time.sleep(0.005)
        llm(trtllm).requests[0][1].max_tokens = 3
        while pipeline.busy:
            pipeline.step()
        with pytest.raises(ExecutionError, match=r"ended the answer after [0-9] tokens \(length\)"):
            output.text  # noqa: B018


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (SamplingParams(repetition_penalty=1.1), "repetition_penalty 1.1 is not for backend tensorrt-llm"),
            (SamplingParams(presence_penalty=-0.5), "presence_penalty -0.5 is not for backend tensorrt-llm"),
            (SamplingParams(frequency_penalty=2), "frequency_penalty 2 is not for backend tensorrt-llm"),
            (SamplingParams(temperature=0.5, min_p=0.1), "min_p 0.1 is not for backend tensorrt-llm"),
            (SamplingParams(temperature=0.5, seed=3), "seed 3 is not for backend tensorrt-llm"),
            (SamplingParams(logit_bias={3: 1}), "logit_bias is not for backend tensorrt-llm"),
            (SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")), "structured_outputs is not for"),
            (SamplingParams(logprobs=0), "logprobs is not for backend tensorrt-llm"),
        ],
    )
    def test_sampling(self, pipeline, settings, message):
        found = pipeline.generate(REQUESTS[:2], [settings, SamplingParams(max_tokens=2)])
        with pytest.raises(SamplingError, match=message):
            found[0].text  # noqa: B018
        assert len(found[1].token_ids) <= 2

    def test_what_the_checkpoint_says_and_it_lacks_is_left_out_with_a_warning(self, folder, expected, caplog):
        engines, path = open_engines(folder, "cpu"), folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.05, "min_p": 0.1}))
        pipeline = Pipeline(engines, PipelineOptions(overlap=False))
        assert answers(pipeline.generate(REQUESTS[:2], LENGTHS[:2])) == expected[:2]
        (line,) = [r.getMessage() for r in caplog.records if "repetition_penalty" in r.getMessage()]
        assert "left out, as backend tensorrt-llm does not apply it: repetition_penalty 1.05, min_p 0.1;" in line

    def test_a_seed_of_greedy_choice_changes_nothing(self, pipeline, expected):
        settings = replace(LENGTHS[1], seed=3)
        assert answers(pipeline.generate(REQUESTS[1], settings)) == expected[1:2]

    def test_hidden_states(self, pipeline, trtllm):
        made = len(trtllm.LLM.made)
        with pytest.raises(EngineError, match=r"gives tokens alone: hidden_states .* need --backend torch"):
            pipeline.hidden_states(REQUESTS[:1])
        assert len(trtllm.LLM.made) == made  # refused before anything is loaded
        with pytest.raises(EngineError, match="gives tokens alone"):
            pipeline.submit(replace(REQUESTS[0], features="last_hidden_state"))
        assert not pipeline.busy

    def test_features_of_images_beside_answers(self, pipeline, expected, torch_pipeline):
        request = Request("", [picture(1), picture(2)], features="image_features")
        *found, output = pipeline.generate([*REQUESTS, request], [*LENGTHS, SamplingParams()])
        assert answers(found) == expected
        for features, wanted in zip(
            output.features, torch_pipeline.embed_images([picture(1), picture(2)]), strict=True
        ):
            assert features.equal(wanted)

    def test_features_of_images_need_no_decoder(self, pipeline, trtllm, torch_pipeline):
        made = len(trtllm.LLM.made)
        (found,), (wanted,) = (each.embed_images([picture(1)]) for each in (pipeline, torch_pipeline))
        assert found.equal(wanted)
        assert len(trtllm.LLM.made) == made

    def test_warming_up_loads_it_and_asks_nothing_of_it(self, pipeline, trtllm):
        made = len(trtllm.LLM.made)
        pipeline.warm_up([(84, 56)])
        assert len(trtllm.LLM.made) == made + 1
        assert llm(trtllm).requests == []

    def test_too_few_gpus(self, trtllm, checkpoint, tmp_path, monkeypatch):
        folder = engine_dir(checkpoint, tmp_path / "two", tp_size=2)
        assert llm_arguments(folder, trtllm)["tensor_parallel_size"] == 2
        monkeypatch.setattr(tensorrt_llm_runner, "gpu_count", lambda: 1)
        with pytest.raises(EngineError, match=r"among 2 GPUs \(--tp-size\); PyTorch .* sees 1 here"):
            Pipeline.from_engine_dir(folder, "cpu")

    def test_no_gpu(self, folder, monkeypatch):
        monkeypatch.setattr(tensorrt_llm_runner, "gpu_count", lambda: 0)
        with pytest.raises(EngineError, match=r"TensorRT-LLM runs on NVIDIA GPUs, and PyTorch .* sees none here"):
            Pipeline.from_engine_dir(folder)

    def test_a_release_that_is_gone(self, folder, trtllm, monkeypatch):
        monkeypatch.setattr(trtllm, "__version__", "1.1.0")
        with pytest.raises(EngineError, match=r"1\.1\.0 is installed"):
            Pipeline.from_engine_dir(folder, "cpu")

    def test_a_model_that_it_does_not_load(self, folder, trtllm, monkeypatch):
        def fail(*arguments, **options):
            raise RuntimeError("out of\nmemory")

        monkeypatch.setattr(sys.modules["tensorrt_llm.llmapi.llm"], "TorchDecoder", fail)
        pipeline = Pipeline.from_engine_dir(folder, "cpu")
        with pytest.raises(EngineError, match=r"TensorRT-LLM does not load .*: RuntimeError: out of memory"):
            pipeline.generate(REQUESTS[:1])

    def test_a_manifest_with_other_options(self, folder):
        manifest = Manifest.read(folder)
        replace(manifest, options={"tp_size": 1}).write(folder)
        with pytest.raises(EngineError, match="manifest are corrupt"):
            Pipeline.from_engine_dir(folder, "cpu")


def llm_arguments(folder, trtllm):
    Pipeline.from_engine_dir(folder, "cpu").generate(Request("Hello"), SamplingParams(max_tokens=1))
    return llm(trtllm).arguments
