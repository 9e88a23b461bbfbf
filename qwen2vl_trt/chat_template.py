"""The checkpoint's chat template, with Transformers' result, in Jinja's sandbox with a deadline and a longest text."""

from __future__ import annotations

import ctypes
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import LimitError, PromptError

T = TypeVar("T")

SECONDS = 5.0
_SHOWN = 300  # characters of a template's own message
_WIDE = re.compile(r"%(\([^)]*\))?[^%a-zA-Z]*(\d{5}|\*)")  # a width or precision, or one from the arguments


class ChatTemplate:
    """A compiled template. Not bounded: the memory of a single operation, and the time of some (``|format``).

    Args:
        source: Jinja, as in ``chat_template.jinja``; kept as an attribute.
        variables: besides the messages, as Transformers gives ``eos_token`` and the like.
        characters: longest text.
        tokens: the prompt limit that ``characters`` follows from; for the message.
        seconds: for compiling, and for each text.

    Raises:
        PromptError: it is no Jinja, or takes too long.
    """

    def __init__(
        self, source: str, variables: Mapping[str, Any], characters: int, tokens: int, seconds: float = SECONDS
    ) -> None:
        self._variables, self._characters, self._tokens, self._seconds = variables, characters, tokens, seconds
        self.source = source
        self._template = self._bounded(lambda: _environment().from_string(source), "cannot be compiled")

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The text of a conversation, up to the beginning of the answer; ``tools`` are OpenAI's.

        Raises:
            PromptError: the template refuses the messages, fails, or takes too long.
            LimitError: the text is too long.
        """
        return self._bounded(lambda: self._write(messages, tools), "refuses the messages")

    def _write(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
        pieces, size = [], 0
        given = {**self._variables, "messages": messages, "tools": tools, "documents": None}
        for piece in self._template.generate(given, add_generation_prompt=True):
            pieces.append(piece)
            size += len(piece)
            self.check_length(size)
        return "".join(pieces)

    def check_length(self, characters: int) -> None:
        """Raise LimitError for a text of so many characters, if it is too long."""
        if characters > self._characters:
            raise LimitError(
                f"the prompt has over {self._characters:,} characters, more than {self._tokens:,} tokens"
                " (--max-input-len) stand for. Shorten it, or rebuild."
            )

    def _bounded(self, work: Callable[[], T], failing: str) -> T:
        try:
            return _call_with_timeout(self._seconds, work)
        except (PromptError, LimitError):
            raise
        except Exception as error:  # a template may raise whatever Python's operators and methods do
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            words = " ".join(str(error)[:_SHOWN].split())
            raise PromptError(f"the chat template {failing}: {kind}{words}") from None


class _Environment(ImmutableSandboxedEnvironment):
    """Refuses huge powers, products, repetitions and paddings: single steps that no deadline can end."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            if (bits * abs(right) if operator == "**" else bits + right.bit_length()) > 1000:
                raise OverflowError("a number of over 1,000 bits")
        if operator == "%":
            if isinstance(left, str) and _WIDE.search(left):
                raise OverflowError("a number or text padded to over 9,999 characters")
            return super().call_binop(context, operator, left, right)
        for many, times in ((left, right), (right, left)):
            if isinstance(many, (str, list, tuple)) and isinstance(times, int) and len(many) * times > 1_000_000:
                raise OverflowError("a text or list repeated to over 1,000,000 items")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """``{% generation %}``, which marks an assistant's text for training; without effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _environment() -> _Environment:
    """The environment of ``transformers.utils.chat_template_utils``."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _call_with_timeout(seconds: float, work: Callable[[], T]) -> T:
    """Call a function on its own thread, where an exception can end it at any point when its time is over."""
    results: list[T] = []
    errors: list[Exception] = []

    def call() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)
        except SystemExit:
            pass

    thread = threading.Thread(target=call, name="chat-template", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise PromptError(f"the chat template takes over {seconds:g} s")
    if errors:
        raise errors[0]
    return results[0]
