"""The server with real clients over real sockets: answers, streams, refusals, hang-ups, its end."""

import asyncio
import base64
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from qwen2vl_trt import Output, Pipeline, Request, SamplingParams, Service, StructuredOutputsParams
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import EngineError, PromptError
from qwen2vl_trt.runtime.backends.runners import Engines
from qwen2vl_trt.runtime.inputs.clips import VideoLimits
from tests.support.engine_folders import build
from tests.support.requests import picture

openai = pytest.importorskip("openai", reason="openai is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
from qwen2vl_trt.commands import serve  # noqa: E402
from qwen2vl_trt.commands.options import Parser, pipeline_options  # noqa: E402
from qwen2vl_trt.serving.app import App, ServerSettings  # noqa: E402
from qwen2vl_trt.serving.endpoint import Bodies, Endpoint, as_json  # noqa: E402
from qwen2vl_trt.serving.limits import Limits  # noqa: E402
from qwen2vl_trt.serving.media import MediaSource  # noqa: E402
from qwen2vl_trt.serving.responses import Completion  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DIGITS = (ROOT / "docs" / "digits.png").read_bytes()
QUESTION = "What digits are in the image?"
PATIENCE = 60


def url(data=DIGITS):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def messages(text=QUESTION, images=(DIGITS,), **options):
    parts = [{"type": "image_url", "image_url": {"url": url(image)}, **options} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    profile = BuildProfile(4, 1024, max_batch_size=2, max_num_seqs=4, max_input_len=512, max_seq_len=640)
    return build("tiny", tmp_path_factory.mktemp("served") / "engines", "torch", profile=profile)


@pytest.fixture(scope="module")
def pipeline(engine_dir):
    return Pipeline.from_engine_dir(engine_dir, "cpu")


@pytest.fixture(scope="module")
def quiet(engine_dir):
    """A pipeline without a service, whose tokens hidden_states would take."""
    return Pipeline.from_engine_dir(engine_dir, "cpu")


@pytest.fixture(scope="module")
def service(pipeline):
    with Service(pipeline, max_pending=16) as service:
        yield service


@contextmanager
def serving(app):
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = server.force_exit = True
    thread.join(PATIENCE)


@contextmanager
def opened(service, pipeline, **settings):
    app = App(ServerSettings(**{"model": "tiny"} | settings))
    app.open(service, pipeline)
    with serving(app) as address:
        yield app, address


@pytest.fixture(scope="module")
def server(service, pipeline):
    with opened(service, pipeline) as (app, address):
        yield app, address


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


@pytest.fixture
def web(server):
    with httpx.Client(base_url=server[1], timeout=PATIENCE) as web:
        yield web


def idle(service):
    end = time.monotonic() + PATIENCE
    while service.counters().running or service.counters().queued:
        assert time.monotonic() < end
        time.sleep(0.01)


class TestAnswers:
    def test_whole_with_usage_and_sizes(self, client, pipeline):
        response = client.chat.completions.create(model="tiny", messages=messages())
        expected = pipeline.generate(Request(QUESTION, [DIGITS]))[0]
        (choice,) = response.choices
        assert (choice.message.content, choice.finish_reason) == (expected.text, "stop") == ("92059", "stop")
        usage = response.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, len(expected.token_ids))
        assert response.model_extra["images"] == [expected.images[0].as_json()]
        assert response.model_extra["timings"]["total"] > 0

    def test_a_stream_is_the_same(self, client):
        given = {"model": "tiny", "messages": messages(), "seed": 5, "temperature": 1.0, "max_tokens": 12}
        whole = client.chat.completions.create(**given)
        *chunks, last = client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert (last.choices, last.usage.completion_tokens) == ([], whole.usage.completion_tokens)
        assert last.model_extra["images"] == whole.model_extra["images"]

    @pytest.mark.parametrize("stream", [False, True])
    def test_several_answers_are_those_of_following_seeds(self, client, pipeline, stream):
        given = {"model": "tiny", "messages": messages(), "seed": 7, "temperature": 1.5, "max_tokens": 8, "n": 3}
        params = [SamplingParams(max_tokens=8, temperature=1.5, seed=7 + number) for number in range(3)]
        expected = [each.text for each in pipeline.generate([Request(QUESTION, [DIGITS])] * 3, params)]
        if stream:
            texts = ["", "", ""]
            for chunk in client.chat.completions.create(**given, stream=True):
                texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        else:
            texts = [each.message.content for each in client.chat.completions.create(**given).choices]
        assert texts == expected

    @pytest.mark.parametrize("stream", [False, True])
    def test_log_probabilities(self, client, pipeline, stream):
        given = {"model": "tiny", "messages": messages(), "logprobs": True, "top_logprobs": 3}
        pipeline.clear_caches()
        expected = pipeline.generate(Request(QUESTION, [DIGITS]), SamplingParams(logprobs=3))[0]
        pipeline.clear_caches()  # the prompt is read in the same pieces, so that sums are rounded in the same way
        if stream:
            found = [
                each
                for chunk in client.chat.completions.create(**given, stream=True)
                if chunk.choices[0].logprobs
                for each in chunk.choices[0].logprobs.content
            ]
        else:
            found = client.chat.completions.create(**given).choices[0].logprobs.content
        assert [each.logprob for each in found] == [each.logprob for each in expected.logprobs]
        assert [[top.logprob for top in each.top_logprobs] for each in found] == [
            [logprob for _, logprob in each.top] for each in expected.logprobs
        ]
        assert bytes(byte for each in found[:5] for byte in each.bytes) == b"92059"

    def test_schemas(self, client):
        properties = {"digit": {"enum": ["two", "nine"]}}
        schema = {"type": "object", "properties": properties, "required": ["digit"], "additionalProperties": False}
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        for seed in range(10):
            response = client.chat.completions.create(
                model="tiny", messages=messages(), response_format=form, temperature=1.5, seed=seed, max_tokens=200
            )
            (choice,) = response.choices
            assert choice.finish_reason == "stop"
            assert json.loads(choice.message.content)["digit"] in ("two", "nine")
        response = client.chat.completions.create(
            model="tiny", messages=messages(), extra_body={"structured_outputs": {"choice": ["a cat", "a dog"]}}
        )
        assert response.choices[0].message.content in ("a cat", "a dog")

    def test_sizes_of_images(self, client):
        whole = client.chat.completions.create(model="tiny", messages=messages())
        parts = client.chat.completions.create(model="tiny", messages=messages(max_pixels=28 * 28 * 6))
        kwargs = client.chat.completions.create(
            model="tiny", messages=messages(), extra_body={"mm_processor_kwargs": {"max_pixels": 28 * 28 * 6}}
        )
        tokens = [each.model_extra["images"][0]["tokens"] for each in (whole, parts, kwargs)]
        assert tokens[0] > 6 >= tokens[1] == tokens[2]

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
    @pytest.mark.parametrize("continuous", [False, True])
    def test_usage_of_every_chunk(self, web, path, continuous):
        options = {"include_usage": True, "continuous_usage_stats": continuous}
        body = {"messages": messages("Hi", ()), "prompt": "Hi", "max_tokens": 9, "n": 2, "ignore_eos": True}
        lines = web.post(path, json=body | {"stream": True, "stream_options": options}).text.split("\n\n")[:-2]
        *chunks, last = (json.loads(line.removeprefix("data: ")) for line in lines)
        assert last["usage"]["completion_tokens"] == 18
        found = [[], []]
        for chunk in chunks:
            found[chunk["choices"][0]["index"]].append(chunk["usage"])
        for usages in found:
            if not continuous:
                assert set(map(str, usages)) == {"None"}
                continue
            assert usages == sorted(usages, key=lambda usage: usage["completion_tokens"])
            prompt = last["usage"]["prompt_tokens"]
            assert usages[-1] == {"prompt_tokens": prompt, "completion_tokens": 9, "total_tokens": prompt + 9}

    def test_tokenize_a_text(self, web, pipeline):
        text = "What digits? <|im_end|> <|image_pad|>"
        found = web.post("/tokenize", json={"prompt": text}).json()
        assert (found["tokens"], found["image_tokens"]) == (pipeline.encode(text), 0)
        for body in ({}, {"prompt": "a", "messages": messages()}):
            assert web.post("/tokenize", json=body).json()["error"]["param"] == "prompt"

    def test_tokenize_counts_images(self, client, web):
        used = client.chat.completions.create(model="tiny", messages=messages()).usage
        found = web.post("/tokenize", json={"messages": messages()}).json()
        assert found["count"] == len(found["tokens"]) == used.prompt_tokens
        assert found["image_tokens"] == 20


class TestCompletions:
    """/v1/completions: texts and token ids that the model goes on with."""

    def test_a_text_goes_on_as_its_token_ids_do(self, client, pipeline):
        ids = pipeline.encode("What digits are")
        expected = pipeline.generate(Request(ids), SamplingParams(max_tokens=16))[0]
        for prompt in ("What digits are", ids):
            response = client.completions.create(model="tiny", prompt=prompt)
            (choice,) = response.choices
            assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
            usage = response.usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(expected.token_ids))
        assert response.object == "text_completion"

    def test_the_chat_template_as_token_ids_is_the_chat(self, client, web):
        chat = messages("Read both:", ())
        ids = web.post("/tokenize", json={"messages": chat}).json()["tokens"]
        answer = client.chat.completions.create(model="tiny", messages=chat, max_tokens=9).choices[0].message.content
        assert client.completions.create(model="tiny", prompt=ids, max_tokens=9).choices[0].text == answer

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("echo", [False, True])
    def test_prompts_times_n(self, client, pipeline, stream, echo):
        prompts = ["What digits", "Read both: \u5317", "How many <image> <|im_end|>"]
        given = {"model": "tiny", "max_tokens": 7, "temperature": 1.5, "seed": 3, "n": 2, "echo": echo}
        params = [SamplingParams(max_tokens=7, temperature=1.5, seed=3 + number) for number in range(2)]
        requests = [Request(pipeline.encode(prompt)) for prompt in prompts]
        expected = [
            (prompt if echo else "") + pipeline.generate(request, each)[0].text
            for prompt, request in zip(prompts, requests)
            for each in params
        ]
        used = sum(len(request.prompt) for request in requests)
        for prompt in (prompts, [request.prompt for request in requests]):
            if stream:
                texts = [""] * 6
                options = {"stream": True, "stream_options": {"include_usage": True}}
                *chunks, last = client.completions.create(prompt=prompt, best_of=2, **given, **options)
                for chunk in chunks:
                    texts[chunk.choices[0].index] += chunk.choices[0].text
                assert last.choices == []
                usage = last.usage
            else:
                response = client.completions.create(prompt=prompt, **given)
                texts, usage = [choice.text for choice in response.choices], response.usage
            assert texts == expected
            assert usage.prompt_tokens == used

    @pytest.mark.parametrize("stream", [False, True])
    def test_log_probabilities(self, client, pipeline, stream):
        form = {"choice": ["\U0001f600 two \u5317\u4eac"]}  # characters of several tokens
        given = {"model": "tiny", "prompt": "Read", "logprobs": 2, "extra_body": {"structured_outputs": form}}
        params = SamplingParams(max_tokens=16, logprobs=2, structured_outputs=StructuredOutputsParams(**form))
        pipeline.clear_caches()
        expected = pipeline.generate(Request(pipeline.encode("Read")), params)[0]
        assert expected.text == form["choice"][0]
        pipeline.clear_caches()
        if stream:
            parts = [
                chunk.choices[0].logprobs
                for chunk in client.completions.create(**given, stream=True)
                if chunk.choices[0].logprobs
            ]
        else:
            parts = [client.completions.create(**given).choices[0].logprobs]
        tokens, logprobs, top, offsets = (
            [each for part in parts for each in getattr(part, name)]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        )
        assert logprobs == [each.logprob for each in expected.logprobs]
        for token, logprob, each, told in zip(tokens, logprobs, expected.logprobs, top, strict=True):
            assert told[token] == logprob
            assert set(told.values()) == {logprob, *(number for _, number in each.top)}
            assert len(told) == len({each.token_id, *(number for number, _ in each.top)})
        assert any(token.startswith("bytes:\\x") for token in tokens)  # a part of a character
        data = b""
        for token, offset in zip(tokens, offsets):
            assert offset == len(data.decode(errors="ignore"))
            data += bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()
        assert data.decode() == expected.text + "<|im_end|>"

    def test_structured_answers_and_stops(self, client):
        extra = {"structured_outputs": {"choice": ["a cat", "a dog"]}}
        response = client.completions.create(model="tiny", prompt="It is", extra_body=extra)
        assert response.choices[0].text in ("a cat", "a dog")
        response = client.completions.create(model="tiny", prompt="It is", extra_body=extra, stop=" ")
        assert response.choices[0].text == "a"

    @pytest.mark.parametrize(
        ("given", "param"),
        [
            ({"prompt": []}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": ["a", ""]}, "prompt"),
            ({"prompt": [[]]}, "prompt"),
            ({"prompt": ["a", 5]}, "prompt"),
            ({"prompt": ["a", [5]]}, "prompt"),
            ({"prompt": {"a": 1}}, "prompt"),
            ({"prompt": [-1]}, "prompt[0]"),
            ({"prompt": [10**6]}, None),
            ({"prompt": ["a"] * 300}, "prompt"),
            ({"prompt": ["a"] * 100, "n": 3}, "prompt"),
            ({"prompt": "a" * 10**7}, None),
            ({"prompt": [5] * 10**5}, None),
            ({"suffix": "b"}, "suffix"),
            ({"best_of": 2}, "best_of"),
            ({"echo": True, "logprobs": 1}, "logprobs"),
            ({"logprobs": 21}, "logprobs"),
            ({"logprobs": True}, "logprobs"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": 10**6}, None),
            ({"n": 10**9}, "n"),
            ({"structured_outputs": {"regex": "("}}, None),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_refusals(self, web, given, param, stream):
        response = web.post("/v1/completions", json={"prompt": "a", "stream": stream} | given)
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)

    def test_token_ids_of_images_are_refused(self, web, pipeline):
        for token in (pipeline.engines.checkpoint.config.image_token_id, 10**6):
            for stream in (False, True):
                response = web.post("/v1/completions", json={"prompt": [5, token], "stream": stream})
                assert response.status_code == 400
        body = {"prompt": "<|image_pad|>", "max_tokens": None}
        assert web.post("/v1/completions", json=body).status_code == 200

    def test_what_is_wrong_with_one_prompt_ends_the_others(self, web, service):
        before = service.counters().cancelled
        body = {"prompt": [[5], [6], [10**6]], "ignore_eos": True, "max_tokens": 550}
        assert web.post("/v1/completions", json=body).status_code == 400
        idle(service)
        assert service.counters().cancelled == before + 2

    def test_a_hang_up_ends_every_answer(self, web, service):
        before = service.counters().cancelled
        body = {"prompt": ["a", "b"], "ignore_eos": True, "max_tokens": 550, "n": 2, "stream": True}
        with web.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        idle(service)
        assert service.counters().cancelled == before + 4


class TestEmbeddings:
    """/v1/embeddings beside answers, which stay as they are."""

    def near(self, found, expected):
        vector = normalize(expected, dim=0)
        assert torch.tensor(found).shape == vector.shape
        assert (torch.tensor(found) - vector).norm() < 1e-4

    @pytest.mark.parametrize("form", ["float", "base64"])
    def test_texts_and_token_ids(self, client, quiet, form):
        texts = ["What digits are in the image?", "Read both: <|im_end|>", "a"]
        ids = [quiet.encode(text) for text in texts]
        states = [each[-1] for each in quiet.hidden_states([Request(each) for each in ids])]
        for given, expected in ((texts, states), (ids, states), (texts[0], states[:1]), (ids[1], states[1:2])):
            response = client.embeddings.create(model="tiny", input=given, encoding_format=form)
            assert [each.index for each in response.data] == list(range(len(expected)))
            for each, state in zip(response.data, expected, strict=True):
                if form == "base64":
                    each.embedding = list(struct.unpack(f"<{len(state)}f", base64.b64decode(each.embedding)))
                self.near(each.embedding, state)
        assert response.usage.prompt_tokens == response.usage.total_tokens == len(ids[1])

    def test_the_client_decodes_base64(self, client, quiet):
        state = quiet.hidden_states(Request(quiet.encode("a")))[0][-1]
        response = client.embeddings.create(model="tiny", input="a", dimensions=len(state))
        self.near(response.data[0].embedding, state)

    def test_messages_with_images(self, web, quiet):
        state = quiet.hidden_states(Request(QUESTION, [DIGITS]))[0][-1]
        found = web.post("/v1/embeddings", json={"messages": messages()}).json()
        self.near(found["data"][0]["embedding"], state)
        assert found["images"][0]["tokens"] == 20
        small = web.post("/v1/embeddings", json={"messages": messages(max_pixels=28 * 28 * 6)}).json()
        assert small["images"][0]["tokens"] <= 6
        assert small["usage"]["prompt_tokens"] < found["usage"]["prompt_tokens"]

    def test_features_of_images(self, web, quiet):
        wide = picture(1, 56, 112)
        file = io.BytesIO()
        Image.fromarray(wide).save(file, "PNG")
        parts = messages("", (DIGITS, file.getvalue()))[0]["content"][:2]
        body = {"messages": [{"role": "user", "content": parts}], "pooling": "image_features"}
        found = web.post("/v1/embeddings", json=body).json()
        features = quiet.embed_images([DIGITS, wide])
        for each, expected in zip(found["data"], features, strict=True):
            self.near(each["embedding"], expected.mean(dim=0))
        assert found["usage"]["total_tokens"] == sum(map(len, features))
        assert [image["tokens"] for image in found["images"]] == list(map(len, features))

    def test_beside_a_stream(self, client, service):
        given = {"model": "tiny", "messages": messages(), "max_tokens": 200, "extra_body": {"ignore_eos": True}}
        expected = client.chat.completions.create(**given).choices[0].message.content
        before = service.counters()
        stream = client.chat.completions.create(**given, stream=True)
        text = next(stream).choices[0].delta.content
        for number in range(5):
            assert len(client.embeddings.create(model="tiny", input=[f"What? {number}", "Read"]).data) == 2
        assert text + "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected
        assert service.counters().finished == before.finished + 11

    @pytest.mark.parametrize(
        ("given", "param"),
        [
            ({}, "input"),
            ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "input"),
            ({"input": []}, "input"),
            ({"input": ["a", ""]}, "input"),
            ({"input": ["a"] * 257}, "input"),
            ({"input": [10**6]}, None),
            ({"input": "a", "dimensions": 7}, "dimensions"),
            ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
            ({"input": "a", "pooling": "mean"}, "pooling"),
            ({"input": "a", "pooling": "image_features"}, "pooling"),
            ({"messages": messages(), "pooling": "image_features"}, "messages"),
            ({"messages": [{"role": "user", "content": "a"}], "pooling": "image_features"}, "messages"),
            ({"messages": [{"role": "user", "content": []}], "pooling": "image_features"}, None),
            ({"messages": messages(), "mm_processor_kwargs": {"pixels": 1}}, "mm_processor_kwargs"),
        ],
    )
    def test_refusals(self, web, given, param):
        response = web.post("/v1/embeddings", json=given)
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)

    def test_a_backend_without_hidden_states(self, web, monkeypatch):
        def refused(engines):
            raise EngineError("/srv/engines gives tokens alone")

        monkeypatch.setattr(Engines, "decoder", property(refused))
        response = web.post("/v1/embeddings", json={"input": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (501, "not_supported")
        assert "/srv" not in response.text


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "param"),
        [
            ({"n": 10**9}, "n"),
            ({"n": "2"}, "n"),
            ({"temperature": -1}, "temperature"),
            ({"messages": []}, "messages"),
            ({"messages": "hello"}, "messages"),
            ({"stop": ["a"] * 5}, "stop"),
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
            ({"logit_bias": {"x": 1}}, "logit_bias"),
            ({"logit_bias": {"99999": 1}}, None),
            ({"max_tokens": 10**6}, None),
            ({"response_format": {"type": "json_schema"}}, "response_format"),
            ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}}, None),
            ({"structured_outputs": {"regex": "a" * 70000}}, "structured_outputs"),
            ({"mm_processor_kwargs": {"pixels": 1}}, "mm_processor_kwargs"),
            ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, None),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_fields(self, web, given, param, stream):
        response = web.post("/v1/chat/completions", json={"messages": messages(), "stream": stream} | given)
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
        assert error["message"]

    @pytest.mark.parametrize(
        ("address", "status"),
        [
            (url(b"no image"), 400),
            ("/etc/passwd", 400),
            ("file:///etc/passwd", 400),
            ("http://127.0.0.1:1/a.png", 400),
            ("http://[::1]/a.png", 400),
            ("data:image/png;base64,!", 400),
        ],
    )
    def test_media(self, web, address, status):
        part = {"type": "image_url", "image_url": {"url": address}}
        for each in (part, {"type": "image", "image": address}, {"type": "video_url", "video_url": {"url": address}}):
            body = {"messages": [{"role": "user", "content": [each]}]}
            response = web.post("/v1/chat/completions", json=body)
            assert response.status_code == status
            assert "passwd" not in response.text

    def test_a_schema_of_ten_thousand_levels(self, web):
        schema = '{"items":' * 10_000 + "{}" + "}" * 10_000
        body = f'{{"messages":[{{"role":"user","content":"a"}}],"structured_outputs":{{"json":{schema}}}}}'
        response = web.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400

    def test_statuses_of_http(self, web):
        assert web.post("/v1/chat/completions", content="{}").status_code == 415
        assert web.get("/v1/chat/completions").status_code == 405
        assert web.get("/v1/nothing").status_code == 404
        assert web.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
        assert web.post("/v1/chat/completions", json={"model": "other", "messages": messages()}).status_code == 404
        headers = {"Content-Type": "application/json"}
        assert web.post("/v1/chat/completions", content="{", headers=headers).status_code == 400
        assert web.post("/v1/chat/completions", content=b'{"messages": "\xff"}', headers=headers).status_code == 400
        assert web.post("/v1/chat/completions", content="[" * 100_000, headers=headers).status_code == 400

    @pytest.mark.parametrize("levels", [900, 985, 995, 5_000])
    def test_other_fields_that_are_nested(self, web, levels):
        deep = '{"a":' * levels + "1" + "}" * levels
        for field in (
            f'"response_format":{{"type":"json_schema","json_schema":{{"schema":{deep}}}}}',
            f'"mm_processor_kwargs":{{"max_pixels":{deep}}}',
            f'"colour":{deep},"n":9',
        ):
            body = f'{{"messages":[{{"role":"user","content":"a"}}],{field}}}'
            response = web.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
            assert response.status_code == 400

    def test_messages_and_parts_are_counted(self, web):
        part = {"type": "text", "text": "a"}
        for given in ([{"role": "user", "content": "a"}] * 4097, [{"role": "user", "content": [part] * 4096}]):
            response = web.post("/v1/chat/completions", json={"messages": given})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
            assert "4,097" in response.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("path", "begin", "value", "end"),
        [
            ("/v1/completions", b'{"prompt":[', b"[5],", b"[5]]}"),
            ("/v1/embeddings", b'{"input":[', b"5,", b"5]}"),
            ("/v1/chat/completions", b'{"messages":[', b"{},", b"{}]}"),
            ("/tokenize", b'{"messages":[{"role":"user","content":"a"}],"x":[', b"1,", b"1]}"),
        ],
    )
    def test_a_flood_of_values_is_not_read(self, web, path, begin, value, end):
        headers = {"Content-Type": "application/json"}
        response = web.post(path, content=begin + value * 262_145 + end, headers=headers)
        assert response.status_code == 413
        assert "262,144 commas" in response.json()["error"]["message"]

    def test_a_schema_that_cannot_be_followed_says_so_in_its_own_words(self, web):
        for schema in ({"$ref": "#"}, {"properties": {f"p{n}": {} for n in range(2_200)}, "type": "object"}):
            body = {"messages": messages("Hi", ()), "structured_outputs": {"json": schema}}
            response = web.post("/v1/chat/completions", json=body)
            assert response.status_code == 400
            assert "structured_outputs" in response.json()["error"]["message"]
            assert "<state>" not in response.text

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/v1/chat/completions", {"messages": messages()}),
            ("/v1/completions", {"prompt": ["a", "b"]}),
            ("/v1/completions", {"prompt": "a", "stream": True}),
            ("/v1/embeddings", {"input": "a"}),
            ("/v1/embeddings", {"messages": messages()}),
        ],
    )
    def test_a_deadline(self, web, path, body):
        response = web.post(path, json=body | {"timeout": 1e-6})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")

    def test_unknown_fields_are_named(self, web, service, pipeline):
        body = {"messages": messages("Hi", ()), "max_tokens": 1, "colour\r\nX: y": 1, "user": "me"}
        response = web.post("/v1/chat/completions", json=body)
        assert (response.status_code, response.headers["X-Ignored-Fields"]) == (200, "colour%0D%0AX%3A%20y")
        with opened(service, pipeline, strict=True) as (_, address):
            assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 400

    def test_fetched_bytes_count_as_their_body_does(self, service, pipeline, tmp_path):
        (tmp_path / "digits.png").write_bytes(DIGITS)
        part = {"type": "image_url", "image_url": {"url": f"file://{tmp_path}/digits.png"}}
        for files, images, status in ((1, 1, 503), (5, 6, 503), (5, 3, 200)):  # a body is smaller than a file
            limits = Limits(body_bytes_in_flight=files * len(DIGITS))
            body = {"messages": [{"role": "user", "content": [part] * images}]}
            with opened(service, pipeline, limits=limits, allowed_local_media_path=str(tmp_path)) as (app, address):
                for path in ("/v1/chat/completions", "/tokenize", "/v1/embeddings"):
                    for more in ({}, {"pooling": "image_features"}) if path == "/v1/embeddings" else ({},):
                        response = httpx.post(f"{address}{path}", json=body | more, timeout=PATIENCE)
                        assert response.status_code == status, response.text
                        assert response.headers.get("Retry-After") == ("1" if status == 503 else None)
                        end = time.monotonic() + PATIENCE
                        while app.bodies.held:  # the client has its answer a moment before the request has ended
                            assert time.monotonic() < end
                            time.sleep(0.01)

    def test_a_video_that_takes_too_long(self, web, pipeline, monkeypatch):
        monkeypatch.setattr(pipeline._media.preprocessor, "video_limits", VideoLimits(seconds=-1.0))
        frames = "data:video/jpeg;base64," + ",".join([base64.b64encode(DIGITS).decode()] * 4)
        body = {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": frames}}]}]}
        response = web.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert "not decoded within -1 s (--video-decode-seconds)" in response.json()["error"]["message"]

    def test_bodies_have_a_size_and_a_time(self, service, pipeline):
        limits = Limits(body_bytes=10_000, body_bytes_in_flight=15_000, body_seconds=0.5)
        with opened(service, pipeline, limits=limits) as (app, address):
            path, headers = f"{address}/v1/chat/completions", {"Content-Type": "application/json"}
            assert httpx.post(path, content=b" " * 10_001, headers=headers).status_code == 413
            assert httpx.post(path, content=iter([b" " * 5_000] * 3), headers=headers).status_code == 413

            def slow():
                yield b"{"
                time.sleep(1.5)

            assert httpx.post(path, content=slow(), headers=headers).status_code == 408
            app.bodies.held = 10_000
            response = httpx.post(path, content=b" " * 6_000, headers=headers)
            assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
            assert app.bodies.held == 10_000

    def test_a_deadline_counts_while_media_are_fetched(self, service, pipeline, monkeypatch):
        async def never(self, url, kind, where, hold):
            await asyncio.Future()

        monkeypatch.setattr(MediaSource, "fetch", never)
        with opened(service, pipeline) as (_, address):
            for path in ("/v1/chat/completions", "/v1/embeddings"):
                body = {"messages": messages(), "timeout": 0.1}
                response = httpx.post(f"{address}{path}", json=body, timeout=PATIENCE)
                assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")


class TestWhoMayAsk:
    def test_keys(self, service, pipeline):
        with opened(service, pipeline, api_keys=["alpha", "beta"]) as (_, address):
            body = {"messages": messages()}
            for given in (None, "Bearer", "Bearer gamma", "Basic alpha", "Bearer alpha2", "alpha"):
                headers = {} if given is None else {"Authorization": given}
                response = httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers)
                assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")
                assert httpx.get(f"{address}/metrics", headers=headers).status_code == 401
            assert httpx.get(f"{address}/health").status_code == httpx.get(f"{address}/ready").status_code == 200
            assert httpx.get(address).status_code == 200  # the page asks for the key
            chat, text = [], []
            for key in ("alpha", "alpha", "beta"):
                client = openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)
                answer = client.chat.completions.create(model="tiny", messages=messages(images=(DIGITS, DIGITS)))
                chat.append(answer.usage.prompt_tokens_details.cached_tokens)
                answer = client.completions.create(model="tiny", prompt="What digits are in the image? " * 9)
                text.append(answer.usage.prompt_tokens_details.cached_tokens)
            for cached in (chat, text):
                assert cached[0] == cached[2] == 0 < cached[1]

    def test_another_host_name(self, service, pipeline):
        with opened(service, pipeline, allowed_hosts=["localhost", "127.0.0.1", "[::1]"]) as (_, address):
            for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:80"):
                assert httpx.get(f"{address}/health", headers={"Host": host}).status_code == 200
            for host in ("evil.example:80", "localhost:80:evil", "[::1]evil", "localhost:1/health?", "localhost:[", ""):
                response = httpx.get(f"{address}/health", headers={"Host": host})
                assert (response.status_code, response.json()["error"]["code"]) == (400, "wrong_host")

    @pytest.mark.parametrize("host", ["localhost:1/health?", "a/health#", "[", "localhost:["])
    def test_a_host_name_opens_no_other_address(self, service, pipeline, host):
        with opened(service, pipeline, api_keys=["alpha"]) as (_, address):
            body, headers = {"messages": messages()}, {"Host": host}
            assert httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers).status_code == 401


