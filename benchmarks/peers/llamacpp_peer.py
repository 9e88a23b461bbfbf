"""llama.cpp by the bindings of llama-cpp-python, as a system of :mod:`measured`.

Its defaults, on one thread: attention, the cache and the batches as it takes them. The precisions are its own names.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import measured

SOURCE = Path(sys.prefix) / "source/vendor/llama.cpp"
"""Of the release that the bindings were built from: its converter is no part of the package."""
QUANTIZED = ("q8_0", "q4_0")


def convert(model: str, precision: str, folder: str) -> None:
    """By its converter and, to 4 bits, its quantizer.

    Beside quantized weights the vision tower is in 16 bits, as published ones are: in BF16 where the CPU multiplies it.
    """
    import llama_cpp

    sys.path[:0] = [str(SOURCE), str(SOURCE / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"  # known by a hash of the published vocabulary alone
    Path(folder).mkdir()
    written = "bf16" if precision == "q4_0" else precision
    vision = "bf16" if "avx512_bf16" in Path("/proc/cpuinfo").read_text() else "f16"
    for kind, outtype in (("model", written), ("mmproj", vision if precision in QUANTIZED else precision)):
        sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", f"{folder}/{kind}.gguf", "--outtype", outtype]
        sys.argv += ["--mmproj"] if kind == "mmproj" else []
        convert_hf_to_gguf.main()
    if precision != written:
        whole = Path(folder) / "whole.gguf"
        (Path(folder) / "model.gguf").rename(whole)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
        if llama_cpp.llama_model_quantize(bytes(whole), f"{folder}/model.gguf".encode(), ctypes.byref(params)):
            raise SystemExit("llama_model_quantize failed")
        whole.unlink()


class LlamaCpp:
    """A sequence of the cache for each answer of a batch."""

    def __init__(self, given: dict[str, Any]) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self._llama, self._mtmd = llama_cpp, mtmd_cpp
        self._log = llama_cpp.llama_log_callback(_errors)
        llama_cpp.llama_log_set(self._log, None)
        mtmd_cpp.mtmd_helper_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        folder = given["folder"].encode()
        self._model = llama_cpp.llama_model_load_from_file(
            folder + b"/model.gguf", llama_cpp.llama_model_default_params()
        )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max, params.n_batch = max(given["batches"]), 2048
        params.n_ctx = 1280 * params.n_seq_max  # of all sequences
        params.n_threads = params.n_threads_batch = 1
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        vision = mtmd_cpp.mtmd_context_params_default()
        vision.use_gpu, vision.print_timings, vision.n_threads, vision.warmup = False, False, 1, False
        self._vision = mtmd_cpp.mtmd_init_from_file(folder + b"/mmproj.gguf", self._model, vision)
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def answer(self, text: str, images: list[str], batch: int, tokens: int) -> int:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        if images:
            if batch != 1:
                raise NotImplementedError
            chunks = self._chunks(text, images)
            length = self._mtmd.mtmd_helper_get_n_tokens(chunks)
            after = self._llama.llama_pos()
            failed = self._mtmd.mtmd_helper_eval_chunks(
                *(self._vision, self._context, chunks, 0, 0, self._llama.llama_n_batch(self._context), True),
                ctypes.byref(after),
            )
            if failed:
                raise SystemExit(f"mtmd_helper_eval_chunks: {failed}")
            self._mtmd.mtmd_input_chunks_free(chunks)
            position, rows = after.value, [-1]
        else:
            prompt = self._tokens(measured.CHAT.format(text))
            position = length = len(prompt)
            rows = self._decode([prompt] * batch, 0)
        for _ in range(tokens - 1):
            rows = self._decode([[self._likeliest(row)] for row in rows], position)
            position += 1
        for row in rows:
            self._likeliest(row)
        return length

    def embed(self, images: list[str]) -> None:
        for image in images:
            chunks = self._chunks("", [image])
            for index in range(self._mtmd.mtmd_input_chunks_size(chunks)):
                chunk = self._mtmd.mtmd_input_chunks_get(chunks, index)
                kind = self._mtmd.mtmd_input_chunk_get_type(chunk)
                if kind == self._mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE and self._mtmd.mtmd_encode_chunk(self._vision, chunk):
                    raise SystemExit("mtmd_encode_chunk failed")
            self._mtmd.mtmd_input_chunks_free(chunks)

    def _tokens(self, text: str) -> list[int]:
        raw = text.encode()
        tokens = (self._llama.llama_token * len(raw))()
        count = self._llama.llama_tokenize(self._vocab, raw, len(raw), tokens, len(raw), False, True)
        return list(tokens[:count])

    def _chunks(self, text: str, images: list[str]) -> Any:
        """The prompt with images, preprocessed."""
        mtmd = self._mtmd
        chat = measured.CHAT.format(mtmd.mtmd_default_marker().decode() * len(images) + text).encode()
        bitmaps = [mtmd.mtmd_helper_bitmap_init_from_file(self._vision, image.encode(), False) for image in images]
        chunks = mtmd.mtmd_input_chunks_init()
        failed = mtmd.mtmd_tokenize(
            *(self._vision, chunks, ctypes.byref(mtmd.mtmd_input_text(chat, len(chat), False, True))),
            *((ctypes.c_void_p * len(bitmaps))(*bitmaps), len(bitmaps)),
        )
        if failed:
            raise SystemExit(f"mtmd_tokenize: {failed}")
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        return chunks

    def _decode(self, sequences: list[list[int]], position: int) -> list[int]:
        """Each sequence's next tokens; returns the rows of the logits after their last ones."""
        batch, rows = self._batch, []
        batch.n_tokens = 0
        for number, tokens in enumerate(sequences):
            for offset, token in enumerate(tokens):
                at = batch.n_tokens
                batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = (
                    token,
                    position + offset,
                    1,
                    number,
                )
                batch.logits[at] = offset == len(tokens) - 1
                batch.n_tokens += 1
            rows.append(batch.n_tokens - 1)
        failed = self._llama.llama_decode(self._context, batch)
        if failed:
            raise SystemExit(f"llama_decode: {failed}")
        return rows

    def _likeliest(self, row: int) -> int:
        import numpy

        logits = self._llama.llama_get_logits_ith(self._context, row)
        return int(numpy.ctypeslib.as_array(logits, (self._llama.llama_vocab_n_tokens(self._vocab),)).argmax())


def _errors(level: int, text: bytes, data: Any) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


if __name__ == "__main__":
    measured.main(LlamaCpp, "llama-cpp-python", convert=convert)
