"""Calls in an answer's text, however it is split, and the grammar that makes them."""

import json
import random

import pytest
from tokenizers import AddedToken

from qwen2vl_trt import PromptError, SamplingError
from qwen2vl_trt.runtime import tool_calls
from qwen2vl_trt.runtime.tool_calls import ToolCall, ToolCallParser, parse_tool_calls, tool_call_grammar
from tests.support.chat import make_tokenizer
from tests.support.grammars import drawn


def block(text, end="</tool_call>"):
    return f"<tool_call>\n{text}\n{end}"


LOOK, END = ToolCall("look", '{"at": "é"}'), ToolCall("end", "{}")
A, B = block('{"name": "look", "arguments": {"at": "é"}}'), block('{"name": "end", "arguments": {}}')
DEEP = "[" * 100_000
ANSWERS = {
    "": ("", []),
    "Nothing to call.\n": ("Nothing to call.\n", []),
    " \n": (" \n", []),
    A: ("", [LOOK]),
    f"I look.\n\n{A}": ("I look.", [LOOK]),
    f"{A}\n{B}\n": ("", [LOOK, END]),
    f"One {A} two\n{B}{A} three ": ("One two three ", [LOOK, END, LOOK]),
    A.replace("\n", ""): ("", [LOOK]),
    block('{"name": "end", "arguments": {}}', ""): ("", [END]),
    block('{"name": "end"}'): ("", [END]),
    block('{"arguments": {"at": 1}, "name": "look"}'): ("", [ToolCall("look", '{"at": 1}')]),
    block('{"name": "say", "arguments": {"a": "</tool_call> <tool_call>{"}}'): (
        "",
        [ToolCall("say", '{"a": "</tool_call> <tool_call>{"}')],
    ),
    block('{"name": "say", "arguments": {"a": "one\ntwo"}}'): ("", [ToolCall("say", r'{"a": "one\ntwo"}')]),
    block(r'{"name": "say", "arguments": {"a": "\ud800é"}}'): ("", [ToolCall("say", r'{"a": "\ud800\u00e9"}')]),
    "a <tool_call> is a mark, </tool_call> too": ("a <tool_call> is a mark, </tool_call> too", []),
    "a < b <tool": ("a < b <tool", []),
    f"\n<tool_call>{A}": ("\n<tool_call>", [LOOK]),
    f"{A}\n<tool": ("\n<tool", [LOOK]),
    block('{"name": "look'): (block('{"name": "look'), []),
    block('{"name: 1}') + f"\n{B}": (block('{"name: 1}'), [END]),
    block('{"name": "look", "arguments": {"at": ', "") + f"\n{B}": (
        block('{"name": "look", "arguments": {"at":', "")[:-1],
        [END],
    ),
    **{
        block(broken): (block(broken), [])
        for broken in (
            "",
            "[]",
            "{}",
            '{"name": 1, "arguments": {}}',
            '{"name": "", "arguments": {}}',
            r'{"name": "\udfff", "arguments": {}}',
            '{"name": "look", "arguments": "at"}',
            '{"name": "look", "arguments": {"at": NaN}}',
            '{"name": "look", "arguments": {"at": 1e999}}',
            '{"name": "look", "arguments": {"at": 1}} and more',
        )
    },
}


@pytest.mark.parametrize(("answer", "expected"), ANSWERS.items())
def test_an_answer_however_it_is_split(answer, expected):
    assert parse_tool_calls(answer) == expected
    splits = [[answer[:here], answer[here:]] for here in range(len(answer) + 1)]
    splits += [[answer[here : here + size] for here in range(0, len(answer), size)] for size in (1, 2, 3, 7)]
    for pieces in splits:
        parser = ToolCallParser()
        found = [*map(parser.push, pieces), parser.flush()]
        assert ("".join(text for text, _ in found), [call for _, calls in found for call in calls]) == expected


@pytest.mark.parametrize("broken", [DEEP, '{"name": "look", "arguments": {"at": ' + DEEP, '{"n": ' + "9" * 5000 + "}"])
def test_json_that_python_does_not_read_is_text(broken):
    assert parse_tool_calls(block(broken)) == (block(broken), [])