class TestHangingUp:
    @pytest.mark.parametrize("stream", [False, True])
    def test_it_ends_the_answers(self, web, service, stream):
        body = {"messages": messages(), "ignore_eos": True, "max_tokens": 550, "n": 4, "stream": stream}
        before, cancelled = service.counters().cancelled, self.cancelled(web)
        timeout = httpx.Timeout(PATIENCE, read=0.3)
        # A whole answer is not there in time; of a stream one line is read.
        with (
            suppress(httpx.ReadTimeout),
            web.stream("POST", "/v1/chat/completions", json=body, timeout=timeout) as response,
        ):
            assert stream
            next(response.iter_lines())
        idle(service)
        assert service.counters().cancelled == before + 4
        end = time.monotonic() + PATIENCE
        while self.cancelled(web) != cancelled + 4:
            assert time.monotonic() < end
            time.sleep(0.01)

    def cancelled(self, web):
        name = 'qwen2vl:request_success_total{finished_reason="cancelled"} '
        return sum(float(line.removeprefix(name)) for line in web.get("/metrics").text.splitlines() if name in line)

    def test_before_the_first_token(self, web, service, caplog):
        body = {"messages": messages(), "stream": True}
        for number in range(12):
            with suppress(httpx.ReadTimeout):
                web.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(PATIENCE, read=0.004 * (number + 1)))
        idle(service)
        assert not [record for record in caplog.records if record.name.startswith(("uvicorn", "asyncio"))]

    def test_all_answers_of_a_request_are_cancelled_before_one_is_waited_for(self):
        cancelled = []

        class Ends:
            output = Output()

            def cancel(self):
                cancelled.append(self)

            def __await__(self):
                assert len(cancelled) == 5
                yield from asyncio.sleep(0).__await__()

        asyncio.run(App(ServerSettings("tiny"))._settle([Ends() for _ in range(5)]))
        assert len(cancelled) == 5

    def test_requests_above_the_limit(self, web, service):
        response = web.post("/v1/chat/completions", json={"messages": messages(), "n": 8, "max_tokens": 3})
        assert response.status_code == 200
        service._max_pending, before = 3, service._max_pending
        try:
            response = web.post("/v1/chat/completions", json={"messages": messages(), "n": 4})
            assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
            idle(service)  # those of them that were taken are cancelled
        finally:
            service._max_pending = before


