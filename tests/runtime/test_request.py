"""What a request and an answer look like in a log or a debugger."""

import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl_trt import ImageOptions, Output, Pipeline, Request, SamplingParams, Video
from qwen2vl_trt.errors import LimitError, PromptError
from tests.support.requests import PATIENCE, answers, random_request


def test_pixels_and_long_texts_are_shortened():
    image = np.zeros((400, 300, 3), np.uint8)
    request = Request("Hi", [image, torch.zeros(3, 8, 8), b"x" * 5000, "a.png"], [Video([image], 2.0)], deadline=3.0)
    shown = repr(request)
    assert shown == (
        "Request(prompt='Hi', images=[<ndarray (400, 300, 3) uint8>, <Tensor (3, 8, 8) torch.float32>, <5,000 bytes>,"
        " 'a.png'], videos=[Video(frames=[<ndarray (400, 300, 3) uint8>], fps=2.0)], deadline=3.0)"
    )
    message = {"role": "user", "content": [{"type": "image", "image": "data:image/png;base64," + "A" * 10**6}]}
    assert len(repr(Request([message]))) < 400
    assert "image_options=ImageOptions(max_pixels=784)" in repr(
        Request("x" * 10**6, image, image_options=ImageOptions(max_pixels=784))
    )


def test_an_answer_says_how_far_it_is():
    output = Output()
    output.append(5, "Yes", None, output.arrival)
    assert repr(output) == "Output(text='Yes', tokens=1, finish_reason=None, prompt_tokens=0, images=0, videos=0)"
    output.cancel()
    assert "finish_reason='cancelled'" in repr(output)


def test_different_salts_share_neither_prefixes_nor_embeddings(engine_dirs):
    pipeline = Pipeline.from_engine_dir(engine_dirs["torch"], "cpu")
    image = np.random.default_rng(0).integers(0, 256, (56, 112, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(image).save(file, "PNG")
    texts, misses, reused = set(), [], []
    for source in (image, file.getvalue()):
        pipeline.clear_caches()
        for salt in (None, "a", "b", "a"):
            request = Request("What digits are in the image? " * 4, [source], cache_salt=salt)
            output = pipeline.generate(request, SamplingParams(max_tokens=3))[0]
            texts.add(output.text)
            misses.append(pipeline.counters().embedding_misses)
            reused.append(output.reused_tokens > 0)
    assert len(texts) == 1
    assert misses == [1, 2, 3, 3, 4, 5, 6, 6]
    assert reused == [False, False, False, True] * 2


def test_tokenize_counts_what_the_decoder_reads(engine_dirs):
    pipeline = Pipeline.from_engine_dir(engine_dirs["torch"], "cpu")
    request = Request("What digits are in the image?", [np.zeros((56, 112, 3), np.uint8)])
    prompt = pipeline.tokenize(request)
    output = pipeline.generate(request, SamplingParams(max_tokens=1))[0]
    assert len(prompt.token_ids) == output.prompt_tokens
    assert prompt.token_ids.count(pipeline.engines.checkpoint.config.image_token_id) == output.images[0].tokens


def test_a_prompt_of_token_ids_is_read_as_it_is(pipeline):
    requests = [random_request(seed, images=0, videos=0) for seed in range(4)]
    ids = [pipeline.tokenize(request).token_ids for request in requests]
    params = SamplingParams(max_tokens=16, repetition_penalty=1.2)
    found = pipeline.generate([Request(each) for each in ids], params)
    assert answers(found) == answers(pipeline.generate(requests, params))
    assert pipeline.tokenize(Request(ids[0])) == pipeline.tokenize(requests[0])


def test_token_ids_of_a_bare_text_equal_transformers(pipeline, reference):
    model, processor = reference
    for text in ("What digits are", "read both: Ünïcode 北京 \U0001f600 <image>"):
        ids = pipeline.encode(text)
        assert ids == processor.tokenizer(text)["input_ids"]
        output = pipeline.generate(Request(ids), SamplingParams(max_tokens=16))[0]
        assert output.prompt_tokens == len(ids)
        expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=16)[0, len(ids) :]
        assert output.token_ids == expected.tolist()


def test_special_tokens_of_a_bare_text_are_text(pipelines):
    pipeline = pipelines["torch"]
    end = pipeline.tokenizer.token_to_id("<|im_end|>")
    ids = pipeline.encode("a<|im_end|>b<|image_pad|>")
    assert end not in ids
    assert pipeline.tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_end|>b<|image_pad|>"
    assert pipeline.encode("") == []
    with pytest.raises(PromptError, match="lone surrogate"):
        pipeline.encode("a\ud800")
    with pytest.raises(PromptError, match="the prompt is 5, not a string"):
        pipeline.encode(5)
    with pytest.raises(LimitError, match="max-input-len"):
        pipeline.encode("a" * 10**8)
    # Ids are the caller's own.
    assert pipeline.generate(Request([*ids, end]), SamplingParams(max_tokens=1))[0].prompt_tokens == len(ids) + 1


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ([5, 10**6], {}, "token 2 of the prompt is 1000000; the model's vocabulary has 0 to"),
        ([-1], {}, "token 1 of the prompt is -1"),
        ([5, "a"], {}, "token 2 of the prompt is 'a'"),
        ([True], {}, "token 1 of the prompt is True"),
        ([5, 6], {"images": [np.zeros((56, 56, 3), np.uint8)]}, "takes no images and videos"),
        ([5, 6], {"videos": [np.zeros((2, 56, 56, 3), np.uint8)]}, "takes no images and videos"),
        ([], {}, "the prompt is empty"),
    ],
)
def test_token_ids_that_are_none(pipelines, prompt, options, error):
    output = pipelines["torch"].generate(Request(prompt, **options))[0]
    assert isinstance(output.error, PromptError)
    assert error in str(output.error)


def test_token_ids_of_media_and_too_many(pipelines):
    pipeline = pipelines["torch"]
    config = pipeline.engines.checkpoint.config
    for token in (config.image_token_id, config.video_token_id):
        with pytest.raises(PromptError, match="stands for an image or a video"):
            pipeline.tokenize(Request([5, token]))
    with pytest.raises(LimitError, match="1,000,000 token ids, more than"):
        pipeline.tokenize(Request([5] * 10**6))


def test_a_text_is_encoded_beside_a_step(pipelines):
    pipeline = pipelines["torch"]
    with ThreadPoolExecutor(1) as threads, pipeline._alone:
        encoded = threads.submit(pipeline.encode, "Hello")
        assert encoded.result(PATIENCE) == pipeline.encode("Hello")  # without a wait for this lock


def test_threads_do_not_share_the_options_of_the_tokenizer(pipelines, monkeypatch):
    """They stay set until its next call: a text must not be read with those of another."""
    escaper = pipelines["torch"]._prompts._escaper
    tokenizer, second = escaper._tokenizer, threading.Event()

    class Slow:
        encode_special_tokens = False

        def encode_batch(self, texts, **options):
            tokenizer.encode_special_tokens = self.encode_special_tokens
            if self.encode_special_tokens:
                second.set()
            else:
                other.start()
                assert not second.wait(0.2)
            return tokenizer.encode_batch(texts, **options)

    found = []
    other = threading.Thread(target=lambda: found.append(escaper.encode_ordinary("<|im_end|>")))
    monkeypatch.setattr(escaper, "_tokenizer", Slow())
    assert len(escaper.encode_plain("<|im_end|>")) == 1
    other.join(PATIENCE)
    assert len(found[0]) > 1
