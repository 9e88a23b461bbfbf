"""What the ingress does with a request whose replica is lost, over a stand-in for Ray Serve's handle."""

import json
import socket
from pathlib import Path

import anyio
import httpx
import pytest

pytest.importorskip("mmh3", reason="ray[serve] is not installed")
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.requests import ClientDisconnect

from qwen2vl_trt.errors import UnavailableError
from qwen2vl_trt.runtime.options import PipelineOptions
from qwen2vl_trt.serving.app import ServerSettings
from qwen2vl_trt.serving.deployment import ReplicaSettings
from qwen2vl_trt.serving.ingress import Front, Relayed, conversation_key
from qwen2vl_trt.serving.replicas import serve_replicas


class Replicas:
    """A handle whose calls do, one after another, what the lists say: messages to send, or an exception to raise."""

    def __init__(self, *calls):
        self.calls, self.asked, self.keys, self.left = [*calls], [], [], 0
        self.answer = self

    def options(self, *, stream, session_id):
        assert stream
        self.keys.append(session_id)
        return self

    def remote(self, scope, body):
        self.asked.append((scope["path"], body))
        return Call(self, self.calls.pop(0))


class Call:
    def __init__(self, replicas, steps):
        self.replicas, self.steps = replicas, steps

    async def __aiter__(self):
        for step in self.steps:
            if isinstance(step, Exception):
                raise step
            yield [step]

    def cancel(self):
        self.replicas.left += 1


def start(kind="application/json"):
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]}


def body(text, more=False):
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


LOST = ActorDiedError()
ASKED = {"messages": [{"role": "user", "content": "Hi"}]}


def ask(replicas, messages=ASKED["messages"], **settings):
    async def call():
        front = Front(ServerSettings("tiny", **settings), replicas)
        transport = httpx.ASGITransport(front, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post("/v1/chat/completions", json={"messages": messages})

    return anyio.run(call)


@pytest.mark.parametrize("before", [[LOST], [start(), LOST]])
def test_what_has_not_begun_goes_to_another(before):
    replicas = Replicas(before, before, before, [start(), body("yes")])
    response = ask(replicas)
    assert (response.status_code, response.text) == (200, "yes")
    assert len(replicas.asked) == replicas.left == 4
    assert all(json.loads(sent) == ASKED for _, sent in replicas.asked)


def test_a_request_that_ends_every_replica_is_given_up():
    replicas = Replicas(*[[LOST]] * 9)
    response = ask(replicas)
    assert (response.status_code, len(replicas.asked)) == (500, 4)
    assert "not tried again" in response.json()["error"]["message"]


def test_a_stream_that_has_begun_says_that_it_was_cut():
    replicas = Replicas([start("text/event-stream; charset=utf-8"), body("data: {}\n\n", True), LOST])
    first, second, done, _ = ask(replicas).text.split("\n\n")
    assert (first, done, len(replicas.asked)) == ("data: {}", "data: [DONE]", 1)
    assert json.loads(second.removeprefix("data: "))["error"]["type"] == "server_error"


def test_one_that_is_lost_after_its_last_word_has_answered():
    replicas = Replicas([start(), body("yes"), LOST])
    assert ask(replicas).text == "yes"
    assert len(replicas.asked) == 1


def test_too_many_requests_are_refused():
    response = ask(Replicas([BackPressureError(8, 8)]))
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")


@pytest.mark.parametrize("path", ["/ready", "/metrics"])
def test_probes_while_no_replica_is_there(path):
    class Lost:
        def broadcast(self, method):
            raise DeploymentUnavailableError("replicas")

    async def call():
        transport = httpx.ASGITransport(Front(ServerSettings("tiny"), Lost()))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as web:
            return await web.get(path)

    response = anyio.run(call)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")


def test_an_address_in_use_is_refused_although_it_may_be_shared():
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        http = {"host": "127.0.0.1", "port": other.getsockname()[1]}
        settings = ReplicaSettings(ServerSettings("tiny"), Path("none"), PipelineOptions(), 1, 1, 1, 1.0, http)
        with pytest.raises(UnavailableError, match=f"start on 127.0.0.1, port {http['port']}: Address already in use"):
            serve_replicas(settings, "cpu")


def test_what_is_refused_reaches_no_replica():
    replicas = Replicas()
    assert ask(replicas, api_keys=["alpha"]).status_code == 401
    assert ask(replicas, allowed_hosts=["elsewhere"]).status_code == 400


def test_a_flood_of_values_is_refused_before_it_is_read():
    replicas = Replicas()
    response = ask(replicas, messages=[1] * 262_200)
    assert (response.status_code, replicas.asked) == (413, [])


def test_a_client_that_leaves_while_it_is_sent_to_leaves_the_replica():
    replicas = Replicas([start(), body("a", True), body("b")])

    async def call():
        async def send(message):
            if message["type"] == "http.response.body":
                raise ClientDisconnect

        with pytest.raises(ClientDisconnect):
            await Relayed(replicas, {"path": "/"}, b"", "")({}, None, send)
        assert replicas.left == 1

    anyio.run(call)


class TestConversationKey:
    def key(self, *roles, **fields):
        return conversation_key(
            json.dumps({"messages": [{"role": r, "content": t} for r, t in roles], **fields}).encode()
        )

    def test_turns_of_one_conversation_have_one(self):
        first = [("system", "Be brief."), ("user", "Hi")]
        turns = [self.key(*first), self.key(*first, ("assistant", "Hello"), ("user", "Why?"), temperature=1)]
        assert turns[0] == turns[1] != ""
        assert len({*turns, self.key(("user", "Hi")), self.key(("system", "Be brief."), ("user", "Ho"))}) == 3

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "{}", '{"messages": 1}', '{"messages": ["a"]}', '{"messages": []}']
    )
    def test_bodies_that_are_none(self, text):
        assert conversation_key(text.encode()) == ""

    def test_a_text(self):
        keys = {conversation_key(json.dumps({"prompt": text}).encode()) for text in ("a" * 2000, "a" * 3000, "b")}
        assert len(keys) == 2
