"""Features of images or answers about them, on many workers: Parquet out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2vl_trt.errors import BatchError, require
from qwen2vl_trt.messages import LONE_SURROGATE
from qwen2vl_trt.runtime.sampling_params import SamplingParams

from .job import add_feature_arguments, add_output_arguments, if_exists, progress, saying_what_is_saved
from .model import find_engines
from .options import (
    add_build_arguments,
    add_pipeline_arguments,
    add_sampling_arguments,
    folder_name,
    pipeline_options,
    positive_number,
    sampling_params,
)

if TYPE_CHECKING:
    from qwen2vl_trt.batch.inputs import Input
    from qwen2vl_trt.batch.rows import Partition
    from qwen2vl_trt.runtime.features.output_folder import OutputFolder

_INPUT, _WORK = "input", ".work"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    parser.add_argument(
        "--input", required=True, metavar="DIR|GLOB|URI", help="images, or tables: '*.parquet', '*.jsonl', 's3://...'"
    )
    parser.add_argument(
        "--output", type=folder_name, required=True, metavar="DIR", help="a folder that every worker sees"
    )
    parser.add_argument("--task", choices=("features", "generate"), required=True)
    table = parser.add_argument_group("rows")
    table.add_argument("--image-column", metavar="NAME", help="path, URI or bytes of an image; default image")
    table.add_argument("--id-column", metavar="NAME", help="default id if there is one, else the table and the row")
    asked = table.add_mutually_exclusive_group()
    asked.add_argument("--prompt-column", metavar="NAME", help="default prompt if there is one")
    asked.add_argument("--prompt", metavar="TEXT", help="of every row")
    features = parser.add_argument_group("--task features")
    add_feature_arguments(features)
    add_sampling_arguments(parser.add_argument_group("--task generate"))
    workers = parser.add_argument_group("workers")
    workers.add_argument("--workers", type=positive_number, default=1, metavar="N", help="default %(default)s")
    workers.add_argument(
        "--cpus-per-worker", type=positive_number, metavar="N", help="default: this machine's, shared out"
    )
    workers.add_argument(
        "--gpus-per-worker",
        type=float,
        metavar="N",
        help="0.5 shares one; default 1 if Ray has any and --device allows",
    )
    workers.add_argument("--address", metavar="ADDRESS", help="of a Ray cluster, auto or ray://...; default none")
    workers.add_argument(
        "--batch-tokens", type=positive_number, metavar="N", help="most tokens together; default what the engines take"
    )
    workers.add_argument(
        "--max-retries",
        type=int,
        default=3,
        metavar="N",
        help="times that a row may be alone in hand when its worker is lost; default %(default)s",
    )
    add_output_arguments(parser, "output", "rows a file of output")
    add_pipeline_arguments(parser)
    add_build_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Work on all rows as the options say.

    Ends with 0 even if some rows could not be used (a warning counts them).

    Raises:
        BatchError: the options do not fit, a table cannot be read, Ray is not there, or no row could be used.
        FeaturesError: the output is in the way, cannot be written, or is of other settings.
        MediaError: there is no input.
        MissingDependencyError: Ray is not installed.
    """
    params = _checked(arguments)
    require("batch", "ray", {"ray": "ray", "pyarrow": "pyarrow"})
    from qwen2vl_trt.batch.inputs import find_input
    from qwen2vl_trt.batch.partition_file import DATA, ERRORS
    from qwen2vl_trt.runtime.features.output_folder import SETTINGS, OutputFolder

    output = OutputFolder(arguments.output, if_exists(arguments), SETTINGS, (_WORK, DATA, ERRORS, _INPUT))
    if LONE_SURROGATE.search(str(output.path.absolute())):
        raise BatchError(
            f"{str(output.path.absolute())!r} is not valid UTF-8, which Parquet files need; rename the folder"
        )
    output.check()
    given = find_input(arguments.input, arguments.image_column, arguments.prompt_column, arguments.id_column)
    needs_prompt = arguments.task == "generate" or arguments.source == "decoder"
    if needs_prompt and arguments.prompt is None and given.columns.prompt is None:
        raise BatchError("every row needs a prompt: give --prompt TEXT, or a table with a column prompt")
    if arguments.prompt is not None or not needs_prompt:
        given = dataclasses.replace(given, columns=dataclasses.replace(given.columns, prompt=None))
    engine_dir = find_engines(arguments).resolve()
    settings = _settings(arguments, given, params, engine_dir)
    with _opened(output, settings, given, arguments.shard_size) as (partitions, work):
        _run(arguments, given, params, engine_dir, partitions, work)


