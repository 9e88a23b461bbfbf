"""Serve a model over HTTP, with OpenAI's API and a page to try it."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import math
import re
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2vl_trt.errors import FileError, LimitError, UnavailableError, reason, require
from qwen2vl_trt.serving.limits import Limits

from .model import find_engines
from .options import (
    add_build_arguments,
    add_pipeline_arguments,
    check_decode,
    folder_name,
    pipeline_options,
    positive_number,
)

EPILOG = "The page is at http://HOST:PORT/, the API below /v1; docs/guide/serve.md lists endpoints, fields and limits."

if TYPE_CHECKING:
    from qwen2vl_trt.runtime.options import PipelineOptions
    from qwen2vl_trt.serving.app import ServerSettings

_logger = logging.getLogger(__name__)

_IMAGE_PIXELS, _VIDEO_PIXELS, _VIDEO_SECONDS = 50_000_000, 256_000_000, 30.0
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    parser.add_argument("--host", default="127.0.0.1", help="address to bind; default %(default)s, this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default %(default)s; 0 takes a free one")
    parser.add_argument("--served-model-name", metavar="NAME", help="what clients call the model; default --model")
    parser.add_argument("--strict", action="store_true", help="refuse bodies with fields that are not known")
    parser.add_argument(
        "--drain-seconds", type=_seconds, default=30.0, metavar="S", help="for answers under way at SIGTERM; default 30"
    )
    parser.add_argument(
        "--replicas",
        type=_replicas,
        metavar="N",
        help="copies of the model, with Ray Serve; MIN:MAX as requests need; default one, without Ray",
    )
    parser.add_argument(
        "--encoder-replicas",
        type=positive_number,
        default=0,
        metavar="M",
        help="processes with the vision engine, which the --replicas then do not load; default none",
    )
    parser.add_argument("--metrics-prefix", default="qwen2vl:", metavar="P", help="default %(default)s")
    group = parser.add_argument_group("who may ask, and for what")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line; default none are asked for")
    group.add_argument(
        "--allowed-hosts", nargs="+", metavar="NAME", help="of the header Host; default those of the loopback, if bound"
    )
    group.add_argument(
        "--allowed-media-domains", nargs="+", default=[], metavar="HOST", help="to fetch from; * is all; default none"
    )
    group.add_argument("--allowed-local-media-path", metavar="DIR", help="file:// URLs below it are read; default none")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its key, PEM")
    group = parser.add_argument_group("LoRA adapters (backend torch on a CPU)")
    group.add_argument(
        "--lora-modules",
        type=_lora_module,
        nargs="+",
        metavar="NAME=DIR",
        help="served unmerged beside the model, by these names of models; --lora merges one",
    )
    group = parser.add_argument_group("limits", "see docs/guide/serve.md")
    for each in fields(Limits):
        kind = positive_number if isinstance(each.default, int) else _seconds
        group.add_argument(
            f"--{each.name.replace('_', '-')}",
            type=kind,
            default=each.default,
            metavar="N" if kind is positive_number else "S",
            help="default %(default)s",
        )
    add_pipeline_arguments(parser, videos=True)
    parser.set_defaults(
        image_pixel_limit=_IMAGE_PIXELS, video_pixel_limit=_VIDEO_PIXELS, video_decode_seconds=_VIDEO_SECONDS
    )
    add_build_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Build what is missing, then serve until a signal."""
    packages = {name: name for name in ("starlette", "uvicorn", "pybase64", "prometheus_client", "httpcore")}
    require("serve", "serve", packages)
    if arguments.replicas:
        require("serve --replicas", "ray", {"ray": "ray", "pyarrow": "pyarrow", "mmh3": "ray[serve]"})
    options = pipeline_options(arguments)
    _check(arguments)
    keys = _keys(arguments.api_key_file)
    check_decode(arguments.decode, arguments.device)
    import uvicorn

    from qwen2vl_trt.runtime.pipeline import Pipeline
    from qwen2vl_trt.serving.app import App, ServerSettings
    from qwen2vl_trt.serving.server import Server, TimedProtocol

    limits = Limits(**{each.name: getattr(arguments, each.name) for each in fields(Limits)})
    local = _is_loopback(arguments.host)
    hosts = arguments.allowed_hosts or ([*_LOOPBACK, arguments.host.lower()] if local else [])
    settings = ServerSettings(
        arguments.served_model_name or _name(arguments),
        keys,
        limits,
        arguments.allowed_media_domains,
        arguments.allowed_local_media_path,
        [host.lower() for host in hosts],
        arguments.strict,
        arguments.metrics_prefix,
        list(options.lora_modules),
    )
    _check_adapters(options, settings.model)
    app = App(settings)
    if not local and not keys:
        _logger.warning("%s may be reached from elsewhere, and no key is asked for (--api-key-file)", arguments.host)
    folder = find_engines(arguments)
    logging.getLogger("qwen2vl_trt.serving").setLevel(logging.INFO)  # it says when it is ready, and where
    if arguments.replicas:
        _serve_replicas(arguments, settings, folder.resolve(), options)
        return
    config = uvicorn.Config(
        app,
        arguments.host,
        arguments.port,
        http=partial(TimedProtocol, seconds=limits.body_seconds),  # type: ignore[arg-type]  # it makes one
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        ws="none",
        ssl_certfile=arguments.tls_cert,
        ssl_keyfile=arguments.tls_key,
        timeout_graceful_shutdown=1,
    )

    def load() -> Pipeline:
        return Pipeline.from_engine_dir(folder, arguments.device, options)

    server = Server(app, load, arguments.drain_seconds, config)
    try:
        server.run()
    except SystemExit:  # uvicorn's, after it has logged why
        raise UnavailableError(f"the server could not start on {arguments.host}, port {arguments.port}") from None


