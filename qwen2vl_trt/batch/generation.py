"""Answers to rows, as many at a time as a token budget allows, written in the rows' order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice

import torch

from qwen2vl_trt.errors import ExecutionError, MediaError
from qwen2vl_trt.runtime.inputs.files import opened
from qwen2vl_trt.runtime.inputs.image_formats import open_image
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.preprocessing.sizes import SizeRules
from qwen2vl_trt.runtime.request import Output, Request
from qwen2vl_trt.runtime.sampling_params import SamplingParams

from .journal import Journal
from .partition_file import PartitionWriter
from .row_source import fetch, out_of_memory
from .rows import Row


@dataclass
class _Answer:
    """A row on its way: fetched, then submitted, then finished but behind an earlier one that is not."""

    row: Row
    image: str | bytes | None = None
    tokens: int = 0
    output: Output | None = None
    failure: str | None = None

    @property
    def ended(self) -> bool:
        return self.failure is not None or (self.output is not None and self.output.finished)


class Generation:
    """Answers rows with in-flight batching; the pipeline loads their images ahead.

    Args:
        pipeline: used for nothing else.
        params: of every answer.
        max_tokens: image tokens and answer tokens of the rows that the pipeline has at once; half as many after memory
            ran out.
        threads: that fetch images from other machines.
    """

    def __init__(self, pipeline: Pipeline, params: SamplingParams, max_tokens: int, threads: int) -> None:
        self._pipeline, self._params, self._max_tokens, self._threads = pipeline, params, max_tokens, threads
        self._answer_tokens = min(pipeline.decided(params).max_tokens, pipeline.profile.max_seq_len)
        self._sizes = SizeRules(pipeline.engines.checkpoint.config.vision, pipeline.settings)
        if pipeline.engines.device.type == "cuda":
            pipeline.warm_up()  # captures CUDA graphs, in no answer's time
        self._ahead = 2 * pipeline.profile.max_num_seqs  # rows in the slots, and as many that are being loaded

    def answer(self, rows: Iterable[Row], writer: PartitionWriter) -> None:
        """Write an answer, or what is wrong, of each row.

        Raises:
            Qwen2VLError: what is wrong with the engines or the output, whatever the row.
        """
        executor = ThreadPoolExecutor(self._threads, thread_name_prefix="fetch")
        try:
            fetched = self._fetched(rows, writer.journal, executor)
            queue: deque[_Answer] = deque()
            while True:
                queue.extend(islice(fetched, self._ahead - sum(not answer.ended for answer in queue)))
                if not queue:
                    return
                self._step(queue)
                while queue and queue[0].ended:
                    _write(queue.popleft(), writer)
        finally:
            executor.shutdown(cancel_futures=True)

    def _fetched(self, rows: Iterable[Row], journal: Journal, executor: ThreadPoolExecutor) -> Iterator[_Answer]:
        """The rows in order, each with its image, a few fetched ahead."""
        following = iter(rows)
        jobs: deque[Future[_Answer]] = deque()
        while True:
            more = islice(following, self._threads + 1 - len(jobs))
            jobs.extend(executor.submit(self._fetch, row, journal) for row in more)
            if not jobs:
                return
            yield jobs.popleft().result()

    def _fetch(self, row: Row, journal: Journal) -> _Answer:
        try:
            image = fetch(row, journal)
        except MediaError as error:
            return _Answer(row, failure=str(error))
        return _Answer(row, image, self._image_tokens(image) + self._answer_tokens)

    def _image_tokens(self, image: str | bytes) -> int:
        """From the image's header; 0 where the pipeline is to say what is wrong with it."""
        try:
            with (
                BytesIO(image) if isinstance(image, bytes) else opened(image, "image") as file,
                open_image(file, "image") as header,
            ):
                return self._sizes.image(header.height, header.width).tokens
        except Exception:
            return 0

    def _step(self, queue: Iterable[_Answer]) -> None:
        """Submit rows as far as the budget goes, then one token of every running one."""
        pending = [answer for answer in queue if answer.output is not None and not answer.ended]
        tokens = sum(answer.tokens for answer in pending)
        for answer in queue:
            if answer.output is not None or answer.image is None:
                continue
            if pending and tokens + answer.tokens > self._max_tokens:
                break
            request = Request(answer.row.prompt or "", [answer.image])
            answer.output = self._pipeline.submit(request, self._params)
            pending.append(answer)
            tokens += answer.tokens
        if pending:
            self._pipeline.step()
        short = []
        for answer in pending:
            error = answer.output.error if answer.output is not None else None
            if error is not None and out_of_memory(error):
                short.append(answer)
            elif isinstance(error, ExecutionError):  # of the engines, not of the row
                raise error
            elif answer.ended:
                answer.image = None  # it may wait long behind an earlier one
        if short:
            self._shrink(short, len(pending) == 1, tokens)

    def _shrink(self, short: list[_Answer], alone: bool, tokens: int) -> None:
        """Begin again with what memory ran out for, in half of the budget."""
        for answer in short:
            assert answer.output is not None
            if alone:
                answer.image = None
                answer.failure = (
                    f"row {answer.row.id}: out of memory with this row alone, {tokens:,} tokens: lower --max-pixels or"
                    f" --max-tokens ({answer.output.error})"
                )
            answer.output = None
        torch.cuda.empty_cache()
        self._max_tokens = max(1, min(self._max_tokens, tokens) // 2)


def _write(answer: _Answer, writer: PartitionWriter) -> None:
    key, output = answer.row.id, answer.output
    if output is None:
        writer.fail(key, answer.failure or "")
    elif output.error is not None:
        writer.fail(key, f"row {key}: {output.error}")
    else:
        (size,) = output.images
        row = {
            "id": key,
            "prompt": answer.row.prompt,
            "answer": output.text,
            "prompt_tokens": output.prompt_tokens,
            "output_tokens": len(output.token_ids),
            "finish_reason": output.finish_reason,
            "original_size": [size.width, size.height],
            "resized_size": [size.resized_width, size.resized_height],
        }
        writer.add_row(row, len(output.text) + 256)