def test_metrics_count_what_was_asked(service, pipeline):
    parser = pytest.importorskip("prometheus_client.parser")
    with opened(service, pipeline, metrics_prefix="vllm:") as (_, address):
        for number in range(3):
            body = {"messages": messages(), "max_tokens": 2 + number, "ignore_eos": True}
            assert httpx.post(f"{address}/v1/chat/completions", json=body, timeout=PATIENCE).status_code == 200
        assert httpx.post(f"{address}/v1/chat/completions", json={}).status_code == 400
        end = time.monotonic() + PATIENCE
        while 'vllm:request_success_total{finished_reason="length"} 3.0' not in (
            text := httpx.get(f"{address}/metrics").text  # an answer is counted a moment after the client has it
        ):
            assert time.monotonic() < end
            time.sleep(0.01)
    found = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            found[(sample.name, *sample.labels.values())] = sample.value
    assert found[("vllm:request_success_total", "length")] == 3
    assert found[("vllm:request_generation_tokens_sum",)] == 2 + 3 + 4
    assert found[("vllm:inter_token_latency_seconds_count",)] == 1 + 2 + 3
    assert found[("vllm:time_to_first_token_seconds_count",)] == 3
    assert found[("vllm:media_decode_seconds_count",)] == 3
    assert 0 < found[("vllm:media_decode_seconds_sum",)] < found[("vllm:request_preprocess_time_seconds_sum",)]
    assert (found[("vllm:http_responses_total", "200")], found[("vllm:http_responses_total", "400")]) == (3, 1)
    assert found[("vllm:num_requests_running",)] == found[("vllm:num_requests_waiting",)] == 0
    dashboard = (ROOT / "docs/guide/grafana.json").read_text()
    shown = set(re.findall(r"qwen2vl:(\w+)", dashboard))
    assert len(shown) > 15
    assert {f"vllm:{name}" for name in shown} <= {name for name, *_ in found}


