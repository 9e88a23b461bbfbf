"""Answers of a published checkpoint's shape on every CPU backend, against Transformers' ``generate``."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl_trt import Pipeline, PipelineOptions, Request, SamplingParams, Video
from tests.published.conversations import IMAGE, VIDEO, assistant, system, text, user

TOKENS = 8
GAP = 1e-3
"""Smallest distance of the two likeliest logits at which tokens are compared: ten times FP32's tolerance of logits."""


def picture(seed, width, height):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(seed, frames=4, width=112, height=84):
    return [picture(seed + number, width, height) for number in range(frames)]


CASES = {
    "text": ([user(text("What is in the picture? 图片里有什么"))], [], []),
    "image": ([user(IMAGE, text("Describe it."))], [picture(1, 168, 140)], []),
    "two images, several turns": (
        [system("Be brief."), user(IMAGE, text("one")), assistant("two"), user(text("and "), IMAGE, text("?"))],
        [picture(2, 140, 112), picture(3, 112, 224)],
        [],
    ),
    "video": ([user(VIDEO, text("What happens?"))], [], [clip(4)]),
    "image and video": ([user(IMAGE, VIDEO, text("Compare."))], [picture(5, 112, 112)], [clip(6, 2)]),
}


@pytest.fixture(scope="module")
def inputs(processor):
    """Transformers' inputs of each case."""

    def make(name):
        messages, images, videos = CASES[name]
        rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return processor(
            text=[rendered],
            images=[Image.fromarray(image) for image in images] or None,
            videos=[np.stack(frames) for frames in videos] or None,
            return_tensors="pt",
            videos_kwargs={"do_sample_frames": False},
        )

    return make


@pytest.fixture(scope="module")
def expected(model, inputs):
    """Tokens of ``generate`` with its settings, up to the first place where two are equally likely."""
    known = {}

    def tokens(name, **settings):
        key = (name, tuple(settings.items()))
        if key not in known:
            given = inputs(name)
            out = model.generate(
                **given, max_new_tokens=TOKENS, return_dict_in_generate=True, output_scores=True, **settings
            )
            clear = []
            for token, scores in zip(out.sequences[0, given["input_ids"].shape[1] :].tolist(), out.scores):
                best, second = scores[0].topk(2).values.tolist()
                if best - second < GAP:
                    break
                clear.append(token)
            known[key] = clear
        return known[key]

    return tokens


def request(name):
    messages, images, videos = CASES[name]
    return Request(messages, images, [Video(frames, fps=24.0) for frames in videos])


def test_greedy_tokens_equal_transformers(pipeline, expected):
    # Transformers before 5.22 gives frames the limits of images.
    options = PipelineOptions(generation_config="none", cap_pixels_per_frame=False)
    greedy = Pipeline(pipeline.engines, options)
    for name in CASES:
        tokens = expected(name, do_sample=False, repetition_penalty=1.0)
        assert len(tokens) >= TOKENS // 2
        output = greedy.generate(request(name), SamplingParams(max_tokens=TOKENS))[0]
        assert output.token_ids[: len(tokens)] == tokens, name


@pytest.mark.parametrize("name", ["text", "image"])
def test_the_default_is_that_of_the_generation_config(pipeline, expected, name):
    """A temperature of 1e-6, which is greedy, and a repetition penalty of 1.05."""
    torch.manual_seed(0)
    tokens, params = expected(name), SamplingParams(max_tokens=TOKENS)
    decided = pipeline.decided(params)
    assert (decided.temperature, decided.repetition_penalty) in ((0, 1.05), (1e-6, 1.05))
    output = pipeline.generate(request(name), params)[0]
    assert output.token_ids[: len(tokens)] == tokens


def test_streamed_text_and_stop_strings(pipeline, processor):
    """Random weights draw tokens of every script, most of them parts of characters."""
    params = SamplingParams(max_tokens=48, temperature=1.5, seed=3, ignore_eos=True)
    events = list(pipeline.stream(request("text"), params))
    whole = events[-1].output
    assert [event.token_id for event in events] == whole.token_ids
    assert "".join(event.text for event in events) == whole.text
    assert whole.text == processor.tokenizer.decode(whole.token_ids, skip_special_tokens=True)
    stop = whole.text[20:23]
    cut = pipeline.generate(request("text"), replace(params, stop=(stop,)))[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"


def test_requests_in_one_batch_answer_as_alone(pipeline):
    params = SamplingParams(max_tokens=4)
    together = [output.token_ids for output in pipeline.generate([request(name) for name in CASES], params)]
    assert together == [pipeline.generate(request(name), params)[0].token_ids for name in CASES]