def _serve_replicas(
    arguments: argparse.Namespace, settings: ServerSettings, folder: Path, options: PipelineOptions
) -> None:
    from qwen2vl_trt.engines.manifest import Manifest
    from qwen2vl_trt.serving.deployment import ReplicaSettings
    from qwen2vl_trt.serving.replicas import serve_replicas

    http = {"host": arguments.host, "port": arguments.port}
    if arguments.tls_cert is not None:
        http |= {"ssl_certfile": str(arguments.tls_cert.resolve()), "ssl_keyfile": str(arguments.tls_key.resolve())}
    least, most = arguments.replicas
    seqs = Manifest.read(folder).profile.max_num_seqs
    drain, encoders = arguments.drain_seconds, arguments.encoder_replicas
    replicas = ReplicaSettings(settings, folder, options, least, most, seqs, drain, http, encoders)
    serve_replicas(replicas, arguments.device)


def _check(arguments: argparse.Namespace) -> None:
    """Raise FileError or LimitError for what no server can be made of."""
    if (arguments.tls_cert is None) != (arguments.tls_key is None):
        raise FileError("--tls-cert and --tls-key go together; give both or neither")
    for name in ("tls_cert", "tls_key"):
        file = getattr(arguments, name)
        if file is not None:
            try:
                file.read_bytes()
            except OSError as error:
                raise FileError(f"--{name.replace('_', '-')} {file}: {reason(error)}") from None
    if not 0 <= arguments.port <= 65535:
        raise LimitError(f"--port {arguments.port}; it is 0 to 65535")
    if arguments.encoder_replicas and not arguments.replicas:
        raise LimitError("--encoder-replicas is for decoders in processes of their own; give --replicas N too")
    if arguments.replicas and not arguments.port:
        raise LimitError("--port 0 is not for --replicas: Ray Serve does not say which port it took; name one")
    if not re.fullmatch(r"[A-Za-z_:][A-Za-z0-9_:]*", arguments.metrics_prefix):
        raise LimitError("--metrics-prefix has letters, digits, _ and :, and begins with no digit")


def _check_adapters(options: PipelineOptions, model: str) -> None:
    """See before the minutes of a build that the adapters can be read; raises CheckpointError or LimitError."""
    from qwen2vl_trt.lora import Adapter

    for name, folder in options.lora_modules.items():
        if name == model:
            raise LimitError(f"--lora-modules {name}={folder}: the model has this name (--served-model-name)")
        Adapter.read(Path(folder))


def _lora_module(text: str) -> tuple[str, Path]:
    """From ``NAME=DIR``."""
    name, separator, folder = text.partition("=")
    if not (name and separator):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, folder_name(folder).resolve()  # for replicas, which run elsewhere


def _replicas(text: str) -> tuple[int, int]:
    """From ``N`` or ``MIN:MAX``."""
    least, _, most = text.partition(":")
    if least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least):
        return int(least), int(most or least)
    raise argparse.ArgumentTypeError(f"{text!r} is not N or MIN:MAX, whole numbers of at least 1")


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")


def _keys(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"--api-key-file {file}: {reason(error)}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise FileError(f"--api-key-file {file}: it has no key; write one a line")
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise FileError(f"--api-key-file {file}: a key has other characters than printable ASCII")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _name(arguments: argparse.Namespace) -> str:
    given = arguments.model or (Path(arguments.engine_dir).resolve().name if arguments.engine_dir else "tiny")
    return Path(given).name if Path(given).is_dir() else str(given)
