"""What a request and an answer look like in a log or a debugger."""

import numpy as np
import torch

from qwen2vl_trt import ImageOptions, Output, Request, Video


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
