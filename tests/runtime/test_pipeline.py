"""Requests through whole pipelines, both backends, against Transformers and against themselves."""

import gc
import math
import weakref
from contextlib import contextmanager
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen2vl_trt import Pipeline, PipelineOptions, Request, SamplingParams, Video, VideoOptions
from qwen2vl_trt.errors import CheckpointError, EngineError, LimitError, MediaError, PromptError, SamplingError
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.tiny.evaluation import answer_scenes
from qwen2vl_trt.tiny.scenes import TASKS, held_out_scenes
from qwen2vl_trt.tokenizer import ChatTokenizer
from tests.support.bounds import FP32, FP32_BEHIND_BOTH
from tests.support.engine_folders import PROFILE, build
from tests.support.models import relative_error
from tests.support.requests import answers, clip, picture, random_params, random_request

BOTH = ("torch", "onnxruntime")


def reference_inputs(reference, request):
    _, processor = reference
    content = [{"type": "image"}] * len(request.images) + [{"type": "text", "text": request.prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    images = [Image.fromarray(image) for image in request.images]
    return processor(text=[text], images=images or None, return_tensors="pt")


def image_first(seed, **kwargs):
    request = random_request(seed, videos=0, **kwargs)
    return replace(request, prompt=request.prompt.replace("<image>", "").strip() or "What?")


# Against Transformers


def test_greedy_tokens_equal_transformers_generate(pipeline, reference):
    requests = [image_first(seed) for seed in range(8)]
    outputs = pipeline.generate(requests, SamplingParams(max_tokens=24))
    model, _ = reference
    for request, output in zip(requests, outputs):
        inputs = reference_inputs(reference, request)
        length = inputs["input_ids"].shape[1]
        assert output.prompt_tokens == length
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, length:].tolist()
        assert output.token_ids == expected


def test_a_long_answer_outgrows_the_cache_without_a_trace(pipeline, reference):
    request = image_first(3, images=2, words=40)
    cache = pipeline.engines.decoder.cache
    capacities = set()
    output = pipeline.generate(
        [request],
        SamplingParams(max_tokens=300, ignore_eos=True),
        on_token=lambda event: capacities.add(cache.capacity),
    )[0]
    inputs = reference_inputs(reference, request)
    length = inputs["input_ids"].shape[1]
    expected = reference[0].generate(
        **inputs, do_sample=False, max_new_tokens=300, min_new_tokens=300, eos_token_id=None
    )
    assert output.token_ids == expected[0, length:].tolist()
    assert output.finish_reason == "length"
    assert len(capacities - {512, 700}) >= 1
    assert max(capacities) >= 512
    pipeline.clear_caches()
    assert cache.capacity == 128  # given back


def test_hidden_states_equal_transformers(pipeline, reference):
    requests = [image_first(seed) for seed in (20, 21, 22, 23, 24, 25)]  # more than slots
    found = pipeline.hidden_states(requests)
    for request, states in zip(requests, found):
        with torch.no_grad():
            expected = reference[0](**reference_inputs(reference, request), output_hidden_states=True)
        assert states.shape == expected.hidden_states[-1][0].shape
        assert relative_error(states, expected.hidden_states[-1][0]) < FP32_BEHIND_BOTH


def test_a_video_equals_transformers(pipeline, reference):
    model, processor = reference
    for frames in (2, 8, 12):  # the last takes two engine calls
        video = clip(frames, frames, 56, 84)
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        inputs = processor(text=[text], videos=[np.stack(video.frames)], return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
        seconds = float(inputs["second_per_grid_ts"][0])
        request = Request("What?", videos=[Video(video.frames, fps=2 / seconds)])
        assert relative_error(pipeline.hidden_states([request])[0], expected) < FP32_BEHIND_BOTH


def test_image_embeddings_equal_transformers(pipeline, reference):
    whole = [picture(seed, 28 * (seed + 1), 28 * (6 - seed)) for seed in range(5)]  # no resize
    images = [*whole, *(picture(seed) for seed in range(5))]
    model, processor = reference
    for image, embedding in zip(images, pipeline.embed_images(images)):
        inputs = processor.image_processor(images=[Image.fromarray(image)], return_tensors="pt")
        with torch.no_grad():
            expected = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        expected = torch.cat(list(getattr(expected, "pooler_output", expected)))
        # A resize may round single pixels the other way (within one level, see test_preprocessor.py).
        resized = image.shape[0] % 28 or image.shape[1] % 28
        assert relative_error(embedding, expected) < (0.05 if resized else FP32)


# Backends against each other


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds=st.lists(st.integers(0, 10_000), min_size=1, max_size=6, unique=True))
def test_both_backends_give_the_same_answers(pipelines, seeds):
    requests, params = [random_request(seed) for seed in seeds], [random_params(seed) for seed in seeds]
    assert answers(pipelines["torch"].generate(requests, params)) == answers(
        pipelines["onnxruntime"].generate(requests, params)
    )


def test_both_backends_embed_and_feel_the_same(pipelines):
    images, requests = [picture(seed) for seed in range(6)], [random_request(seed) for seed in range(6)]
    for found in (
        [pipelines[backend].embed_images(images) for backend in BOTH],
        [pipelines[backend].hidden_states(requests) for backend in BOTH],
    ):
        for one, other in zip(*found):
            assert relative_error(one, other) < FP32_BEHIND_BOTH


def test_bf16_is_close_to_fp32(checkpoint, pipelines, tmp_path):
    half = Pipeline.from_engine_dir(build(checkpoint, tmp_path / "bf16", "torch", "bf16"), "cpu")
    requests = [random_request(seed) for seed in range(4)]
    for found, exact in zip(half.hidden_states(requests), pipelines["torch"].hidden_states(requests)):
        assert torch.nn.functional.cosine_similarity(found.float().flatten(), exact.flatten(), dim=0) > 0.999
    assert all(output.finish_reason for output in half.generate(requests, SamplingParams(max_tokens=4)))


# In-flight batching


def test_an_answer_does_not_depend_on_its_neighbours(pipeline):
    requests, params = [random_request(seed) for seed in range(24)], [random_params(seed) for seed in range(24)]
    together = pipeline.generate(requests, params)
    alone = [pipeline.generate([request], param)[0] for request, param in zip(requests, params)]
    assert answers(together) == answers(alone)


def test_chunked_prefill_equals_whole_prefill(pipelines, engine_dirs):
    requests, params = [random_request(seed) for seed in range(6)], [random_params(seed) for seed in range(6)]
    whole = answers(pipelines["onnxruntime"].generate(requests, params))
    for backend, chunk in (("onnxruntime", 7), ("torch", 16), ("onnxruntime", 1)):
        chunked = Pipeline.from_engine_dir(engine_dirs[backend], "cpu", PipelineOptions(max_num_tokens=chunk))
        assert answers(chunked.generate(requests, params)) == whole, (backend, chunk)


def test_requests_join_and_leave_a_running_batch(pipeline):
    requests, params = (
        [random_request(seed) for seed in range(40, 47)],
        [random_params(seed, 12) for seed in range(40, 47)],
    )
    expected = answers(pipeline.generate([request], param)[0] for request, param in zip(requests, params))
    outputs = []
    for request, param in zip(requests, params):
        outputs.append(pipeline.submit(request, param))
        for _ in range(3):
            pipeline.step()
    assert pipeline.busy
    while pipeline.busy:
        pipeline.step()
    assert answers(outputs) == expected
    assert pipeline.step() == []


def test_a_prompt_without_its_request(pipeline):
    for prompts in ("What is this?", ["What is this?"], [[{"role": "user", "content": "What is this?"}]]):
        with pytest.raises(PromptError, match=r"a (str|list) is no request; give Request\(prompt"):
            pipeline.generate(prompts)
    with pytest.raises(PromptError, match="a str is no request"):
        pipeline.generate([Request("What is this?"), "And this?"])
    assert not pipeline.busy


def test_generate_beside_submitted_requests(pipeline):
    request, params = random_request(50), random_params(50, 20)
    expected = answers(pipeline.generate([request], params))
    submitted = [pipeline.submit(random_request(seed), SamplingParams(max_tokens=30)) for seed in range(51, 57)]
    events = []
    assert answers(pipeline.generate([request], params, on_token=events.append)) == expected
    assert {event.index for event in events} == {0}
    assert [event.token_id for event in events] == expected[0][0]
    while pipeline.busy:
        pipeline.step()
    assert all(output.finished for output in submitted)


def test_cancelled_requests_leave_the_others_alone(pipeline):
    requests, params = [random_request(seed) for seed in range(60, 68)], SamplingParams(max_tokens=16, ignore_eos=True)
    expected = answers(pipeline.generate(requests, params))
    outputs = [pipeline.submit(request, params) for request in requests]
    for _ in range(6):
        pipeline.step()
    pipeline.cancel(outputs[0])  # runs
    pipeline.cancel(outputs[3])  # perhaps still in its prompt
    pipeline.cancel(outputs[7])  # waits
    before = list(outputs[0].token_ids)
    while pipeline.busy:
        pipeline.step()
    assert outputs[0].token_ids == before
    assert len(before) < 16
    assert outputs[7].token_ids == []
    assert {outputs[number].finish_reason for number in (0, 3, 7)} == {"cancelled"}
    kept = [1, 2, 4, 5, 6]
    assert answers(outputs[number] for number in kept) == [expected[number] for number in kept]
    pipeline.cancel(outputs[1])  # has ended: nothing happens


def test_a_stream_that_is_left_early_frees_its_slots(pipeline):
    stream = pipeline.stream([random_request(seed) for seed in range(6)], SamplingParams(max_tokens=50))
    next(stream)
    assert pipeline.busy
    stream.close()
    assert not pipeline.busy


def test_an_interrupted_generate_frees_its_slots(pipeline):
    def interrupt(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.generate([random_request(seed) for seed in range(6)], on_token=interrupt)
    assert not pipeline.busy


# Streaming, ends, timings


def test_callback_iterator_and_result_agree(pipeline):
    requests, params = [random_request(seed) for seed in range(6)], [random_params(seed) for seed in range(6)]
    outputs = pipeline.generate(requests, params)
    called, streamed = [], list(pipeline.stream(requests, params))
    pipeline.generate(requests, params, on_token=called.append)
    for events in (called, streamed):
        for number, output in enumerate(outputs):
            own = [event for event in events if event.index == number]
            assert [event.token_id for event in own] == output.token_ids
            assert "".join(event.text for event in own) == output.text
    single = list(pipeline.stream(requests[0], params[0]))
    assert "".join(event.text for event in single) == outputs[0].text
    assert single[-1].output.finish_reason == outputs[0].finish_reason


def test_streams_that_take_turns_each_get_all_their_tokens(pipeline):
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    own = pipeline.submit(random_request(3), params)  # stepped by the streams
    streams = [pipeline.stream(random_request(seed), params) for seed in (1, 2)]
    events = list(zip(*streams, strict=True))  # a step of one brings tokens of the other
    assert len(events) == 9
    for first, second in events:
        assert first.output is not second.output
    for column in zip(*events, strict=True):
        assert [event.token_id for event in column] == column[0].output.token_ids
        assert "".join(event.text for event in column) == column[0].output.text
    assert own.finished
    assert not pipeline._listeners


def test_an_output_that_its_holder_cancels_gets_no_more(pipeline):
    output = pipeline.submit(random_request(1), SamplingParams(max_tokens=9, ignore_eos=True))
    before = pipeline.counters()
    while not output.token_ids:
        pipeline.step()
    output.cancel()
    tokens = list(output.token_ids)
    while pipeline.busy:
        pipeline.step()
    after = pipeline.counters()
    assert (output.token_ids, output.finish_reason) == (tokens, "cancelled")
    assert (after.cancelled - before.cancelled, after.finished - before.finished) == (1, 0)


def test_stop_strings_and_reasons(pipeline):
    request = random_request(4, images=1)
    whole = pipeline.generate([request], SamplingParams(max_tokens=40, ignore_eos=True))[0]
    assert whole.finish_reason == "length"
    assert len(whole.token_ids) == 40
    piece = whole.text[10:14]
    stopped = pipeline.generate([request], SamplingParams(max_tokens=40, ignore_eos=True, stop=(piece,)))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(piece)]
    assert len(stopped.token_ids) < 40
    assert pipeline.generate([request], SamplingParams(max_tokens=1))[0].finish_reason == "length"


def test_an_end_of_sequence_token_ends_the_answer(engine_dirs, pipelines):
    request = random_request(4, images=1)
    whole = pipelines["torch"].generate([request], SamplingParams(max_tokens=20, ignore_eos=True))[0]
    pipeline = Pipeline.from_engine_dir(engine_dirs["torch"], "cpu")
    pipeline._preparer._eos_token_ids = (whole.token_ids[5],)
    ended = pipeline.generate([request], SamplingParams(max_tokens=20))[0]
    assert ended.finish_reason == "stop"
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[5]) + 1]