def _checked(arguments: argparse.Namespace) -> SamplingParams:
    params = sampling_params(arguments)
    if arguments.task == "generate" and (arguments.layer or arguments.pool != "none" or arguments.source != "vision"):
        raise BatchError("--source, --layer and --pool are for --task features")
    if arguments.task == "features" and params != SamplingParams():
        raise BatchError("options of answers, --max-tokens for one, are for --task generate")
    if arguments.task == "features" and arguments.source == "vision" and (arguments.prompt or arguments.prompt_column):
        raise BatchError("--prompt and --prompt-column are for --task generate and --source decoder")
    gpus = arguments.gpus_per_worker
    if gpus is not None and not (math.isfinite(gpus) and gpus >= 0 and (gpus <= 1 or gpus == int(gpus))):
        raise BatchError(f"--gpus-per-worker {gpus:g}: give a share of one GPU, up to 1, or a whole number")
    if arguments.max_retries < 0:
        raise BatchError(f"--max-retries {arguments.max_retries}: give 0 or more")
    return params


def _settings(arguments: argparse.Namespace, given: Input, params: SamplingParams, engine_dir: Path) -> dict[str, Any]:
    """What the output depends on; a resumed run must have the same. JSON values only."""
    from qwen2vl_trt.batch.rows import is_uri
    from qwen2vl_trt.engines.manifest import Manifest
    from qwen2vl_trt.runtime.features.output_folder import common_settings

    manifest = Manifest.read(engine_dir)
    options, profile = pipeline_options(arguments), manifest.profile
    pixels = options.preprocessor_settings(manifest.verify(engine_dir).folder, profile)
    settings = common_settings(manifest, options, pixels) | {
        "input": given.source if is_uri(given.source) else str(Path(given.source).absolute()),
        "image_column": given.columns.image,
        "prompt_column": given.columns.prompt,
        "id_column": given.columns.id,
        "shard_size": arguments.shard_size,
        "task": arguments.task,
        "prompt": arguments.prompt,
    }
    if arguments.task == "generate":
        sampling = json.loads(json.dumps(dataclasses.asdict(params)))
        limits = {"max_input_len": profile.max_input_len, "max_seq_len": profile.max_seq_len}
        return settings | limits | sampling | {"generation_config": arguments.generation_config}
    return settings | {"source": arguments.source, "layer": arguments.layer, "pool": arguments.pool}


@contextmanager
def _opened(
    output: OutputFolder, settings: dict[str, Any], given: Input, partition_rows: int
) -> Iterator[tuple[list[Partition], Path]]:
    """The output's partitions and a fresh folder for attempts; no other run can use the output while it lasts."""
    from qwen2vl_trt.batch.inputs import divide, read_partitions
    from qwen2vl_trt.batch.partition_file import DATA, ERRORS
    from qwen2vl_trt.runtime.features.output_folder import writing
    from qwen2vl_trt.runtime.inputs.image_listing import counted

    def start() -> None:
        for name in (DATA, ERRORS, _INPUT):
            (output.path / name).mkdir()
        passed_over = divide(given, partition_rows, output.path / _INPUT)
        if passed_over:
            print(f"passed over: {counted(passed_over)}", file=sys.stderr)

    with output.open(settings, start):
        try:
            with writing(output.path):
                # Workers of a run that was killed may live on for seconds: what they write lies in the old folder.
                shutil.rmtree(output.path / _WORK, ignore_errors=True)
                work = output.path / _WORK / uuid.uuid4().hex
                work.mkdir(parents=True)
            yield read_partitions(output.path / _INPUT), work
        finally:
            shutil.rmtree(output.path / _WORK, ignore_errors=True)


