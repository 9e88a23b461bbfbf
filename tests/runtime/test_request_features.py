"""Features in place of an answer, beside answers that they leave alone."""

from dataclasses import replace

import pytest
import torch

from qwen2vl_trt import ImageOptions, Pipeline, PipelineOptions, Request, SamplingParams, Service
from qwen2vl_trt.errors import PromptError
from tests.support.bounds import FP32
from tests.support.models import relative_error
from tests.support.requests import PATIENCE, answers, clip, picture, random_params, random_request


@pytest.mark.parametrize("options", [PipelineOptions(), PipelineOptions(max_num_tokens=48)], ids=["whole", "chunks"])
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_the_last_hidden_state_beside_answers(engine_dirs, backend, options):
    pipeline = Pipeline.from_engine_dir(engine_dirs[backend], "cpu", options)
    plain = [random_request(number) for number in range(12)]
    expected = answers(pipeline.generate(plain, [random_params(number) for number in range(12)]))
    states = pipeline.hidden_states(plain)
    pipeline.clear_caches()
    for first in (0, 1):  # the features, whose prefix the answer shares, or the other way round
        pairs = [[replace(request, features="last_hidden_state"), request] for request in plain]
        requests = [each for pair in pairs for each in (pair if first == 0 else pair[::-1])]
        outputs = pipeline.generate(requests, [random_params(number // 2) for number in range(24)])
        assert answers(outputs[1 - first :: 2]) == expected
        assert any(output.reused_tokens for output in outputs[1::2])
        for output, state in zip(outputs[first::2], states, strict=True):
            assert (output.text, output.token_ids, output.finish_reason) == ("", [], "stop")
            (found,) = output.features
            assert (found.shape, found.dtype) == (state[-1].shape, torch.float32)
            assert relative_error(found, state[-1]) < FP32
    assert not pipeline.busy


@pytest.mark.parametrize("embedding_cache_bytes", [0, 1 << 20])
def test_features_of_images_and_videos_beside_answers(engine_dirs, embedding_cache_bytes):
    options = PipelineOptions(embedding_cache_bytes=embedding_cache_bytes)
    pipeline = Pipeline.from_engine_dir(engine_dirs["torch"], "cpu", options)
    images = [picture(1, 140, 140), picture(2, 60, 90)]
    whole, small = pipeline.embed_images(images), ImageOptions(max_pixels=28 * 28 * 6)
    plain = [Request("What?", images), Request("Read both: <image> <video>", images[:1], [clip(3)])]
    expected = answers(pipeline.generate(plain, SamplingParams(max_tokens=9)))
    requests = [
        Request("", images, features="image_features"),
        Request("", images, image_options=small, features="image_features"),
        Request("<video> <image>", images[1:], [clip(3)], features="image_features"),
        *plain,
    ]
    for _ in range(2):
        both, shrunk, mixed, *others = pipeline.generate(requests, SamplingParams(max_tokens=9))
        assert answers(others) == expected
        for found, wanted in zip(both.features, whole, strict=True):
            assert relative_error(found, wanted) < FP32
        assert [len(each) for each in shrunk.features] == [image.tokens for image in shrunk.images]
        assert len(shrunk.features[0]) <= 6 < len(whole[0])
        assert relative_error(mixed.features[0], whole[1]) < FP32
        assert len(mixed.features[1]) == mixed.videos[0].tokens
        both.features[0].zero_()  # the caller's own
    counters = pipeline.counters()
    assert (counters.running, counters.queued, counters.failed) == (0, 0, 0)


def test_features_of_a_service_beside_a_stream(engine_dirs):
    pipeline = Pipeline.from_engine_dir(engine_dirs["torch"], "cpu")
    request, params = Request("What digits are in the image?"), SamplingParams(max_tokens=60, ignore_eos=True)
    expected = answers(pipeline.generate(request, params))
    state = pipeline.hidden_states(Request("Read both:"))[0][-1]
    with Service(pipeline) as service:
        answer = service.submit(request, params)
        tokens = iter(answer)
        next(tokens)
        found = [service.submit(Request("Read both:", features="last_hidden_state")) for _ in range(3)]
        for each in found:
            assert relative_error(each.result(PATIENCE).features[0], state) < FP32
            assert list(each) == []
        for _ in tokens:
            pass
    assert answers([answer.output]) == expected


def test_hidden_states_are_of_the_prompt_whatever_else_is_asked_for(pipelines):
    request = Request("What?", [picture(1)])
    (expected,) = pipelines["torch"].hidden_states(request)
    for features in ("image_features", "last_hidden_state"):
        (found,) = pipelines["torch"].hidden_states(replace(request, features=features))
        assert found.equal(expected)


def test_features_that_there_are_not(pipelines):
    with pytest.raises(PromptError, match="features is 'logits'; known are last_hidden_state, image_features"):
        Request("What?", features="logits")
    output = pipelines["torch"].generate(Request("What?", features="image_features"))[0]
    assert isinstance(output.error, PromptError)
    assert "no image and no video" in str(output.error)