def test_timings_make_sense(pipeline):
    pipeline.clear_caches()  # a picture that is known takes no time
    outputs = pipeline.generate([random_request(seed, images=seed % 3) for seed in range(9)], random_params(0, 6))
    outputs += pipeline.generate([random_request(1, images=1)], SamplingParams(max_tokens=1))
    for output in outputs:
        timings = asdict(output.timings)
        assert all(math.isfinite(value) and value >= 0 for value in timings.values()), timings
        stages = ("preprocess", "vision", "prefill", "decode")
        assert sum(timings[stage] for stage in stages) <= timings["total"] + 1e-9, timings
        assert 0 < timings["time_to_first_token"] <= timings["total"]
        assert timings["prefill"] > 0
    assert outputs[1].timings.vision > 0


# Forms of input


def test_a_batch_of_cameras_is_a_request_each(pipeline):
    batch = torch.stack([torch.from_numpy(picture(seed, 56, 84)).permute(2, 0, 1) for seed in range(6)])
    batch = batch.view(3, 2, 3, 56, 84)
    prompts = ["What digits?", "Read <image> then <image>.", "How many?"]
    found = pipeline.generate(Request.from_batch(batch, prompts), SamplingParams(max_tokens=8))
    single = [
        Request(prompt, [image.permute(1, 2, 0).numpy() for image in sample]) for prompt, sample in zip(prompts, batch)
    ]
    assert answers(found) == answers(pipeline.generate(single, SamplingParams(max_tokens=8)))
    floats = pipeline.generate(Request.from_batch(batch.float() / 255, prompts), SamplingParams(max_tokens=8))
    assert answers(floats) == answers(found)  # 56x84 needs no resize
    with pytest.raises(PromptError, match="3 samples"):
        Request.from_batch(batch, prompts[:2])
    with pytest.raises(MediaError, match="n_cameras"):
        Request.from_batch(batch[0], prompts)


