"""Partitions handed to workers by Ray Data."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from qwen2vl_trt.errors import BatchError

from .partition_file import Done
from .ray_driver import RayDriver
from .rows import Partition
from .worker import Worker, WorkerSettings


@dataclass
class Tally:
    """How many rows a run has come to: ``saved`` by it, ``skipped`` as saved by one before, ``failed`` in either."""

    saved: int = 0
    failed: int = 0
    skipped: int = 0
    first_failure: str = ""
    began: float = 0.0

    @property
    def rows(self) -> int:
        return self.saved + self.failed + self.skipped

    @property
    def rate(self) -> float:
        """Saved rows a second."""
        return self.saved / (time.perf_counter() - self.began)

    def skip(self, done: Done) -> None:
        """Count a partition that is there already."""
        self.skipped += done.saved
        self._fail(len(done.failures), done.failures[0]["error"] if done.failures else "")

    def add(self, result: dict[str, Any]) -> None:
        """Count what a worker said of a partition."""
        self.saved += result["saved"]
        self._fail(result["failed"], result["first_failure"])

    def _fail(self, count: int, first: str) -> None:
        self.failed += count
        self.first_failure = self.first_failure or first


class Driver(RayDriver):
    """A driver of a batch job."""

    way_out = "run again with --resume to go on"

    def run(
        self, partitions: Sequence[Partition], settings: WorkerSettings, num_cpus: int, num_gpus: float
    ) -> Iterator[dict[str, Any]]:
        """See :func:`run_partitions`."""
        return self.stream(run_partitions, partitions, settings, num_cpus, num_gpus)


def run_partitions(
    partitions: Sequence[Partition], settings: WorkerSettings, num_cpus: int, num_gpus: float
) -> Iterator[dict[str, Any]]:
    """What :class:`qwen2vl_trt.batch.worker.Worker` returns for each partition, as they are done.

    Ray Data starts lost workers and their partitions again without end; :mod:`qwen2vl_trt.batch.journal` bounds that.

    Args:
        partitions: those that are not done.
        settings: of the workers.
        num_cpus: that a worker reserves.
        num_gpus: likewise; less than 1 to share one.

    Raises:
        BatchError: a worker found what ends the run, or Ray itself failed.
    """
    import ray
    from ray.exceptions import RayError

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1 << 20  # a block is one partition's description, and Ray reserves this much
    for name in ("ray.data", "ray.data._internal.execution.streaming_executor"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = (
        ray.data.from_items([asdict(partition) for partition in partitions], override_num_blocks=len(partitions))
        .map(
            cast(Any, Worker),  # Ray takes a class and makes one in each process
            fn_constructor_args=(settings,),
            # One partition at a time: none waits behind another while a worker is free.
            compute=ray.data.ActorPoolStrategy(size=settings.workers, max_tasks_in_flight_per_actor=1),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
        .iter_rows()
    )
    try:
        for row in rows:
            if row["fatal"]:
                raise BatchError(row["fatal"])
            yield row
    except RayError as error:
        cause = getattr(error, "cause", None) or error  # of a worker's; Ray's own text ends with advice on its settings
        said = (str(cause).strip() or type(cause).__name__).splitlines()[-1]
        raise BatchError(f"Ray: {said}; run again with --resume to go on") from error