def test_prompts_that_are_only_counted_hold_up_nothing_else(web, pipeline, monkeypatch):
    go_on, many = threading.Event(), ThreadPoolExecutor(40)

    def slow(request):
        assert go_on.wait(PATIENCE)
        raise PromptError("no")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "tokenize", slow)
        counted = [many.submit(web.post, "/tokenize", json={"messages": messages("Hi", ())}) for _ in range(40)]
        time.sleep(0.5)
        try:
            body = {"messages": messages("Hi", ()), "max_tokens": 1}
            assert web.post("/v1/chat/completions", json=body, timeout=10).status_code == 200
            assert web.get("/metrics", timeout=10).status_code == 200
        finally:
            go_on.set()
        assert {each.result(PATIENCE).status_code for each in counted} == {400}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_answers_are_written_beside_the_event_loop(web, monkeypatch, path):
    whole, loops = Completion.whole, []

    def written(self, outputs):
        loops.append(asyncio._get_running_loop())
        return whole(self, outputs)

    monkeypatch.setattr(Completion, "whole", written)
    body = {"messages": messages("Hi", ()), "prompt": "Hi", "max_tokens": 1}
    assert web.post(path, json=body).status_code == 200
    assert loops == [None]


def test_a_client_that_takes_nothing_has_hung_up():
    async def run():
        bodies, received = Bodies(Limits(send_seconds=0.1)), [{"type": "http.request", "body": b"{}"}]

        async def answer(request, body, stack):
            return as_json({})

        async def receive():
            return received.pop() if received else await asyncio.Future()

        async def send(message):
            if message["type"] == "http.response.body":
                await asyncio.Future()

        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
        await asyncio.wait_for(Endpoint(bodies, lambda: None, answer)(scope, receive, send), PATIENCE)
        assert bodies.held == bodies.running == 0

    asyncio.run(run())