def test_random_answers_in_random_pieces():
    pieces = [
        "<tool_call>",
        "</tool_call>",
        "<tool",
        "_call>",
        "</tool",
        " ",
        "\n",
        B,
        '{"name": "end", "arguments": {}}',
    ]
    pieces += ['{"name": "say", "arguments": {"a": "', '"}}', "{", '"', "}", "x", "\\"]
    generator = random.Random(0)
    for _ in range(3_000):
        answer = "".join(generator.choices(pieces, k=generator.randint(1, 14)))
        parser, found, here = ToolCallParser(), [], 0
        while here < len(answer):
            size = generator.choice([1, 1, 2, 3, 5, 9])
            found.append(parser.push(answer[here : here + size]))
            here += size
        found.append(parser.flush())
        text, calls = parse_tool_calls(answer)
        assert ("".join(text for text, _ in found), [call for _, calls in found for call in calls]) == (text, calls)
        assert calls or text == answer


def test_a_call_may_spell_the_mark_at_its_end_only_so_often():
    for count, found in ((64, 1), (65, 0)):
        answer = block(json.dumps({"name": "say", "arguments": {"a": "</tool_call>" * count}}))
        text, calls = parse_tool_calls(answer)
        assert (text, len(calls)) == ("" if found else answer, found)


def test_what_is_certain_comes_at_once():
    parser = ToolCallParser()
    assert parser.push("a <b> ") == ("a <b>", [])
    assert parser.push("c <tool_") == (" c", [])
    assert parser.push("call> ") == ("", [])
    assert parser.push("is") == (" <tool_call> is", [])
    assert parser.push(A) == ("", [LOOK])


def tool(name, **parameters):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TURN = tool(
    "turn",
    properties={"to": {"$ref": "#/$defs/side"}},
    required=["to"],
    additionalProperties=False,
    **{"$defs": {"side": {"enum": ["left", "right"]}}},
)


def tokenizer(*added):
    made = make_tokenizer().backend_tokenizer
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return made


@pytest.mark.parametrize("added", [(), ("<tool_call>", "</tool_call>"), ("<tool_call>",)])
@pytest.mark.parametrize("several", [False, True])
def test_answers_that_follow_the_grammar_are_calls(added, several):
    made, most = tokenizer(*added), 0
    for tokens in drawn(tool_call_grammar([TURN], made, several), made, 20):
        answer = made.decode(tokens)
        text, calls = parse_tool_calls(answer)
        assert text == ""
        assert {call.name for call in calls} == {"turn"}
        assert all(json.loads(call.arguments)["to"] in ("left", "right") for call in calls)
        assert all(call.arguments == json.dumps(json.loads(call.arguments)) for call in calls)
        assert answer == "\n".join(block(f'{{"name": "turn", "arguments": {call.arguments}}}') for call in calls)
        most = max(most, len(calls))
    assert (most > 1) == several


def test_every_tool_and_an_answer_of_a_schema():
    made, found = tokenizer("<tool_call>", "</tool_call>"), set()
    bounded = [TURN, tool('say "a"', additionalProperties=False)]
    for tokens in drawn(tool_call_grammar(bounded, made, False, {"enum": [7]}), made, 40):
        text, calls = parse_tool_calls(made.decode(tokens))
        assert text == "7" or not text
        found |= {text} | {call.name for call in calls}
    assert found == {"", "7", "turn", 'say "a"'}


@pytest.mark.parametrize(
    ("tools", "error", "message"),
    [
        ([tool("a", properties={"a": {"enum": ["b" * 70_000]}})], SamplingError, 'tool "a" has 70,.* most is 65,536'),
        ([tool("a", items=json.loads("[" * 40 + "]" * 40))], SamplingError, r'schema of the tool "a" is nested more'),
        (
            [tool("a", properties={"a": {"type": "nope"}})],
            SamplingError,
            r'tool "a" cannot be compiled: Invalid type: n',
        ),
        ([{"function": {}}], PromptError, "tool 1 is not of the form"),
    ],
)
def test_tools_of_which_no_grammar_is_made(tools, error, message):
    with pytest.raises(error, match=message):
        tool_call_grammar(tools, tokenizer())


def test_no_more_schemas_are_compiled_than_may_be_given(monkeypatch):
    compiled = []
    lark_json = tool_calls.lark_json
    monkeypatch.setattr(tool_calls, "lark_json", lambda *given: compiled.append(given) or lark_json(*given))
    large = [tool(f"a{number}", properties={"a": {"enum": ["b" * 30_000]}}) for number in range(40)]
    with pytest.raises(SamplingError, match="schemas of the tools have over 65,536 bytes"):
        tool_call_grammar(large, tokenizer())
    assert len(compiled) == 3