def test_messages_carry_their_media(pipeline, tmp_path):
    first, second = picture(1), picture(2)
    Image.fromarray(first).save(tmp_path / "first.png")
    encoded = BytesIO()
    Image.fromarray(second).save(encoded, "PNG")
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": str(tmp_path / "first.png")},
                {"type": "text", "text": "and"},
                {"type": "image", "image": encoded.getvalue()},
                {"type": "video", "video": [*clip(1).frames], "fps": 2.0},
                {"type": "text", "text": "What do you see?"},
            ],
        },
    ]
    plain = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"text": "and"},
                {"type": "image"},
                {"type": "video"},
                {"text": "What do you see?"},
            ],
        },
    ]
    params = SamplingParams(max_tokens=8)
    inside = pipeline.generate(Request(messages), params)
    beside = pipeline.generate(Request(plain, [Path(tmp_path / "first.png"), second], [clip(1)]), params)
    assert answers(inside) == answers(beside)
    assert inside[0].prompt_tokens == beside[0].prompt_tokens


def test_stacked_media_and_tuples_are_lists_of_media(pipeline):
    images = np.stack([picture(seed, 60, 90) for seed in range(3)])
    params = SamplingParams(max_tokens=6)
    listed = pipeline.generate(Request("What?", [*images], [np.stack(clip(1).frames)]), params)
    stacked = pipeline.generate(Request("What?", images, (np.stack(clip(1).frames),)), params)
    assert answers(listed) == answers(stacked)