def test_before_the_model_is_loaded_and_when_it_stops(service, pipeline):
    app = App(ServerSettings("tiny"))
    with serving(app) as address:
        assert httpx.get(f"{address}/health").status_code == 200
        assert httpx.get(f"{address}/v1/models").json()["data"][0]["id"] == "tiny"
        for open_now in (False, True):
            if open_now:
                app.open(service, pipeline)
                app.draining = True
            assert httpx.get(f"{address}/ready").status_code == 503
            response = httpx.post(f"{address}/v1/chat/completions", json={"messages": messages()})
            assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        app.draining = False
        assert httpx.get(f"{address}/ready").status_code == 200


def test_the_document_has_what_messages_are_made_of(web):
    schemas = web.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["ChatCompletionRequest"]["properties"]["messages"]["items"]["$ref"].endswith("/Message")
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads(json.dumps(schemas).replace("#/components/schemas/", "#/$defs/"))
    check = jsonschema.Draft202012Validator({"$ref": "#/$defs/Message", "$defs": document})
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    frames = {"type": "video", "video": [url()], "fps": 2, "max_pixels": 28 * 28}
    for taken in (
        *messages(max_pixels=28 * 28),
        {"role": "user", "content": [frames, {"image": url(), "detail": "low"}, {"text": "a", "type": None}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "a", "tool_call_id": "call_1"},
    ):
        assert check.is_valid(taken)
    for refused in (
        {"role": "judge", "content": "a"},
        {"role": "user"},
        {"role": "user", "content": [{"type": "sound"}]},
        {"role": "user", "content": [{"image": url(), "max_pixels": 0}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": 5}}]},
    ):
        assert not check.is_valid(refused)
        assert web.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}, refused]}).status_code == 400


