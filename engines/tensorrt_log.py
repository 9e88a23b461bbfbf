"""What TensorRT says while it parses and builds: its errors, for ours, and the layers of the engine it made."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)

_LAYERS = "Layers:\n"


@cache
def tensorrt_log(trt: Any) -> Any:
    """The one log of a TensorRT module: it keeps the first logger it is given, whatever later builders bring."""

    class Log(trt.ILogger):
        """Collects instead of printing.

        Attributes:
            errors: since the last :meth:`clear`.
            layers: of the last engine, a line each, where built with detailed verbosity.
        """

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.clear()

        def clear(self) -> None:
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= self.Severity.ERROR and "Thread context has not been set" not in message:
                self.errors.append(message)
            elif severity == self.Severity.WARNING:
                logger.debug("TensorRT: %s", message)
            elif message.startswith(_LAYERS):  # the engine inspector's text, and needs no GPU
                self.layers = message.removeprefix(_LAYERS)

    return Log()