def test_embed_images_of_mixed_sizes_equals_one_at_a_time(pipeline):
    images = [picture(seed) for seed in range(11)]  # three calls of at most four
    done = []
    together = pipeline.embed_images(images, done.append)
    assert done == [4, 8, 11]
    for image, embedding in zip(images, together):
        assert relative_error(embedding, pipeline.embed_images([image])[0]) < FP32
    assert pipeline.embed_images([]) == []
    assert pipeline.hidden_states([]) == []
    assert pipeline.generate([]) == []


def test_a_video_of_more_frames_than_a_call_takes_equals_one_call(checkpoint, pipelines, tmp_path):
    request = Request("What?", videos=[clip(5, frames=22)])  # 11 temporal patches, 4 a call
    profile = replace(PROFILE, max_batch_size=16)
    large = Pipeline.from_engine_dir(build(checkpoint, tmp_path / "large", "torch", profile=profile), "cpu")
    expected = large.hidden_states([request])[0]
    for pipeline in pipelines.values():
        assert relative_error(pipeline.hidden_states([request])[0], expected) < FP32_BEHIND_BOTH


@pytest.mark.parametrize("backend", BOTH)
def test_more_requests_under_way_than_images_in_a_vision_call(checkpoint, pipelines, backend, tmp_path):
    stages = []

    @contextmanager
    def observe(stage):
        yield
        stages.append(stage)

    profile = replace(PROFILE, max_batch_size=1, max_num_seqs=3)
    engines = open_engines(build(checkpoint, tmp_path / "engines", backend, profile=profile), "cpu")
    requests = [Request("What?", [picture(seed, 56, 56)]) for seed in range(3)]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    outputs = Pipeline(engines, observe=observe).generate(requests, params)
    assert answers(outputs) == answers(pipelines[backend].generate(requests, params))
    assert sum(stage.name == "vision" for stage in stages) == 3
    assert max(len(stage.outputs) for stage in stages if stage.name == "decode") == 3


