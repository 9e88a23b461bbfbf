"""What a request and an answer look like in a log or a debugger."""

from io import BytesIO

import numpy as np
import torch
from PIL import Image

from qwen2vl_trt import ImageOptions, Output, Pipeline, Request, SamplingParams, Video


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
