"""The examples: a script, a notebook, and the server as its clients meet it."""

import asyncio
import json
import runpy
import sys
import time
from pathlib import Path

import pytest

from qwen2vl_trt import Event, SamplingParams
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import ExecutionError
from qwen2vl_trt.hub import resolve_model

try:  # FastAPI has no release for Python 3.10
    import httpx
    import python_multipart  # noqa: F401
    from fastapi.testclient import TestClient

    from examples.fastapi_server import app
except ImportError:
    app = None
ROOT = Path(__file__).resolve().parent.parent
ASK = {"prompt": "What digits are in the image?"}
LONG = {"prompt": "x " * 5000}


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "engines"
    profile = BuildProfile(4, 1024, max_batch_size=2, max_num_seqs=2, max_input_len=512, max_seq_len=640)
    build_engines(resolve_model("tiny"), *find_backend("torch", "fp32"), profile, folder)
    return folder


@pytest.fixture
def client(engine_dir, monkeypatch):
    if app is None:
        pytest.skip("fastapi or python-multipart is not installed: pip install 'qwen2vl-trt[test]'")
    monkeypatch.setenv("ENGINE_DIR", str(engine_dir))
    with TestClient(app) as client:
        yield client


@pytest.fixture(scope="module")
def digits():
    return ("images", ("digits.png", (ROOT / "docs" / "digits.png").read_bytes(), "image/png"))


def test_the_script(engine_dir, monkeypatch, capsys):
    monkeypatch.setenv("ENGINE_DIR", str(engine_dir))
    monkeypatch.setattr(sys, "argv", ["ask.py", str(ROOT / "docs" / "digits.png"), ASK["prompt"]])
    runpy.run_path(str(ROOT / "examples" / "ask.py"), run_name="__main__")
    answer, took, embedding = capsys.readouterr().out.splitlines()
    assert answer == "92059"
    assert "prompt tokens" in took
    assert embedding == "embedding of the image: (20, 128)"


@pytest.mark.parametrize("missing", ["image", "engines"])
def test_the_script_says_in_one_line_what_is_missing(engine_dir, monkeypatch, missing, tmp_path):
    monkeypatch.setenv("ENGINE_DIR", str(engine_dir if missing == "image" else tmp_path / "none"))
    monkeypatch.setattr(sys, "argv", ["ask.py", "none.png", ASK["prompt"]])
    with pytest.raises(SystemExit, match=r"^error: .*none.*[^\n]$"):
        runpy.run_path(str(ROOT / "examples" / "ask.py"), run_name="__main__")


def test_the_notebook(engine_dir, monkeypatch, capsys):
    """Its cells, one after another in one namespace."""
    monkeypatch.setenv("ENGINE_DIR", str(engine_dir))
    monkeypatch.chdir(ROOT)
    cells = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    assert [output.text for output in names["outputs"]][:2] == ["92059", "5"]
    assert len(names["embeddings"]) == 2
    assert "'9'" in capsys.readouterr().out


def events(response):
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *found, end = response.text.split("\n\n")
    assert end == ""
    return [json.loads(event.removeprefix("data: ")) for event in found]


def test_an_answer_and_a_stream(client, digits):
    response = client.post("/answer", data=ASK, files=[digits])
    assert (response.status_code, response.json()) == (200, {"answer": "92059"})
    streamed = events(client.post("/stream", data=ASK, files=[digits]))
    assert "".join(event["text"] for event in streamed) == "92059"
    assert len(streamed) > 4
    assert client.post("/answer", data={"prompt": "Who are you?"}).json()["answer"]


@pytest.mark.parametrize("path", ["/answer", "/stream"])
@pytest.mark.parametrize(
    ("data", "file", "said"),
    [
        (ASK, ("a.jpg", b"\xff\xd8\xff\xe0 no image", "image/jpeg"), "image 1"),
        ({"prompt": "<image> and <image>"}, None, "2; images given: 1"),
        (LONG, None, "tokens"),
    ],
)
def test_what_is_wrong_with_a_request_is_a_status(client, digits, path, data, file, said):
    """Of a stream too: its status has not been sent before the first token."""
    response = client.post(path, data=data, files=[digits if file is None else ("images", file)])
    assert response.status_code == 400
    assert said in response.json()["error"]
    assert "\n" not in response.json()["error"]
    assert client.post(path, files=[digits]).status_code == 422  # no prompt
    counters = app.state.service.counters()
    assert (counters.running, counters.queued) == (0, 0)


def test_a_full_service_says_so(client, digits, monkeypatch):
    monkeypatch.setattr(app.state.service, "_max_pending", 0)
    for path in ("/answer", "/stream"):
        response = client.post(path, data=ASK, files=[digits])
        assert response.status_code == 503
        assert "try again later" in response.json()["error"]


def test_an_error_after_the_first_token_is_an_event(client, monkeypatch):
    class Fails:
        async def __aiter__(self):
            yield Event(0, 1, "9", None)
            raise ExecutionError("out of memory")

    monkeypatch.setattr(app.state.service, "submit", lambda request: Fails())
    assert events(client.post("/stream", data=ASK)) == [{"text": "9"}, {"error": "out of memory"}]


def test_a_client_that_hangs_up_ends_its_request(client, digits, monkeypatch):
    service = app.state.service
    submit, long = service.submit, SamplingParams(max_tokens=400, ignore_eos=True)
    monkeypatch.setattr(service, "submit", lambda request: submit(request, long))
    request = httpx.Request("POST", "http://server/stream", data=ASK, files=[digits])
    body, first = request.read(), []

    async def talk():
        sent, gone = False, asyncio.Event()

        async def receive():
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message.get("body"):
                first.append(message["body"])
                gone.set()
                await asyncio.sleep(60)  # a client that reads no further

        headers = [(name.lower().encode(), value.encode()) for name, value in request.headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/stream", "query_string": b"", "headers": headers}
        await app(scope | {"app": app, "asgi": {"version": "3.0", "spec_version": "2.0"}}, receive, send)

    asyncio.run(asyncio.wait_for(talk(), 30))
    assert len(first) == 1
    deadline = time.monotonic() + 60
    while not service.counters().cancelled:
        assert time.monotonic() < deadline
        assert service.counters().running
        time.sleep(0.001)
