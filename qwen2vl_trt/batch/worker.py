"""The actor that works on partitions: one pipeline, opened once, and one partition at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch

from qwen2vl_trt.errors import BatchError, Qwen2VLError
from qwen2vl_trt.runtime.features.extraction import Batching, Pool, extract_features
from qwen2vl_trt.runtime.features.output_folder import writing
from qwen2vl_trt.runtime.features.sources import FeatureSource, VisionFeatures
from qwen2vl_trt.runtime.options import PipelineOptions
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.sampling_params import SamplingParams

from .generation import Generation
from .journal import Journal
from .partition_file import ANSWER_SCHEMA, Done, PartitionWriter, feature_schema, read_done
from .row_source import PromptedDecoderFeatures, RowSource
from .rows import Columns, Partition, Row, read_rows

Task = Literal["features", "generate"]


@dataclass(frozen=True)
class WorkerSettings:
    """What every worker of a run is told; most are options of the command.

    Attributes:
        engine_dir: opened by each worker; on a cluster, where every machine sees it, as ``output``.
        work: folder of this run's attempts, in ``output``.
        prompt: of every row; None where rows have their own, or need none.
        device: None for the pipeline's default.
        batch_tokens: None for what the engines take.
        threads: of a worker, for decoding and, on the CPU, for the engines.
        workers: how many there are.
    """

    engine_dir: Path
    output: Path
    work: Path
    columns: Columns
    task: Task
    prompt: str | None
    params: SamplingParams
    source: str
    layer: int | None
    pool: Pool
    device: str | None
    options: PipelineOptions
    batch_tokens: int | None
    threads: int
    max_retries: int
    workers: int


class Worker:
    """Made by Ray Data in a process of its own.

    What ends the run is returned, not raised: Ray would print a stack trace for it.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._fatal: Qwen2VLError | OSError | None = None
        try:
            with _counted_start(settings):
                self._open()
        except (Qwen2VLError, OSError) as error:
            self._fatal = error

    def __call__(self, partition: dict[str, Any]) -> dict[str, Any]:
        """Work on a partition, unless it is done; ``fatal`` is what ends the run, or empty."""
        given = Partition(**partition)
        answer = {"number": given.number, "saved": 0, "failed": 0, "first_failure": "", "fatal": ""}
        try:
            if self._fatal is not None:
                raise self._fatal
            done = self._work(given)
        except (Qwen2VLError, OSError) as error:
            return answer | {"fatal": str(error)}
        first = done.failures[0]["error"] if done.failures else ""
        return answer | {"saved": done.saved, "failed": len(done.failures), "first_failure": first}

    def _open(self) -> None:
        settings = self._settings
        torch.set_num_threads(settings.threads)
        pipeline = Pipeline.from_engine_dir(settings.engine_dir, settings.device, settings.options)
        config, profile = pipeline.engines.checkpoint.config, pipeline.profile
        self._batching = Batching.of(pipeline, settings.source, settings.batch_tokens, settings.threads)
        self._generation: Generation | None = None
        self._source: RowSource | None = None
        if settings.task == "generate":
            self._schema = ANSWER_SCHEMA
            budget = settings.batch_tokens or profile.max_num_seqs * profile.max_seq_len
            self._generation = Generation(pipeline, settings.params, budget, settings.threads)
            return
        width = config.text.hidden_size
        if settings.source == "decoder":
            source: FeatureSource = PromptedDecoderFeatures(pipeline, "", settings.layer)
        else:
            source = VisionFeatures(pipeline, settings.layer)
            width = config.vision.out_hidden_size if settings.layer is None else config.vision.hidden_size
        self._schema = feature_schema(width if settings.pool == "mean" else None)
        self._source = RowSource(source, self._batching.max_tokens)

    def _work(self, partition: Partition) -> Done:
        settings = self._settings
        done = read_done(settings.output, partition.number)
        if done is not None:
            return done
        notes = settings.work / f"partition {partition.number}.journal"
        with Journal(notes, settings.max_retries) as journal:
            writer = PartitionWriter(
                settings.output, partition.number, partition.rows, self._schema, settings.work, journal
            )
            try:
                # Rows that may be what a worker was lost to are taken one by one, in their place in the order.
                rows = enumerate(read_rows(partition, settings.columns))
                for _, group in groupby(rows, lambda item: item[0] + 1 if journal.alone(item[1].id) else 0):
                    self._run(_tried((row for _, row in group), journal, writer, settings), writer)
                writer.commit()
            finally:
                writer.discard()
        done = read_done(settings.output, partition.number)
        if done is None:
            raise BatchError(f"{settings.output}: partition {partition.number} has vanished; --resume makes it again")
        notes.unlink(missing_ok=True)
        return done

    def _run(self, rows: Iterator[Row], writer: PartitionWriter) -> None:
        if self._generation is not None:
            self._generation.answer(rows, writer)
        elif self._source is not None:
            files = self._source.files(rows, writer.journal)
            extract_features(self._source, files, writer, self._batching, self._settings.pool)


def _tried(rows: Iterator[Row], journal: Journal, writer: PartitionWriter, settings: WorkerSettings) -> Iterator[Row]:
    """The rows with the run's prompt, without those that are given up."""
    for row in rows:
        if journal.given_up(row.id):
            times = journal.losses(row.id)
            writer.fail(row.id, f"row {row.id}: {times} workers were lost with it in hand (crashed or out of memory)")
        elif settings.prompt is not None:
            yield replace(row, prompt=settings.prompt)
        elif settings.columns.prompt and row.prompt is None and row.fault is None:
            yield replace(row, fault=f"the column {settings.columns.prompt!r} is empty")
        else:
            yield row


@contextmanager
def _counted_start(settings: WorkerSettings) -> Iterator[None]:
    """Ray starts a lost worker again without end; one that is lost as it opens the engines ends the run."""
    path = settings.work / "starts"
    begun = path.read_bytes().rpartition(b"-")[2].count(b"+") if path.exists() else 0
    if begun >= settings.workers * (settings.max_retries + 1):
        raise BatchError(
            f"{begun} workers in a row were lost while they opened the engines: out of memory? Give fewer --workers"
        )
    with writing(path):
        with path.open("ab") as file:
            file.write(b"+")
        yield
        with path.open("ab") as file:
            file.write(b"-")
