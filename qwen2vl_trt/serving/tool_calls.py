"""OpenAI's tools: what the model is told of them, what makes it call, and its calls in an answer."""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import msgspec
from tokenizers import Tokenizer

from qwen2vl_trt.errors import PromptError, SamplingError
from qwen2vl_trt.runtime.request import Output, TokenLogprobs
from qwen2vl_trt.runtime.sampling_params import SamplingParams
from qwen2vl_trt.runtime.structured_outputs import MOST_BYTES
from qwen2vl_trt.runtime.tool_calls import ToolCall, ToolCallParser, tool_call_grammar

from .errors import APIError
from .limits import Limits
from .protocol import ChatCompletionRequest, FunctionDefinition, NamedToolChoice, TokenizeRequest
from .responses import ChatCompletion, end_of


def usable_tools(body: ChatCompletionRequest | TokenizeRequest, limits: Limits) -> list[dict[str, Any]]:
    """The tools that the model is told of, as ``Request.tools``: none with ``tool_choice`` none.

    Raises:
        APIError: 400, too many, one that is too large, or a choice among none.
    """
    tools = body.tools or []
    choice = body.tool_choice if isinstance(body, ChatCompletionRequest) else None
    if len(tools) > limits.tools:
        raise APIError(400, f"tools: {len(tools):,}; this server takes up to {limits.tools:,}", param="tools")
    if choice == "none":
        return []
    if choice is not None and not tools:
        raise APIError(400, "tool_choice: it needs tools", param="tool_choice")
    for number, tool in enumerate(tools, start=1):
        size = len(msgspec.json.encode(tool))
        if size > MOST_BYTES:
            raise APIError(400, f"tools: number {number} has {size:,} bytes; most is {MOST_BYTES:,}", param="tools")
    return [{"type": "function", "function": _without_strict(tool.function)} for tool in tools]


def _without_strict(function: FunctionDefinition) -> dict[str, Any]:
    """In the order of keys that Qwen2.5 was trained on; ``strict`` tells a model nothing."""
    named = msgspec.to_builtins(function)
    named.pop("strict", None)
    return named


def with_calls(
    body: ChatCompletionRequest, params: list[SamplingParams], tools: list[dict[str, Any]], tokenizer: Tokenizer
) -> list[SamplingParams]:
    """The settings of a body's answers, which call one of its usable tools where its ``tool_choice`` says so.

    Where the model is free to call and the ``response_format`` is JSON, an answer is calls or such JSON, as at OpenAI;
    ``structured_outputs`` hold for the whole answer, as in vLLM.

    Raises:
        APIError: 400, an unknown name, schemas that are too large, or calls that are forced and another form too.
    """
    choice, form = body.tool_choice, body.response_format
    schema = None
    if isinstance(choice, NamedToolChoice):
        tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
        if not tools:
            raise APIError(400, f"tool_choice: no tool is called {choice.function.name!r:.100}", param="tool_choice")
    if not tools or (choice in (None, "auto") and (form is None or form.type == "text")):
        return params
    if choice in (None, "auto"):
        schema = form.json_schema.schema if form and form.json_schema else {"type": "object"}
    elif params[0].structured_outputs is not None:
        field = "structured_outputs" if form is None or form.type == "text" else "response_format"
        raise APIError(400, f"{field} and tool_choice contradict each other; give one of them", param=field)
    several = not isinstance(choice, NamedToolChoice) and body.parallel_tool_calls is not False
    try:
        grammar = tool_call_grammar(tools, tokenizer, several, schema)
    except (PromptError, SamplingError) as error:
        raise APIError(400, str(error), param="tools") from None
    return [replace(each, structured_outputs=grammar) for each in params]


class ToolCompletion(ChatCompletion):
    """The objects of a request with tools: calls in the answers' texts are ``tool_calls``.

    Args:
        model: its served name.
        tokenizer: of the checkpoint, for log-probabilities.
        several: of an answer's calls more than the first count.
    """

    def __init__(self, model: str, tokenizer: Tokenizer, several: bool) -> None:
        super().__init__(model, tokenizer)
        self._most = None if several else 1
        self._parsers: defaultdict[int, ToolCallParser] = defaultdict(ToolCallParser)
        self._counts: Counter[int] = Counter()

    def chunk(self, index: int, text: str, logprobs: TokenLogprobs | None, first: bool) -> dict[str, Any] | None:
        content, calls = self._parsers[index].push(text)
        delta = self._delta(index, content, calls, first)
        if not delta and logprobs is None:
            return None
        found = self._logprobs(None if logprobs is None else [logprobs])
        return self._chunk([{"index": index, "delta": delta, "logprobs": found}])

    def end(self, index: int, output: Output, first: bool, text: str) -> dict[str, Any]:
        delta = self._delta(index, *self._rest(index, text), first)
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, **self._end(index, output)}])

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        content, calls = self._rest(index, output.text)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if found := self._calls(index, calls):
            message |= {"content": content or None, "tool_calls": found}
        logprobs = self._logprobs(output.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, **self._end(index, output)}

    def _rest(self, index: int, text: str) -> tuple[str, list[ToolCall]]:
        parser = self._parsers[index]
        (content, calls), (rest, more) = parser.push(text), parser.flush()
        return content + rest, calls + more

    def _delta(self, index: int, content: str, calls: list[ToolCall], first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant", "content": content} if first else {}
        if content:
            delta["content"] = content
        before = self._counts[index]
        if found := self._calls(index, calls):
            delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(found, start=before)]
        return delta

    def _calls(self, index: int, calls: list[ToolCall]) -> list[dict[str, Any]]:
        if self._most is not None:
            calls = calls[: self._most - self._counts[index]]
        self._counts[index] += len(calls)
        return [
            {
                "id": f"call_{uuid.uuid4().hex}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]

    def _end(self, index: int, output: Output) -> dict[str, str]:
        end = end_of(output)
        called = self._counts[index] and end["finish_reason"] == "stop"
        return end | {"finish_reason": "tool_calls"} if called else end
