"""The life of a server with several replicas: they start, a signal drains them."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import replace

from qwen2vl_trt.batch.ray_driver import RayDriver
from qwen2vl_trt.engines.interrupts import deferred_interrupt
from qwen2vl_trt.errors import LimitError, UnavailableError, reason

from .deployment import ReplicaSettings, deploy, drain, end, running, state

_LOOK_SECONDS = 0.5

_logger = logging.getLogger(__name__)


def serve_replicas(settings: ReplicaSettings, device: str | None) -> None:
    """Serve until a signal: the first lets the answers under way end, a second ends at once.

    ``RAY_ADDRESS`` names a cluster, which is left as it was; else Ray runs on this machine and ends with the server.

    Args:
        settings: what Ray has decides about ``num_cpus`` and ``num_gpus``.
        device: of :meth:`~qwen2vl_trt.runtime.pipeline.Pipeline.from_engine_dir`.

    Raises:
        BatchError: there is no Ray.
        LimitError: it has too few GPUs.
        UnavailableError: the address is taken, or no replica can be started.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        _check_free(settings)
    cores = os.cpu_count() or 1
    processes = settings.most + settings.encoders
    cpus = max(1, cores // processes)
    shared: bool | None = None
    try:
        with RayDriver(address, max(cores, cpus * processes), settings.server.limits.body_bytes_in_flight) as ray:
            num_cpus, num_gpus = _reserved(processes, cpus, ray.resources.get("GPU", 0), device)
            settings = replace(settings, num_cpus=num_cpus, num_gpus=num_gpus)
            with deferred_interrupt() as stopping:
                shared = ray.call(running)
                ray.call(deploy, settings)
                known = ""
                while not stopping.wait(_LOOK_SECONDS):
                    status = ray.call(state)
                    if status == "RUNNING" != known:
                        _logger.info("ready on %s", "the cluster's own address" if shared else settings.address)
                    elif known not in ("", status):
                        _logger.warning("Ray Serve says that the application is %s", status)
                    known = status
                ray.call(drain, settings.drain_seconds)
    finally:
        if address is not None and shared is not None:
            # Impatience is no reason to leave it there, and may have left the other driver in the middle of a call.
            with deferred_interrupt(), RayDriver(address, 0) as ray:
                ray.call(end, not shared)


def _check_free(settings: ReplicaSettings) -> None:
    """Raise UnavailableError for an address in use: Ray Serve shares it with another of its proxies."""
    host, port = settings.http["host"], settings.http["port"]
    try:
        family, kind, protocol, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found)
    except OSError as error:
        raise UnavailableError(f"the server could not start on {settings.address}: {reason(error)}") from None


def _reserved(processes: int, cpus: int, gpus: float, device: str | None) -> tuple[float, float]:
    if device == "cpu" or (device is None and not gpus):
        return cpus, 0
    if gpus < processes:
        raise LimitError(
            f"replicas and encoders take a GPU each, {processes} in all, Ray has {gpus:g}; lower --replicas, or give"
            " --device cpu"
        )
    return 1, 1
