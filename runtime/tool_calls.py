"""Calls of tools in an answer: read from its text, or made by a grammar.

The format is Hermes', which Qwen2.5 writes: ``<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>``.
Imports no PyTorch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from qwen2vl_trt.errors import SamplingError
from qwen2vl_trt.messages import LONE_SURROGATE, to_tools

from .structured_outputs import MOST_BYTES, StructuredOutputsParams, lark_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BEGIN, _END = "<tool_call>", "</tool_call>"
_MOST_ENDS = 64  # in the strings of a call; at each the call is read again
_NO_CALL = re.compile(r'\s*(?:[^\s{]|\{\s*[^\s"])')


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        name: of the function, as the model wrote it: it may be no tool's.
        arguments: a JSON object, as text, as in OpenAI's API; it may not follow the tool's schema.
    """

    name: str
    arguments: str


class ToolCallParser:
    """Takes an answer apart into text and calls, as it comes; the result does not depend on how it is split.

    A block that is no call (broken JSON, no name) stays text. Blanks before a call, and after the last one, go.
    """

    def __init__(self) -> None:
        self._buffer = ""  # what is neither text nor a call yet
        self._body: int | None = None  # where the block that is open begins in it, behind its mark
        self._searched = 0  # up to where the mark at its end has been looked for
        self._ends = 0  # marks that were part of a string
        self._blank = False  # it is blanks alone
        self._called = False  # the last that came was a call

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Add text; returns the text and the calls that are certain by now."""
        self._buffer += text
        if self._blank and (not text or text.isspace()):
            return "", []
        return self._take(last=False)

    def flush(self) -> tuple[str, list[ToolCall]]:
        """The rest, at the end of the answer; a last call may lack the mark at its end."""
        return self._take(last=True)

    def _take(self, last: bool) -> tuple[str, list[ToolCall]]:
        texts: list[str] = []
        calls: list[ToolCall] = []
        start = end = 0  # of what is left of the buffer; of the next mark at an end, -1 where there is none any more
        while True:
            if self._body is None:
                start = self._open(start, texts, last)
            if self._body is None:
                break
            begin = self._body
            broken = _NO_CALL.match(self._buffer, begin) is not None
            if not broken and end >= 0:
                end = self._buffer.find(_END, self._searched)
            if not broken and end < 0 and not last:
                self._searched = max(begin, len(self._buffer) - len(_END) + 1)
                break
            try:
                call = None if broken else _read(self._buffer[begin : end if end >= 0 else None])
            except _UnfinishedError:
                if end >= 0 and self._ends < _MOST_ENDS:
                    self._searched, self._ends = end + len(_END), self._ends + 1
                    continue
                call = None
            if call is not None:
                calls.append(call)
                start = len(self._buffer) if end < 0 else end + len(_END)
            else:
                texts.append(self._buffer[start:begin])
                start = begin
            self._called, self._body = call is not None, None
        self._buffer = self._buffer[start:]
        if self._body is not None:
            self._body, self._searched = self._body - start, self._searched - start
        return "".join(texts), calls

    def _open(self, start: int, texts: list[str], last: bool) -> int:
        """Go on to the next block, if one has begun; returns where what is left begins: it, or what may become one."""
        found = self._buffer.find(_BEGIN, start)
        rest = self._buffer[start : found if found >= 0 else None]
        text = rest.rstrip()
        if found >= 0:
            self._body = self._searched = found + len(_BEGIN)
            self._ends = 0
        elif last:
            text = rest if text or not self._called else ""
        else:
            beginnings = (_BEGIN[:size] for size in range(len(_BEGIN), 0, -1))
            text = rest.removesuffix(next(filter(rest.endswith, beginnings), "")).rstrip()
        texts.append(text)
        self._called = self._called and not text
        self._blank = found < 0 and len(text) < len(rest) and rest[-1].isspace()
        return len(self._buffer) if last and found < 0 else start + len(text)


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """An answer's text without its calls, and those; see :class:`ToolCallParser`."""
    parser = ToolCallParser()
    (before, calls), (rest, more) = parser.push(text), parser.flush()
    return before + rest, calls + more


def tool_call_grammar(
    tools: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    several: bool = True,
    schema: Mapping[str, Any] | None = None,
) -> StructuredOutputsParams:
    """What makes an answer call a tool, with arguments that follow its schema, written as ``json.dumps`` writes them.

    Args:
        tools: those that may be called, as in ``Request.tools``.
        tokenizer: the pipeline's.
        several: it may call more than once.
        schema: it may follow this JSON schema instead.

    Raises:
        PromptError: tools that are none.
        SamplingError: schemas above 64 KiB together, or one that is more than 32 levels deep or cannot be compiled.
    """
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    # llguidance knows an added token by its name, and refuses it in place of its letters.
    begin, end = (mark if mark in added else json.dumps(mark) for mark in (_BEGIN, _END))
    calls: list[str] = []
    schemas: list[tuple[str, Mapping[str, Any], str, bool]] = []
    for number, tool in enumerate(to_tools(tools)):
        function = tool["function"]
        name = json.dumps(function["name"], ensure_ascii=False)
        head = json.dumps(f'\n{{"name": {name}, "arguments": ', ensure_ascii=False)
        calls.append(f'{begin} {head} a{number} "}}\\n" {end}')
        parameters = {"type": "object", **(function.get("parameters") or {})}
        schemas.append((f"a{number}", parameters, f"the schema of the tool {name}", False))
    start = r'call ("\n" call)*' if several else "call"
    if schema is not None:
        start += " | answer"
        schemas.append(("answer", schema, "the schema of the answer", True))
    rules = [f"start: {start}", f"call: {' | '.join(calls)}"]
    for rule, given, where, blanks in schemas:
        rules.append(f"{rule}: {lark_json(given, where, blanks)}")
        if len("\n".join(rules).encode()) > MOST_BYTES:  # before more of them are compiled
            raise SamplingError(
                f"the schemas of the tools have over {MOST_BYTES:,} bytes, the most there may be. Give fewer tools"
            )
    return StructuredOutputsParams(grammar="\n".join(rules))


class _UnfinishedError(Exception):
    """A body ends within a string."""


def _read(body: str) -> ToolCall | None:
    """The call of a block, or None where it is none; raises _UnfinishedError."""
    try:
        call = json.loads(body, strict=False, parse_constant=_refuse)
        name, arguments = call["name"], call.get("arguments", {})
        if not isinstance(name, str) or not name or LONE_SURROGATE.search(name) or not isinstance(arguments, dict):
            return None
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        return ToolCall(name, json.dumps(arguments) if LONE_SURROGATE.search(text) else text)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string"):
            raise _UnfinishedError from None
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
