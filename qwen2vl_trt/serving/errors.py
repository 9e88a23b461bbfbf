"""What a client is told of an error: OpenAI's object and a status, without a path, an address or a library's text.

One library speaks: llguidance says where a client's schema, regex or grammar is wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from qwen2vl_trt.errors import (
    DeadlineError,
    LimitError,
    MediaError,
    PromptError,
    Qwen2VLError,
    SamplingError,
    UnavailableError,
)

RETRY_SECONDS = 1

_logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_LIBRARIES_SPEAK_AFTER = (
    "truncated or corrupt",
    "the chat template refuses the messages",
    "the prompt cannot be tokenized",
)
"""In messages of MediaError and PromptError; what follows is Pillow's, FFmpeg's, Jinja's or the tokenizer's."""


class APIError(Exception):
    """An error as a client sees it.

    Args:
        status: of HTTP.
        message: one line, which names the thing, the limit and the way out.
        type: OpenAI's, by default that of the status.
        param: the field that is wrong.
        code: OpenAI's, for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or _TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
        self.headers = dict(headers or {})

    def as_json(self) -> dict[str, Any]:
        """The body of the answer, and the event of a stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def overloaded(message: str) -> APIError:
    """503 with ``Retry-After``."""
    return APIError(503, message, code="overloaded", headers={"Retry-After": str(RETRY_SECONDS)})


def failed() -> APIError:
    """500, which tells a client nothing."""
    return APIError(500, "the server failed at this request; its log says why")


def from_library(error: Qwen2VLError) -> APIError:
    """What a client is told of an error of the library, whose media were given as bytes, never as paths."""
    if isinstance(error, (MediaError, PromptError, SamplingError, LimitError)):
        return APIError(400, _own_words(str(error)))
    if isinstance(error, DeadlineError):
        return APIError(504, str(error), code="deadline_exceeded")
    if isinstance(error, UnavailableError):  # its message may quote what the engine died of
        return overloaded("the server takes no more requests now; try again later")
    _logger.error("%s", error)
    return failed()


def _own_words(message: str) -> str:
    for phrase in _LIBRARIES_SPEAK_AFTER:
        before, found, _ = message.partition(phrase)
        if found:
            return before + found
    return message
