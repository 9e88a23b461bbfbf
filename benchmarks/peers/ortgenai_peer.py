"""onnxruntime-genai, as a system of :mod:`measured`: the text model alone, for its builder makes no vision tower.

It is built as Qwen2's, which it is for text, where the three positions of a token are equal: the builder fuses Qwen2's
rotary embedding and projections. ``lm_head`` is asked for the last token alone, as ours is.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import measured


def convert(model: str, precision: str, folder: str) -> None:
    """By its builder; 4 and 8 bits with its defaults, blocks of 32 and accuracy level 4."""
    import runpy

    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / "text"
        text.mkdir()
        for file in Path(model).iterdir():
            (text / file.name).symlink_to(file)
        config = json.loads((text / "config.json").read_text())
        for name in ("vision_config", "rope_scaling"):
            del config[name]
        (text / "config.json").unlink()
        config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        (text / "config.json").write_text(json.dumps(config))
        sys.argv = ["builder", "-i", str(text), "-o", folder, "-p", precision, "-e", "cpu", "-c", temporary]
        sys.argv += ["--extra_options", "prune_lm_head=true"]
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


class OnnxRuntimeGenAI:
    """One thread; a generator, with its cache, for each call."""

    def __init__(self, given: dict[str, Any]) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        config = onnxruntime_genai.Config(given["folder"])
        one = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": one}}}))
        self._model = onnxruntime_genai.Model(config)
        self._tokenizer = onnxruntime_genai.Tokenizer(self._model)

    def answer(self, text: str, images: list[str], batch: int, tokens: int) -> int:
        import numpy

        if images:
            raise NotImplementedError
        prompt = self._tokenizer.encode(measured.CHAT.format(text))
        length = len(prompt)
        params = self._genai.GeneratorParams(self._model)
        whole = length + tokens  # below the shortest length no token ends an answer
        params.set_search_options(do_sample=False, batch_size=batch, min_length=whole, max_length=whole)
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(numpy.tile(numpy.asarray(prompt, numpy.int32), (batch, 1)))
        while not generator.is_done():
            generator.generate_next_token()
        if len(generator.get_sequence(batch - 1)) != whole:
            raise SystemExit("an answer ended early")
        return length

    def embed(self, images: list[str]) -> None:
        raise NotImplementedError


if __name__ == "__main__":
    measured.main(OnnxRuntimeGenAI, "onnxruntime-genai", convert=convert)
