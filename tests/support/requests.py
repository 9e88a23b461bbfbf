"""Random requests, the same for the same seed: every mix of words, pictures, clips and sampling; some load slowly."""

import threading

import numpy as np

from qwen2vl_trt import Request, SamplingParams, Video

PATIENCE = 60  # seconds after which a test that hangs fails

WORDS = ["What", "digits", "are", "in", "the", "images?", "Read", "both:", "first", "second", "How", "many", "see", "7"]


def picture(seed, height=None, width=None):
    """A random RGB array with sides from 28 to 150 pixels."""
    rng = np.random.default_rng(seed)
    height, width = height or int(rng.integers(28, 150)), width or int(rng.integers(28, 150))
    coarse = rng.integers(0, 256, (-(-height // 9), -(-width // 9), 3), dtype=np.uint8)
    return coarse.repeat(9, 0).repeat(9, 1)[:height, :width]


def clip(seed, frames=4, height=60, width=60):
    return Video([picture(1000 * seed + number, height, width) for number in range(frames)], fps=2.0)


def random_request(seed, images=None, videos=None, words=None):
    """A prompt of up to 60 words with up to 3 images and 1 video, at places of their own or first."""
    rng = np.random.default_rng(seed)
    images = int(rng.choice([0, 1, 1, 2, 3])) if images is None else images
    videos = int(rng.random() < 0.2) if videos is None else videos
    text = [WORDS[rng.integers(len(WORDS))] for _ in range(words or rng.integers(1, 60))]
    if rng.random() < 0.5:
        for place in ["<image>"] * images + ["<video>"] * videos:
            text.insert(int(rng.integers(len(text) + 1)), place)
    return Request(
        " ".join(text),
        [picture(10 * seed + number) for number in range(images)],
        [clip(seed, int(rng.integers(1, 7))) for _ in range(videos)],
    )


def random_params(seed, max_tokens=None):
    rng = np.random.default_rng([seed, 1])
    max_tokens = max_tokens or int(rng.integers(1, 25))
    if rng.random() < 0.5:
        return SamplingParams(max_tokens, repetition_penalty=float(rng.choice([1.0, 1.3])))
    return SamplingParams(
        max_tokens,
        temperature=float(rng.uniform(0.3, 1.5)),
        top_p=float(rng.choice([1.0, 0.9])),
        top_k=int(rng.choice([0, 20])),
        seed=seed,
    )


def answers(outputs):
    return [(output.token_ids, output.text, output.finish_reason) for output in outputs]


class Gate:
    """Holds up the loading of requests with an image of a marked height until it is opened."""

    def __init__(self, pipeline, height):
        self.opened, self.begun, self.threads = threading.Event(), 0, set()
        preparer, self.height = pipeline._preparer, height
        self._load, preparer.load = preparer.load, self.load

    def load(self, found, most_tokens=None):
        if any(isinstance(image, np.ndarray) and image.shape[0] == self.height for image in found.images):
            self.threads.add(threading.current_thread())
            self.begun += 1
            assert self.opened.wait(PATIENCE)
        return self._load(found, most_tokens)


def held(text="What?", **options):
    return Request(text, [picture(1, 99, 60)], **options)