def _run(
    arguments: argparse.Namespace,
    given: Input,
    params: SamplingParams,
    engine_dir: Path,
    partitions: list[Partition],
    work: Path,
) -> None:
    from qwen2vl_trt.batch.driver import Driver, Tally
    from qwen2vl_trt.batch.partition_file import ERRORS, read_done
    from qwen2vl_trt.batch.worker import WorkerSettings

    output = arguments.output.resolve()
    tally = Tally()
    waiting = []
    for partition in partitions:
        done = read_done(output, partition.number)
        if done is None:
            waiting.append(partition)
        else:
            tally.skip(done)
    workers = min(arguments.workers, max(1, len(waiting)))
    cores = os.cpu_count() or 1
    cpus = arguments.cpus_per_worker or max(1, cores // workers)
    if waiting:
        with (
            saying_what_is_saved(lambda: _saved_rows(output, partitions, work), "rows"),
            Driver(arguments.address, max(cores, cpus * workers)) as ray,
        ):
            gpus = _gpus(arguments, ray.resources, workers)
            settings = WorkerSettings(
                engine_dir=engine_dir,
                output=output,
                work=work.resolve(),
                columns=given.columns,
                task=arguments.task,
                prompt=arguments.prompt,
                params=params,
                source=arguments.source,
                layer=arguments.layer,
                pool=arguments.pool,
                device=arguments.device or (None if gpus else "cpu"),
                options=pipeline_options(arguments),
                batch_tokens=arguments.batch_tokens,
                threads=cpus,
                max_retries=arguments.max_retries,
                workers=workers,
            )
            tally.began = time.perf_counter()
            with progress("rows", lambda: sum(partition.rows for partition in partitions), tally.rows) as show:
                for result in ray.run(waiting, settings, cpus, gpus):
                    tally.add(result)
                    show(tally.rows, tally.rate)
    if tally.failed and not tally.saved + tally.skipped:
        raise BatchError(f"none of the {tally.failed:,} rows could be used; the first: {tally.first_failure}")
    there = f", {tally.skipped:,} were there" if tally.skipped else ""
    rate = f", {tally.rate:.1f} rows/s, workers: {workers}" if waiting else ""
    print(f"{arguments.output}: {tally.saved:,} rows{there}{rate}", file=sys.stderr)
    if tally.failed:
        print(f"warning: {tally.failed:,} rows could not be used: see {arguments.output / ERRORS}", file=sys.stderr)


def _saved_rows(output: Path, partitions: list[Partition], work: Path) -> int:
    """Rows in the output, more than progress has shown; no worker can add to them from now on."""
    from qwen2vl_trt.batch.partition_file import read_done

    with suppress(OSError):
        work.rename(work.with_name("ended"))  # for workers that live on, on another machine
    done = [read_done(output, partition.number) for partition in partitions]
    return sum(found.saved for found in done if found is not None)


def _gpus(arguments: argparse.Namespace, resources: dict[str, float], workers: int) -> float:
    """GPUs for each worker, which Ray has."""
    there = resources.get("GPU", 0)
    gpus = arguments.gpus_per_worker
    if gpus is None:
        gpus = 1 if there and arguments.device != "cpu" else 0
    if gpus * workers > there:
        raise BatchError(
            f"{workers} workers of {gpus:g} GPUs need {gpus * workers:g}, Ray has {there:g}: give fewer --workers"
            " or a smaller --gpus-per-worker"
        )
    return gpus
