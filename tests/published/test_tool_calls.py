"""Calls of tools with the published tokenizer, which has ``<tool_call>`` as a token, and the published template."""

import json
from pathlib import Path

import pytest

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.errors import PromptError
from qwen2vl_trt.prompts import PromptBuilder
from qwen2vl_trt.runtime.detokenizer import Detokenizer
from qwen2vl_trt.runtime.tool_calls import ToolCall, ToolCallParser, tool_call_grammar
from tests.published.conversations import CONVERSATIONS, counts
from tests.support.grammars import SPELLED, check_spelled, drawn
from tests.support.published import config_json

TEMPLATE = (Path(__file__).parents[2] / "examples" / "tools.jinja").read_text(encoding="utf-8")
SIDE = {"type": "object", "properties": {"side": {"enum": ["left", "right"]}, "by": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "turn", "parameters": SIDE | {"required": ["side", "by"]}}}
BLOCK = '<tool_call>\n{"name": "turn", "arguments": {"side": "links ü", "by": 3}}\n</tool_call>'


@pytest.fixture(scope="module")
def published(processor_folder):
    return PromptBuilder(processor_folder, Qwen2VLConfig.from_dict(config_json("3B")))


@pytest.fixture(scope="module")
def example(processor_folder):
    return PromptBuilder(processor_folder, Qwen2VLConfig.from_dict(config_json("3B")), chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def made(published):
    return published.tokenizer.backend_tokenizer


def test_marks_stay_in_the_text_and_are_found_token_by_token(made):
    tokens = made.encode(f"I turn.\n{BLOCK}").ids
    assert {made.token_to_id("<tool_call>"), made.token_to_id("</tool_call>")} <= set(tokens)
    detokenizer, parser = Detokenizer(made), ToolCallParser()
    found = [parser.push(detokenizer.push(token)) for token in tokens] + [parser.flush()]
    assert "".join(text for text, _ in found) == "I turn."
    assert [call for _, calls in found for call in calls] == [ToolCall("turn", '{"side": "links ü", "by": 3}')]


def test_answers_that_follow_the_grammar_have_the_tokens(made):
    bounded = json.loads(json.dumps(TOOL))
    bounded["function"]["parameters"] |= {"additionalProperties": False}
    bounded["function"]["parameters"]["properties"]["by"] = {"enum": [1, 20, 300]}
    for tokens in drawn(tool_call_grammar([bounded], made), made, 10):
        parser = ToolCallParser()
        (text, calls), rest = parser.push(made.decode(tokens)), parser.flush()
        assert (text, rest) == ("", ("", []))
        assert calls
        for mark in ("<tool_call>", "</tool_call>"):
            assert tokens.count(made.token_to_id(mark)) == len(calls)
        assert all(json.loads(call.arguments)["side"] in ("left", "right") for call in calls)


@pytest.mark.parametrize(("given", "answers"), SPELLED)
def test_structured_outputs_that_spell_an_added_token(made, given, answers):
    check_spelled(given, answers, made)


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=lambda messages: repr(messages)[:60])
def test_without_tools_the_example_is_the_published_template(published, example, messages):
    if any(message["role"] == "tool" for message in messages):
        pytest.skip("it writes results in another way")
    images, videos = counts(messages)
    grids = [(1, 4, 4)] * images, [(2, 4, 2)] * videos
    assert example.build(messages, *grids) == published.build(messages, *grids)


def test_tools(published, example):
    with pytest.raises(PromptError, match="does not write tools"):
        published.build("Turn.", tools=[TOOL])
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in example.build("Turn.", tools=[TOOL]).text
