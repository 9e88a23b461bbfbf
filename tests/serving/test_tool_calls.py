"""Tools with OpenAI's client on the tiny model, whose answers are made calls by grammars."""

import json
from pathlib import Path

import httpx
import pytest

from qwen2vl_trt import Pipeline, PipelineOptions, Service
from qwen2vl_trt.engines.profile import BuildProfile
from tests.support.engine_folders import build

openai = pytest.importorskip("openai", reason="openai is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
from tests.serving.test_server import PATIENCE, messages, opened  # noqa: E402

TEMPLATE = (Path(__file__).parents[2] / "examples" / "tools.jinja").read_text(encoding="utf-8")
CROP = {
    "type": "function",
    "function": {
        "name": "crop",
        "description": "Cut a part out of the image.",
        "parameters": {
            "type": "object",
            "properties": {"side": {"enum": ["left", "right"]}, "scale": {"$ref": "#/$defs/scale"}},
            "required": ["side", "scale"],
            "additionalProperties": False,
            "$defs": {"scale": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
        "strict": True,
    },
}
END = {
    "type": "function",
    "function": {"name": "end", "parameters": {"type": "object", "additionalProperties": False}},
}
BLOCK = '<tool_call>\n{"name": "crop", "arguments": {"side": "left", "scale": 2}}\n</tool_call>'
ASK = {"model": "tiny", "messages": messages(), "tools": [CROP, END], "max_tokens": 200}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """With a template that writes tools, and with the checkpoint's own."""
    profile = BuildProfile(4, 1024, max_batch_size=2, max_num_seqs=8, max_input_len=1024, max_seq_len=1280)
    folder = build("tiny", tmp_path_factory.mktemp("tools") / "engines", "torch", profile=profile)
    return [Pipeline.from_engine_dir(folder, "cpu", PipelineOptions(chat_template=text)) for text in (TEMPLATE, None)]


@pytest.fixture(scope="module")
def address(pipelines):
    with Service(pipelines[0], max_pending=16) as service, opened(service, pipelines[0]) as (_, address):
        yield address


@pytest.fixture
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


@pytest.fixture
def web(address):
    with httpx.Client(base_url=address, timeout=PATIENCE) as web:
        yield web


def check(call):
    """A call of one of the two tools with arguments that follow its schema."""
    assert call.id.startswith("call_")
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    if call.function.name == "crop":
        assert arguments["side"] in ("left", "right")
        assert 1 <= arguments["scale"] <= 9
    else:
        assert (call.function.name, arguments) == ("end", {})


def said(*texts):
    """What makes the model say one of these."""
    return {"extra_body": {"structured_outputs": {"choice": texts}}}


def joined(stream):
    """Of each answer of a stream: its content, its calls and why it ended."""
    answers = {}
    for chunk in stream:
        (choice,) = chunk.choices
        content, calls, _ = answers.setdefault(choice.index, ["", {}, None])
        answers[choice.index][0] = content + (choice.delta.content or "")
        for call in choice.delta.tool_calls or []:
            assert call.index not in calls
            calls[call.index] = (call.function.name, call.function.arguments)
        answers[choice.index][2] = choice.finish_reason
    return [(content, [*calls.values()], end) for _, (content, calls, end) in sorted(answers.items())]


def taken_apart(choice):
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    return choice.message.content or "", calls, choice.finish_reason


@pytest.mark.parametrize("several", [False, True])
def test_answers_that_must_call_do(client, pipelines, several):
    ends = [*map(pipelines[0].tokenizer.token_to_id, ["<|im_end|>", "<|endoftext|>"] * several)]
    found = set()
    for seed in range(0, 25, 5):
        response = client.chat.completions.create(
            **ASK | {"tools": [CROP]},
            tool_choice="required",
            parallel_tool_calls=several,
            logit_bias=dict.fromkeys(ends, -9),  # or the model ends after the first call
            temperature=1.5,
            seed=seed,
            n=5,
        )
        for choice in response.choices:
            calls = choice.message.tool_calls or []
            assert choice.message.content is None or choice.finish_reason == "length"
            assert len(calls) == 1 or (several and calls)
            if not several:
                assert choice.finish_reason == "tool_calls"
            for call in calls:
                check(call)
                found.add((len(calls) > 1, call.function.arguments))
    assert len(found) > 5
    assert any(more for more, _ in found) == several


@pytest.mark.parametrize("name", ["crop", "end"])
def test_a_tool_by_its_name(client, name):
    choice = {"type": "function", "function": {"name": name}}
    response = client.chat.completions.create(**ASK, tool_choice=choice, temperature=1.5)
    (call,) = response.choices[0].message.tool_calls
    check(call)
    assert (call.function.name, response.choices[0].finish_reason) == (name, "tool_calls")


@pytest.mark.parametrize(
    "given",
    [
        {"tool_choice": "required", "temperature": 1.5, "n": 3},
        {"tool_choice": "required", "max_tokens": 9},
        {"tool_choice": "auto", "logprobs": True},
        said(f"I look.\n{BLOCK}\n{BLOCK}"),
        said(f"a <tool_call>b</tool_call> {BLOCK}") | {"parallel_tool_calls": False},
        said(f"{BLOCK}\n{BLOCK}") | {"parallel_tool_calls": False},
        said("5 < 7 <tool"),
    ],
)
def test_a_stream_is_the_same(client, given):
    given = ASK | {"seed": 3} | given
    whole = client.chat.completions.create(**given)
    expected = [taken_apart(choice) for choice in whole.choices]
    assert joined(client.chat.completions.create(**given, stream=True)) == expected


def test_answers_that_may_call(client):
    def answer(*texts, **given):
        return taken_apart(client.chat.completions.create(**ASK, **said(*texts), **given).choices[0])

    call = ("crop", '{"side": "left", "scale": 2}')
    assert answer("I see 5.") == ("I see 5.", [], "stop")
    assert answer(f"I look.\n\n{BLOCK}\n{BLOCK}") == ("I look.", [call, call], "tool_calls")
    assert answer(f"{BLOCK}\n{BLOCK}", parallel_tool_calls=False) == ("", [call], "tool_calls")
    assert answer(BLOCK.replace("}}", "}")) == (BLOCK.replace("}}", "}"), [], "stop")
    assert answer(BLOCK, tool_choice="none") == (BLOCK, [], "stop")


def test_tokens_of_a_block_are_sent_as_one_call(client):
    *chunks, last = client.chat.completions.create(**ASK, **said(f"I look. {BLOCK}"), stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks] + [last.choices[0].delta]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    ((call,),) = [delta.tool_calls for delta in deltas if delta.tool_calls]
    assert (call.index, call.function.name) == (0, "crop")
    assert all(delta.content or delta.tool_calls for delta in deltas[1:-1])  # nothing is sent while the block grows


def test_calls_or_json(client):
    schema = {"type": "object", "properties": {"digit": {"enum": [2, 9]}}, "required": ["digit"]}
    form = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema | {"additionalProperties": False}},
    }
    kinds = set()
    for seed in range(40):
        response = client.chat.completions.create(**ASK, response_format=form, temperature=2, seed=seed)
        content, calls, end = taken_apart(response.choices[0])
        kinds.add(end)
        if end == "stop":
            assert not calls
            assert json.loads(content)["digit"] in (2, 9)
        else:
            assert not content or end == "length"
        if {"stop", "tool_calls"} <= kinds:
            break
    assert {"stop", "tool_calls"} <= kinds


def test_results_in_a_second_turn(client, web):
    first = client.chat.completions.create(**ASK, tool_choice="required", parallel_tool_calls=False).choices[0].message
    (call,) = first.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": messages("This is it.")[0]["content"]}
    turns = [*messages(), first.model_dump(exclude_none=True), result]
    given = ASK | {"messages": [{"role": "developer", "content": "Be brief."}, *turns]}
    response = client.chat.completions.create(**given)
    assert response.choices[0].finish_reason == "stop"
    assert response.usage.prompt_tokens_details.image_tokens == 40
    found = web.post("/tokenize", json={"messages": given["messages"], "tools": given["tools"]}).json()
    assert found["count"] == response.usage.prompt_tokens
    without = web.post("/tokenize", json={"messages": given["messages"]}).json()["count"]
    assert without < found["count"]
    none = client.chat.completions.create(**given, tool_choice="none")
    assert none.usage.prompt_tokens == without


WRONG = {"type": "function", "function": {"name": "crop", "parameters": {"type": "nope"}}}
HALF, LARGE = (
    {"type": "function", "function": {"name": "a", "parameters": {"properties": {"a": {"enum": ["b" * size]}}}}}
    for size in (40_000, 70_000)
)
MUST = {"tool_choice": "required"}
DEEP = {"type": "function", "function": {"name": "a", "parameters": {"items": json.loads("[" * 40 + "]" * 40)}}}
UNKNOWN = {"type": "function", "function": {"name": "a", "parameters": {"properties": {"a": {"type": "nope"}}}}}
FORM = {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"tools": "crop"}, "tools", "array"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "function"),
        ({"tools": [CROP | {"type": "code"}]}, "tools[0].type", "code"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, None, "tool 1"),
        ({"tools": [CROP, CROP]}, None, "tool 2 has the name of another"),
        ({"tools": [WRONG]}, None, "the parameters"),
        ({"tools": [CROP] * 129}, "tools", "up to 128"),
        ({"tools": [END, LARGE]}, "tools", "number 2 has 70,"),
        (
            {"tools": [HALF, HALF | {"function": HALF["function"] | {"name": "b"}}], **MUST},
            "tools",
            "over 65,536 bytes",
        ),
        ({"tools": [DEEP], "tool_choice": "required"}, "tools", "32 levels"),
        (
            {"tools": [END, UNKNOWN], "tool_choice": "required"},
            "tools",
            'schema of the tool "a" cannot be compiled: Inv',
        ),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": None, "tool_choice": "auto"}, "tool_choice", "needs tools"),
        ({"tool_choice": "sometimes"}, "tool_choice", "sometimes"),
        ({"tool_choice": {"type": "function", "function": {"name": "cut"}}}, "tool_choice", "no tool is called 'cut'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "function"),
        ({"tool_choice": "required", **FORM}, "response_format", "contradict"),
        ({"tool_choice": "required", "structured_outputs": {"regex": "a"}}, "structured_outputs", "contradict"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "bool"),
    ],
)
def test_what_is_refused(web, given, param, words, stream):
    response = web.post("/v1/chat/completions", json=ASK | {"stream": stream} | given)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]


