"""Answers to rows, as many at a time as a token budget allows, written in the rows' order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qwen2vl_trt.errors import ExecutionError
from qwen2vl_trt.runtime.features.decode_ahead import Batching, decode_ahead
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.request import Output, Request
from qwen2vl_trt.runtime.sampling_params import SamplingParams

from .memory import out_of_memory
from .partition_file import PartitionWriter
from .row_source import LoadedRow, RowSource
from .rows import Row


@dataclass
class _Answer:
    """A row on its way: decoded, then running, then finished but behind an earlier one that is not."""

    key: str
    image: LoadedRow | None = None
    prompt: str | None = None
    tokens: int = 0
    output: Output | None = None
    failure: str | None = None

    @property
    def ended(self) -> bool:
        return self.failure is not None or (self.output is not None and self.output.finished)


class Generation:
    """Answers rows with in-flight batching.

    Args:
        pipeline: used for nothing else.
        params: of every answer.
        max_tokens: image tokens and answer tokens of the rows that run together; half as many after memory ran out.
    """

    def __init__(self, pipeline: Pipeline, params: SamplingParams, max_tokens: int) -> None:
        self._pipeline, self._params, self._max_tokens = pipeline, params, max_tokens
        self._answer_tokens = min(pipeline.decided(params).max_tokens, pipeline.profile.max_seq_len)

    def answer(self, source: RowSource, rows: Iterable[Row], batching: Batching, writer: PartitionWriter) -> None:
        """Write an answer, or what is wrong, of each row.

        Raises:
            Qwen2VLError: what is wrong with the engines or the output, whatever the row.
        """
        files = enumerate(source.files(rows), start=1)
        with decode_ahead(source, files, batching) as decoded:
            following = next(decoded, None)
            queue: deque[_Answer] = deque()
            while queue or following is not None:
                while following is not None and sum(not answer.ended for answer in queue) < batching.ahead:
                    key, image = following
                    answer = _Answer(key)
                    if isinstance(image, LoadedRow):
                        answer.image, answer.prompt = image, image.row.prompt
                        answer.tokens = image.size.tokens + self._answer_tokens
                    else:
                        answer.failure = str(image)
                    queue.append(answer)
                    following = next(decoded, None)
                self._step(queue)
                for answer in queue:
                    if answer.ended:
                        answer.image = None  # its pixels: it may wait long behind an earlier one
                while queue and queue[0].ended:
                    _write(queue.popleft(), writer)

    def _step(self, queue: Iterable[_Answer]) -> None:
        """Let waiting rows in while there is room, then one token of every running one."""
        running = [answer for answer in queue if answer.output is not None and not answer.ended]
        tokens = sum(answer.tokens for answer in running)
        for answer in queue:
            if answer.image is None or answer.output is not None or answer.failure is not None:
                continue
            if running and (
                tokens + answer.tokens > self._max_tokens or len(running) >= self._pipeline.profile.max_batch_size
            ):
                break
            answer.output = self._pipeline.submit(Request(answer.prompt or "", [*answer.image.frames]), self._params)
            running.append(answer)
            tokens += answer.tokens
        if running:
            self._pipeline.step()
        short = []
        for answer in running:
            error = answer.output.error if answer.output is not None else None
            if error is not None and out_of_memory(error):
                short.append(answer)
            elif isinstance(error, ExecutionError):  # of the engines, not of the row
                raise error
        if short:
            self._shrink(short, running, tokens)

    def _shrink(self, short: list[_Answer], running: list[_Answer], tokens: int) -> None:
        """Begin again with what memory ran out for, in half of the room."""
        for answer in short:
            assert answer.output is not None
            if len(running) == 1:
                answer.failure = (
                    f"row {answer.key}: out of memory with this row alone, {tokens:,} tokens: lower --max-pixels or"
                    f" --max-tokens ({answer.output.error})"
                )
            answer.output = None
        torch.cuda.empty_cache()
        self._max_tokens = max(1, min(self._max_tokens, tokens) // 2)


def _write(answer: _Answer, writer: PartitionWriter) -> None:
    if answer.output is not None and answer.output.error is not None:
        writer.fail(answer.key, f"row {answer.key}: {answer.output.error}")
    elif answer.output is None:
        writer.fail(answer.key, answer.failure or "")
    else:
        output = answer.output
        (size,) = output.images
        row = {
            "id": answer.key,
            "prompt": answer.prompt,
            "answer": output.text,
            "prompt_tokens": output.prompt_tokens,
            "output_tokens": len(output.token_ids),
            "finish_reason": output.finish_reason,
            "original_size": [size.width, size.height],
            "resized_size": [size.resized_width, size.resized_height],
        }
        writer.add_row(row, len(output.text) + 256)
