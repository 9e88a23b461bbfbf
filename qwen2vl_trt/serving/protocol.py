"""Bodies of requests: OpenAI's fields, and those that vLLM adds to them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from qwen2vl_trt.runtime.request import Features

from .errors import APIError

_Count = Annotated[int, Meta(ge=1, lt=1 << 31)]
_Text = Annotated[str, Meta(min_length=1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Number = Annotated[int, Meta(ge=0, lt=1 << 31)]
_Message = Annotated[dict[str, Any], Meta(extra_json_schema={"$ref": "#/components/schemas/Message"})]
_Messages = Annotated[list[_Message], Meta(min_length=1)]
"""Of OpenAI's and Qwen's forms, which :mod:`qwen2vl_trt.messages` reads."""

Prompts = str | Annotated[list[str | _Number | list[_Number]], Meta(min_length=1)]
"""A text or token ids, or a list of one of them."""

_UNUSED = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
"""OpenAI's fields that change no answer; no client is warned of them."""


_MOST_COMMAS = 1 << 18
"""Of a body, which has no more values than that beside its nesting: each takes memory, and the time of all threads."""


class StreamOptions(Struct):
    """``include_usage``: a last event with the tokens used; ``continuous_usage_stats``, vLLM's: in every event too."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JSONSchema(Struct):
    """OpenAI's ``json_schema``; answers keep to it whatever ``strict`` says."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class StructuredOutputs(Struct):
    """vLLM's ``structured_outputs``; see :class:`~qwen2vl_trt.runtime.structured_outputs.StructuredOutputsParams`."""

    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class FunctionDefinition(Struct, omit_defaults=True):
    """A function that the model may call; without ``parameters`` it takes any object."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct):
    """OpenAI's ``tools``."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Struct):
    """Which of the tools."""

    name: str


class NamedToolChoice(Struct):
    """OpenAI's ``tool_choice`` of one tool."""

    type: Literal["function"]
    function: FunctionName


class ModelRequest(Struct, kw_only=True):
    """What every body has."""

    model: str | None = None


Body = TypeVar("Body", bound=ModelRequest)


class GenerationRequest(ModelRequest, kw_only=True):
    """What bodies that ask for text have in common; None takes the checkpoint's default."""

    max_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    n: _Count | None = None
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    stop: _Text | list[_Text] | None = None
    stop_token_ids: list[_Number] | None = None
    ignore_eos: bool | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=1e-4, le=1e4)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: _Messages
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: _Number | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions; ``max_tokens`` is OpenAI's 16 where it is left out, the checkpoint's default where null."""

    prompt: Prompts
    max_tokens: _Count | None = 16
    logprobs: _Number | None = None
    echo: bool | None = None
    best_of: _Count | None = None
    suffix: str | None = None


class EmbeddingRequest(ModelRequest, kw_only=True):
    """POST /v1/embeddings: ``input`` as OpenAI has it, or ``messages`` as vLLM has them."""

    input: Prompts | None = None
    messages: _Messages | None = None
    pooling: Features = "last_hidden_state"
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: _Count | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None


class TokenizeRequest(ModelRequest, kw_only=True):
    """POST /tokenize: a text, or a conversation, whose images are counted too."""

    prompt: str | None = None
    messages: _Messages | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


def check_values(body: bytes | bytearray) -> None:
    """Raise APIError 413 for a body of too many values, which takes much more memory once it is read."""
    if body.count(b",") > _MOST_COMMAS:
        raise APIError(413, f"the body has over {_MOST_COMMAS:,} commas: too many values; give fewer at a time")


def parse(body: bytes | bytearray, kind: type[Body]) -> tuple[Body, list[str]]:
    """Read a body.

    Returns:
        It, and the names of the fields that nothing here knows.

    Raises:
        APIError: 400, no JSON, or a field of a wrong type or outside its range; 413, too many values.
    """
    check_values(body)
    try:
        parsed = msgspec.json.decode(body, type=kind)
        names = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        param = place.rstrip("`").lstrip(".") or None
        if missing := re.search(r"missing required field `(\w+)`", message):
            param = f"{param}.{missing[1]}" if param else missing[1]
        raise APIError(400, f"{param or 'the body'}: {message}", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise APIError(400, f"the body is no JSON: {error}") from None
    except RecursionError:
        raise APIError(400, "the body is nested too deeply") from None
    return parsed, sorted(names.keys() - set(kind.__struct_fields__) - _UNUSED)