@pytest.mark.parametrize("levels", [900, 985, 995, 5_000])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_parameters_that_are_nested(web, levels, choice):
    deep = '{"a":' * levels + "1" + "}" * levels
    tools = f'[{{"type":"function","function":{{"name":"a","parameters":{deep}}}}}]'
    body = f'{{"messages":[{{"role":"user","content":"a"}}],"tool_choice":"{choice}","tools":{tools}}}'
    response = web.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400


def test_a_template_that_writes_no_tools(pipelines):
    with Service(pipelines[1]) as service, opened(service, pipelines[1]) as (_, address):
        response = httpx.post(f"{address}/v1/chat/completions", json=ASK, timeout=PATIENCE)
        assert response.status_code == 400
        assert "does not write tools; give one that does (--chat-template)" in response.json()["error"]["message"]
        given = ASK | {"tool_choice": "none", "max_tokens": 2}
        assert httpx.post(f"{address}/v1/chat/completions", json=given, timeout=PATIENCE).status_code == 200


def test_no_template_comes_from_a_client(web):
    given = ASK | {"chat_template": "{{ messages }}", "max_tokens": 2}
    response = web.post("/v1/chat/completions", json=given)
    assert response.headers["X-Ignored-Fields"] == "chat_template"
    usual = web.post("/v1/chat/completions", json=ASK | {"max_tokens": 2}).json()
    assert response.json()["usage"]["prompt_tokens"] == usual["usage"]["prompt_tokens"]


def test_the_document_has_tools(web):
    schemas = web.get("/openapi.json").json()["components"]["schemas"]
    assert {"tools", "tool_choice", "parallel_tool_calls"} <= set(schemas["ChatCompletionRequest"]["properties"])
    assert set(schemas["FunctionDefinition"]["properties"]) == {"name", "description", "parameters", "strict"}