# Errors


def bad_requests(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    whole = BytesIO()
    Image.fromarray(picture(0, 100, 100)).save(whole, "PNG")
    image = picture(0, 60, 60)
    return {
        "no such file": (Request("x", [tmp_path / "none.png"]), MediaError, "image 1 .*no such file"),
        "empty": (Request("x", [image, tmp_path / "empty.png"]), MediaError, "image 2 .*empty"),
        "no image": (Request("x", [tmp_path / "text.png"]), MediaError, "not an image"),
        "truncated": (Request("x", [whole.getvalue()[:200]]), MediaError, "truncated or corrupt"),
        "no pixels": (Request("x", [np.zeros((0, 5, 3), np.uint8)]), MediaError, "no pixels"),
        "ratio": (Request("x", [np.zeros((10, 2500, 3), np.uint8)]), MediaError, "aspect ratio of 250"),
        "few images": (Request("<image> <image>", [image]), PromptError, "places for images .*: 2; images given: 1"),
        "many images": (Request("<image>", [image, image]), PromptError, "places for images .*: 1; images given: 2"),
        "no place in messages": (Request([{"role": "user", "content": [{"type": "text", "text": "x"}]}], [image]),
                                 PromptError, "open .*: 0; images given: 1"),
        "empty prompt": (Request(""), PromptError, "empty"),
        "None": (Request(None), PromptError, "string or a list of messages"),
        "unknown key": (Request([{"role": "user", "content": "x", "y": 1}]), PromptError, "unknown key 'y'"),
        "lone surrogate": (Request("\ud800"), PromptError, r"character 1 of the text is '\\ud800'"),
        "lone surrogate in a name": (Request("x", ["\ud800.png"]), MediaError, "image 1 "),
        "null in a name": (Request([{"role": "user", "content": [{"image": "\0.png"}]}]), MediaError, "image 1 .*null"),
        "remote": (Request("x", ["https://x/y.png"]), PromptError, "image 1: .*is remote; download it"),
        "file URL": (Request("x", ["file:///none/a%20b.png"]), MediaError, r"image 1 \(/none/a b.png\): no such file"),
        "lone surrogate in a list of frames": (Request("x", videos=[["\ud800"]]), MediaError, "video 1, frame 1 "),
        "much text": (Request("x" * 10**7), LimitError, r"--max-input-len"),
        "too long": (Request("word " * 600), LimitError, r"these engines take 400 \(--max-input-len\)"),
        "lone image": (Request("x", image), MediaError, r"images is a ndarray.*images=\[...\]"),
        "lone path": (Request("x", "a.png"), MediaError, r"images is a str, not a list; give images=\[...\]"),
        "lone video": (Request("x", videos="a.mp4"), MediaError, r"videos is a str, not a list; give videos=\[...\]"),
        "lone bytes": (Request("x", b"abc"), MediaError, "images is a bytes, not a list"),
        "frames as videos": (Request("x", videos=[Image.fromarray(image)] * 2), MediaError, "video 1: .* no video"),
        "no frames": (Request("x", videos=[[]]), MediaError, "video 1: no frames"),
        "nothing": (Request("x", [None]), MediaError, "NoneType is no image"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda _: Request("x", image_options={"max_pixels": 784}), PromptError, "dict; give ImageOptions"),
        (lambda _: Request("x", image_options=VideoOptions()), PromptError, "VideoOptions; give ImageOptions"),
        (lambda _: Request("x", video_options=None), PromptError, "NoneType; give VideoOptions"),
        (lambda _: Request.from_batch([], []), MediaError, "a list is no tensor"),
        (lambda _: Request.from_batch(torch.zeros(2, 1, 3, 28, 28), "ab"), PromptError, "prompts is a string"),
        (lambda pipeline: pipeline.embed_images("a.png"), MediaError, "images is a str, not a list"),
        (lambda pipeline: pipeline.embed_images(b"abc"), MediaError, "images is a bytes, not a list"),
        (lambda pipeline: pipeline.hidden_states("abc"), PromptError, "a str is no request"),
        (lambda pipeline: pipeline.generate("abc"), PromptError, "a str is no request"),
        (lambda pipeline: pipeline.generate(Request("x"), {"max_tokens": 1}), SamplingError, "dict; give SamplingP"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_the_way_out(pipelines, call, error, message):
    with pytest.raises(error, match=message):
        call(pipelines["torch"])


def test_a_bad_request_leaves_the_others_alone(pipeline, tmp_path, capfd):
    params = SamplingParams(max_tokens=8)
    good = [random_request(seed) for seed in range(5)]
    expected = answers(pipeline.generate(good, params))
    cases = bad_requests(tmp_path)
    requests, expectations = [], []
    for number, (name, (request, kind, message)) in enumerate(cases.items()):
        requests.append(request)
        expectations.append((name, kind, message))
        if number < len(good):
            requests.append(good[number])
            expectations.append(None)
    outputs = pipeline.generate(requests, params)
    assert answers(output for output, wrong in zip(outputs, expectations) if wrong is None) == expected
    for output, wrong in zip(outputs, expectations):
        if wrong is None:
            assert output.error is None
            continue
        name, kind, message = wrong
        assert type(output.error) is kind, (name, output.error)
        with pytest.raises(kind, match=message):
            output.text  # noqa: B018
        with pytest.raises(kind):
            output.token_ids  # noqa: B018
        assert "\n" not in str(output.error)
        assert output.finished
        assert output.timings.total >= 0
    assert capfd.readouterr() == ("", "")  # Transformers would warn of a long prompt
    with pytest.raises(MediaError, match="no such file"):
        list(pipeline.stream([requests[0], good[0]], params))


def test_special_tokens_are_text_unless_they_are_allowed(engine_dirs, pipelines):
    allowing = Pipeline.from_engine_dir(engine_dirs["torch"], "cpu", PipelineOptions(allow_special_tokens=True))
    request, params = Request("a<|im_end|>b"), SamplingParams(max_tokens=1)
    plain, special = (each.generate([request], params)[0] for each in (pipelines["torch"], allowing))
    assert plain.prompt_tokens > special.prompt_tokens
    assert pipelines["torch"].generate([Request("<|image_pad|>")], params)[0].error is None


def test_a_prompt_and_its_answer_must_fit(pipeline):
    request = random_request(1, images=1, words=10)
    length = pipeline.generate([request], SamplingParams(max_tokens=1))[0].prompt_tokens
    room = PROFILE.max_seq_len - length
    output = pipeline.generate([request], SamplingParams(max_tokens=room + 1))[0]
    with pytest.raises(LimitError, match=f"Lower max_tokens to {room} or less"):
        output.text  # noqa: B018
    filled = pipeline.generate([request], SamplingParams(max_tokens=room, ignore_eos=True))[0]
    assert len(filled.token_ids) == room


def test_a_prompt_of_exactly_the_limit(pipelines):
    pipeline = pipelines["onnxruntime"]
    tokens = pipeline.generate([Request("a a a")], SamplingParams(max_tokens=1))[0].prompt_tokens
    fitting = Request("a a a" + " a" * (PROFILE.max_input_len - tokens))
    output = pipeline.generate([fitting], SamplingParams(max_tokens=300, ignore_eos=True))[0]
    assert (output.prompt_tokens, len(output.token_ids)) == (400, 300)
    with pytest.raises(LimitError, match="401 tokens"):
        pipeline.hidden_states([Request(fitting.prompt + " a")])


def test_settings_are_one_for_all_or_one_each(pipeline):
    requests = [random_request(seed) for seed in range(3)]
    with pytest.raises(SamplingError, match="3 requests came with 2"):
        pipeline.generate(requests, [SamplingParams()] * 2)
    assert not pipeline.busy


def test_a_named_request_or_image_is_wrong(pipeline):
    with pytest.raises(PromptError, match="request 2: the prompt is empty"):
        pipeline.hidden_states([random_request(0), Request("")])
    with pytest.raises(MediaError, match=r"image 6: .* no pixels"):
        pipeline.embed_images([picture(0)] * 5 + [np.zeros((0, 3, 3), np.uint8)])


def test_pixel_limits_resize_images(engine_dirs, pipelines):
    image = picture(0, 600, 600)
    small = Pipeline.from_engine_dir(engine_dirs["torch"], "cpu", PipelineOptions(max_pixels=35280))
    assert len(small.embed_images([image])[0]) == 36  # 12x12 patches
    large = Pipeline.from_engine_dir(engine_dirs["torch"], "cpu", PipelineOptions(min_pixels=25_000))
    assert len(large.embed_images([picture(0, 28, 28)])[0]) == 36  # 12x12 patches are the next
    with pytest.raises(LimitError, match="min_pixels"):
        Pipeline.from_engine_dir(engine_dirs["torch"], "cpu", PipelineOptions(min_pixels=9000, max_pixels=8000))


def test_an_unknown_or_absent_device_is_named(engine_dirs):
    for device in ("tpu", "meta", "cuda:99"):
        with pytest.raises(EngineError, match=device):
            Pipeline.from_engine_dir(engine_dirs["onnxruntime"], device)


def test_a_tokenizer_of_another_model_is_refused(engine_dirs, monkeypatch):
    monkeypatch.setattr(ChatTokenizer, "__len__", lambda self: 10**6)
    with pytest.raises(CheckpointError, match="another model"):
        Pipeline.from_engine_dir(engine_dirs["torch"], "cpu")


# Memory


def test_many_requests_leave_nothing_behind(pipeline):
    import psutil

    process, params = psutil.Process(), SamplingParams(max_tokens=12)
    cache = pipeline.engines.decoder.cache

    def run(seeds):
        outputs = pipeline.generate([random_request(seed) for seed in seeds], params)
        return [weakref.ref(output) for output in outputs]

    run(range(36))  # oneDNN compiles a kernel for each new shape, and keeps it
    gc.collect()
    before = process.memory_info().rss
    for start in range(0, 36, 12):
        references = run(range(start, start + 12))
        gc.collect()
        assert not any(reference() for reference in references)
        pipeline.clear_caches()
        assert cache.capacity == 128
    assert process.memory_info().rss - before < 64 << 20


# Real answers


def test_the_tiny_model_reads_digits(tmp_path):
    try:
        resolve_model("tiny")
    except CheckpointError:
        pytest.skip("the tiny model is not there yet")
    scenes = {task: held_out_scenes(task, 20, seed=5) for task in TASKS}
    pipeline = Pipeline.from_engine_dir(build(resolve_model("tiny").folder, tmp_path / "torch", "torch"), "cpu")
    right = {
        task: sum(answer == scene.answer for answer, scene in zip(answer_scenes(pipeline, asked), asked))
        for task, asked in scenes.items()
    }
    assert right["read"] >= 15, right
    assert min(right.values()) >= 13, right


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_what_is_loaded_in_inference_mode_serves_callers_outside(engine_dirs, backend):
    pipeline, params = Pipeline.from_engine_dir(engine_dirs[backend], "cpu"), SamplingParams(max_tokens=3)
    with torch.inference_mode():
        first = pipeline.generate(Request("Hello"), params)[0].token_ids
    assert pipeline.generate(Request("Hello"), params)[0].token_ids == first
    assert len(pipeline.hidden_states(Request("Hello"))) == 1