def test_the_document_names_every_field(web):
    document = web.get("/openapi.json").json()
    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "top_k", "structured_outputs", "mm_processor_kwargs", "timeout"} <= set(fields)
    assert set(document["paths"]) == {
        *("/", "/health", "/ready", "/metrics", "/version", "/openapi.json", "/v1/models", "/v1/models/{model}"),
        *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"),
    }


class TestCommand:
    """``run.py serve`` in a process of its own."""

    @contextmanager
    def started(self, engine_dir, tmp_path, *options, probe="/ready"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, str(ROOT / "run.py"), "serve", "--engine-dir", str(engine_dir), "--device", "cpu"]
        process = subprocess.Popen(
            [*command, "--port", str(port), *options], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
            while True:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < end
                try:
                    if httpx.get(f"{address}{probe}").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
            yield process, address
        finally:
            process.kill()
            process.communicate()

    def test_sigterm_lets_streams_end(self, engine_dir, tmp_path):
        with self.started(engine_dir, tmp_path) as (process, address):
            body = {"messages": messages(), "stream": True, "ignore_eos": True, "max_tokens": 300}
            texts = [None] * 4
            begun = threading.Semaphore(0)

            def read(number):
                with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=PATIENCE) as response:
                    lines = []
                    for line in response.iter_lines():
                        if not lines:
                            begun.release()
                        lines.append(line)
                    texts[number] = lines

            threads = [threading.Thread(target=read, args=[number]) for number in range(4)]
            for thread in threads:
                thread.start()
            for _ in threads:
                assert begun.acquire(timeout=PATIENCE)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            if process.poll() is None:
                assert httpx.get(f"{address}/ready").status_code == 503
            for thread in threads:
                thread.join(PATIENCE)
            assert all("data: [DONE]" in lines for lines in texts)
            assert process.wait(PATIENCE) == 143

    @pytest.mark.parametrize("seconds", [0, 0.2, 0.5, 1])
    def test_a_signal_during_the_load_ends_at_once(self, engine_dir, tmp_path, seconds):
        with self.started(engine_dir, tmp_path, probe="/health") as (process, _):
            time.sleep(seconds)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 143
            assert process.stderr.read().splitlines()[-1] == b"terminated"

    def test_a_second_signal_ends_at_once(self, engine_dir, tmp_path):
        with self.started(engine_dir, tmp_path) as (process, address):
            body = {"messages": messages(), "stream": True, "ignore_eos": True, "max_tokens": 550, "n": 8}
            with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=PATIENCE) as response:
                next(response.iter_lines())
                process.send_signal(signal.SIGINT)
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
                assert process.wait(PATIENCE) == 130

    def test_what_is_not_done_in_time_is_cut_and_says_so(self, engine_dir, tmp_path):
        with self.started(engine_dir, tmp_path, "--drain-seconds", "0.2") as (process, address):
            body = {"messages": messages(), "stream": True, "ignore_eos": True, "max_tokens": 550, "n": 8}
            with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=PATIENCE) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                *_, last, _ = lines
            assert last == "data: [DONE]"
            assert process.wait(PATIENCE) == 143
            assert b"Traceback" not in process.stderr.read()

    @pytest.mark.parametrize(
        "options",
        [
            ("--port", "99999"),
            ("--port", "0", "--replicas", "2"),
            ("--replicas", "0"),
            ("--replicas", "3:2"),
            ("--encoder-replicas", "2"),
            ("--drain-seconds", "nan"),
            ("--body-seconds", "0"),
            ("--tls-key", "key.pem"),
            ("--tls-cert", "none.pem", "--tls-key", "none.pem"),
            ("--metrics-prefix", "a b"),
            ("--api-key-file", "none"),
            ("--allowed-local-media-path", "none"),
            ("--allowed-media-domains", "http://a/b"),
        ],
    )
    def test_options_that_have_no_meaning(self, engine_dir, options, command):
        code, _, error = command("serve", "--engine-dir", engine_dir, *options)
        assert code == 2
        assert options[0].lstrip("-") in error or options[1] in error
        assert "invalid _" not in error  # argparse's words for what a function refuses without any

    def test_limits_of_media_are_lower_than_the_librarys(self):
        parser = Parser()
        serve.add_arguments(parser)
        for given, pixels, seconds in (([], 256_000_000, 30.0), (["--video-pixel-limit", "9"], 9, 30.0)):
            options = pipeline_options(parser.parse_args(given))
            assert options.image_pixel_limit == 50_000_000
            assert (options.video_pixel_limit, options.video_decode_seconds) == (pixels, seconds)

    def test_a_header_that_never_ends(self, engine_dir, tmp_path):
        with self.started(engine_dir, tmp_path, "--body-seconds", "0.5") as (_, address):
            port = int(address.rpartition(":")[2])
            for begin in (b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"):
                with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
                    connection.sendall(begin)
                    assert connection.recv(100) == b""

    def test_a_port_that_is_taken(self, engine_dir, tmp_path):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            command = [
                sys.executable,
                str(ROOT / "run.py"),
                "serve",
                "--engine-dir",
                str(engine_dir),
                "--device",
                "cpu",
            ]
            port = str(taken.getsockname()[1])
            done = subprocess.run([*command, "--port", port], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert f"port {port}" in done.stderr
        assert "Traceback" not in done.stderr

    def test_keys_of_an_empty_file(self, engine_dir, tmp_path, command):
        for text, said in (("# none\n  # none\n", "no key"), ("schl\u00fcssel", "ASCII")):
            (tmp_path / "keys").write_text(text, encoding="utf-8-sig")
            code, _, error = command("serve", "--engine-dir", engine_dir, "--api-key-file", tmp_path / "keys")
            assert code == 2
            assert said in error
