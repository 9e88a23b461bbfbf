"""The deployments of Ray Serve, and what its driver calls to start, watch and end them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, LoggingConfig

from qwen2vl_trt.errors import UnavailableError
from qwen2vl_trt.runtime.options import PipelineOptions

from .app import ServerSettings
from .encoder import Encoder
from .ingress import Front
from .replica import Replica

APPLICATION = "qwen2vl-trt"
_ROUTER = {"request_router_class": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"}
_LOGGING = LoggingConfig(enable_access_log=False, log_level="WARNING")
_MOST_REQUESTS = 100_000  # of the ingress, which has limits of its own


@dataclass(frozen=True)
class ReplicaSettings:
    """What replicas are started with.

    Attributes:
        server: of each replica's application; its limits hold for each replica.
        engine_dir: there on every machine of a cluster.
        options: of the pipelines.
        least: replicas that there always are.
        most: replicas that Ray Serve starts while there are many requests.
        max_num_seqs: requests that a replica answers at one time; as many more may wait there.
        drain_seconds: for the requests of a replica that is stopped.
        http: address, port and TLS, as Ray Serve's ``HTTPOptions`` has them.
        encoders: processes with the vision engine, which the replicas then do not load; 0 has none.
        num_cpus: that a replica reserves, and an encoder.
        num_gpus: likewise; 0 runs on the CPU.
    """

    server: ServerSettings
    engine_dir: Path
    options: PipelineOptions
    least: int
    most: int
    max_num_seqs: int
    drain_seconds: float
    http: dict[str, Any]
    encoders: int = 0
    num_cpus: float = 1
    num_gpus: float = 0

    @property
    def address(self) -> str:
        """As a message names it."""
        return f"{self.http['host']}, port {self.http['port']}"


@serve.ingress()
class Ingress:
    """A deployment of Ray Serve over :class:`~qwen2vl_trt.serving.ingress.Front`."""

    def __init__(self, settings: ServerSettings, replicas: DeploymentHandle) -> None:
        self._front = Front(settings, replicas)

    def __serve_build_asgi_app__(self) -> Front:
        return self._front

    async def drain(self, seconds: float) -> None:
        """See :meth:`~qwen2vl_trt.serving.ingress.Front.drain`."""
        await self._front.drain(seconds)


def running() -> bool:
    """Whether the cluster has a Ray Serve, whose address stays as it is.

    Raises:
        UnavailableError: it has such an application.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    found = serve.status()
    if APPLICATION in found.applications:
        raise UnavailableError(f"the cluster serves {APPLICATION} already; serve.delete({APPLICATION!r}) ends it")
    return bool(found.proxies)


def deploy(settings: ReplicaSettings) -> None:
    """Start the replicas, without waiting for them.

    Raises:
        UnavailableError: the address is taken.
    """
    scaling: dict[str, Any] = {"num_replicas": settings.least}
    if settings.most > settings.least:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.least,
                max_replicas=settings.most,
                target_ongoing_requests=settings.max_num_seqs,
            )
        }
    resources = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
    replicas: Any = serve.deployment(
        Replica,
        ray_actor_options=resources,
        # More go to another replica than that of their conversation, or wait at the ingress.
        max_ongoing_requests=2 * settings.max_num_seqs,
        max_queued_requests=settings.server.limits.pending,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=2,
        logging_config=_LOGGING,
        max_constructor_retry_count=3,
        request_router_config=_ROUTER,
        **scaling,
    )
    ingress: Any = serve.deployment(
        Ingress,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MOST_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=2,
        logging_config=_LOGGING,
    )
    device = "cuda" if settings.num_gpus else "cpu"
    encoders = None
    if settings.encoders:
        encoder: Any = serve.deployment(
            Encoder,
            num_replicas=settings.encoders,
            ray_actor_options=resources,
            max_ongoing_requests=1,  # the engine takes one call at a time
            health_check_period_s=2,
            logging_config=_LOGGING,
            max_constructor_retry_count=3,
        )
        encoders = encoder.bind(settings.engine_dir, device)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(**settings.http),
            logging_config=_LOGGING,
        )
    except RayError:  # it says which address, between its stacks
        raise UnavailableError(f"the server could not start on {settings.address}") from None
    application = ingress.bind(
        settings.server,
        replicas.bind(settings.server, settings.engine_dir, device, settings.options, encoders),
    )
    serve.run_many(
        [serve.RunTarget(application, APPLICATION)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def state() -> str:
    """The application's status, ``RUNNING`` and so on.

    Raises:
        UnavailableError: no replica can be started.
    """
    found = serve.status().applications[APPLICATION]
    if found.status == ApplicationStatus.DEPLOY_FAILED:
        said = "\n".join([found.message, *(each.message for each in found.deployments.values())]).strip().splitlines()
        ours = [line for line in said if line.startswith("qwen2vl_trt.errors.")]  # between stacks and advice
        raise UnavailableError(f"the replicas do not start: {ours[-1].partition(': ')[2] if ours else said[-1]}")
    return found.status.value


def drain(seconds: float) -> None:
    """See :meth:`Ingress.drain`."""
    serve.get_app_handle(APPLICATION).drain.remote(seconds).result()


def end(all_of_it: bool) -> None:
    """End the application, and Ray Serve with it where nothing else was there."""
    serve.shutdown() if all_of_it else serve.delete(APPLICATION)
