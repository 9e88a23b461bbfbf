"""Answers about one image, and embeddings of it, in few lines.

python examples/ask.py docs/digits.png "What digits are in the image?"
"""

from __future__ import annotations

import os
import sys

from qwen2vl_trt import Pipeline, Qwen2VLError, Request, SamplingParams


def main(image: str, prompt: str) -> None:
    """Print the answer as it comes, then what it took."""
    folder = os.environ.get("ENGINE_DIR")
    pipeline = Pipeline.from_engine_dir(folder) if folder else Pipeline.from_pretrained("tiny")
    for event in pipeline.stream(Request(prompt, [image]), SamplingParams(max_tokens=64)):
        print(event.text, end="", flush=True)
    output = event.output
    print(f"\n{output.prompt_tokens} prompt tokens, {output.timings.total * 1000:.0f} ms")
    (embedding,) = pipeline.embed_images([image])  # [tokens, hidden]
    print(f"embedding of the image: {tuple(embedding.shape)}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} IMAGE PROMPT")
    try:
        main(*sys.argv[1:])
    except Qwen2VLError as error:  # one line: what is wrong, and the way out
        sys.exit(f"error: {error}")
