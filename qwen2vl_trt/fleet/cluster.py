"""Partitions handed to workers by Ray Data, on this machine or on a cluster."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import Any, cast

from qwen2vl_trt.errors import BatchError

from .rows import Partition
from .worker import Worker, WorkerSettings

_OBJECT_STORE_BYTES = 200 << 20
"""Only descriptions of partitions pass through it: rows and results go from and to files."""


@contextmanager
def connect(address: str | None, num_cpus: int) -> Iterator[dict[str, float]]:
    """Ray for a ``with`` statement: a cluster's, or one of this machine's own that ends with it.

    Args:
        address: ``auto``, ``ray://host:port``, or None for one of this machine's own.
        num_cpus: of one of this machine's own.

    Yields:
        What it has: ``CPU``, ``GPU`` and so on.

    Raises:
        BatchError: there is no cluster.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what later releases do, instead of a warning
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(address or "local", **options)
    except (ConnectionError, ValueError, TimeoutError, RuntimeError) as error:
        where = f"--address {address}: no Ray cluster there" if address else "Ray does not start on this machine"
        raise BatchError(f"{where}: {error}") from None
    try:
        with redirect_stdout(sys.stderr):  # where Ray says which worker was lost, and how
            yield ray.cluster_resources()
    finally:
        ray.shutdown()


def run_partitions(
    partitions: Sequence[Partition], settings: WorkerSettings, num_cpus: int, num_gpus: float
) -> Iterator[dict[str, Any]]:
    """What :class:`qwen2vl_trt.fleet.worker.Worker` returns for each partition, as they are done.

    Ray Data keeps the pool of workers, starts lost ones again and hands out their partitions again, without end; what
    bounds that is in :mod:`qwen2vl_trt.fleet.journal`.

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
