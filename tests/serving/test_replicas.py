"""Two replicas on a Ray of their own: what a killed one had in hand, streams, hang-ups, and the end."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from qwen2vl_trt.engines.profile import BuildProfile
from tests.support.engine_folders import build

pytest.importorskip("mmh3", reason="ray[serve] is not installed")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
ROOT = Path(__file__).resolve().parents[2]
IMAGE = "data:image/png;base64," + base64.b64encode((ROOT / "docs" / "digits.png").read_bytes()).decode()
PATIENCE = 300  # seconds; others may use the machine


def asked(number, **fields):
    parts = [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": f"What is {number}?"}]
    return {"messages": [{"role": "user", "content": parts}], "ignore_eos": True, **fields}


def poll(condition):
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


class Served:
    """``run.py serve --replicas N``, whose Ray processes are known by the folder that Ray keeps its sockets in."""

    def __init__(self, folder, engine_dir, *options, **environment):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, str(ROOT / "run.py"), "serve", "--engine-dir", str(engine_dir), "--device", "cpu"]
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), *options],
            cwd=ROOT, stderr=self.log, stdout=self.log, start_new_session=True,
            env=os.environ | {
                "RAY_TMPDIR": str(folder),
                "RAY_memory_monitor_refresh_ms": "0",  # the memory of others is no reason to end a worker
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            } | environment,
            # A shell's background job ignores Ctrl-C, and its children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        self.web = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE)
        self.many = ThreadPoolExecutor(16)

    def said(self):
        return (self.folder / "log").read_text()

    def ready(self):
        assert self.process.poll() is None, self.said()
        return f"ready on 127.0.0.1, port {self.port}" in self.said()

    def processes(self):
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("RAY_TMPDIR") == str(self.folder):
                    found.append(process)
        return [process for process in found if process.pid != os.getpid()]

    def answer(self, *body, **fields):
        return self.web.post("/v1/chat/completions", json=asked(*body, **fields))

    def metrics(self, name, labels=""):
        """The values of a metric, by the replica."""
        found = {}
        for line in self.web.get("/metrics").text.splitlines():
            if match := re.match(rf'qwen2vl:{name}\{{{labels}.*replica="(\w+)".*\}} (.*)', line):
                found[match[1]] = found.get(match[1], 0) + float(match[2])
        return found

    def home(self, number):
        """The replica that answers a question."""
        before = self.metrics("prompt_tokens_total")
        assert self.answer(number, max_tokens=1).status_code == 200
        (home,) = [name for name, value in self.metrics("prompt_tokens_total").items() if value > before[name]]
        return home

    def replica(self, name, deployment="Replica"):
        """Its process, which Ray names by the deployment alone."""
        for process in self.processes():
            with suppress(psutil.Error):
                if f"qwen2vl-trt:{deployment}" in " ".join(process.cmdline()) and any(
                    name in file.path
                    for file in process.open_files()  # its log
                ):
                    return process
        raise AssertionError(f"no process of {name}")

    def close(self):
        self.many.shutdown(cancel_futures=True)
        self.web.close()
        for process in [self.process, *self.processes()]:
            with suppress(psutil.Error, ProcessLookupError):
                process.kill()
        self.process.wait()
        self.log.close()


@contextmanager
def served(*options, **environment):
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # the path of a socket has at most 107 characters
    server = Served(folder, *options, **environment)
    try:
        poll(server.ready)
        yield server
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    profile = BuildProfile(4, 1024, max_batch_size=2, max_num_seqs=4, max_input_len=512, max_seq_len=640)
    return build("tiny", tmp_path_factory.mktemp("served") / "engines", "torch", profile=profile)


@pytest.fixture(scope="module")
def two(engine_dir):
    """One server for all tests of this module; the last test ends it."""
    with served(engine_dir, "--replicas", "2", "--body-bytes", str(8 << 20), "--drain-seconds", "60") as server:
        yield server


def test_a_conversation_stays_with_one_replica(two):
    homes = {number: two.home(number) for number in range(12)}
    assert len({*homes.values()}) == 2  # 12 conversations on one of two: once in 2,048 runs
    for number in (0, 1):
        assert two.home(number) == homes[number]


def test_a_stream_and_what_it_is_made_of(two):
    with two.web.stream("POST", "/v1/chat/completions", json=asked(1, max_tokens=20, stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    text = "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1])
    assert text == two.answer(1, max_tokens=20).json()["choices"][0]["message"]["content"] != ""


def test_addresses_and_refusals(two):
    for path in ("/", "/health", "/ready", "/metrics", "/version", "/openapi.json", "/v1/models", "/v1/models/tiny"):
        assert two.web.get(path).status_code == (404 if path.endswith("/tiny") else 200), path
    assert "max_model_len" in two.web.get("/v1/models").json()["data"][0]
    assert two.web.get("/nowhere").status_code == 404
    assert two.web.post("/health").status_code == 405
    assert two.web.post("/v1/chat/completions", json={}).status_code == 400
    assert two.web.post("/v1/chat/completions", content=b"{}").status_code == 415
    assert two.web.get("/health", headers={"Host": "evil.example"}).status_code == 400
    assert two.answer("x" * (8 << 20)).status_code == 413
    assert two.answer("x" * (7 << 20)).json()["error"]["message"].startswith("the prompt has over")


@pytest.mark.parametrize("stream", [False, True])
def test_a_hang_up_ends_the_answers(two, stream):
    cancelled = ("request_success_total", 'finished_reason="cancelled"')
    before = sum(two.metrics(*cancelled).values())
    body = asked(2, max_tokens=500, n=4, stream=stream)
    with (
        suppress(httpx.ReadTimeout),
        two.web.stream(
            "POST", "/v1/chat/completions", json=body, timeout=httpx.Timeout(PATIENCE, read=0.5)
        ) as response,
    ):
        next(response.iter_lines())
    poll(lambda: sum(two.metrics(*cancelled).values()) == before + 4)
    poll(lambda: not sum(two.metrics("num_requests_running").values()))


def test_what_a_killed_replica_had_in_hand_is_answered(two):
    """And a stream that had begun says that it was cut."""
    homes = {}
    for number in range(100, 120):
        homes.setdefault(two.home(number), []).append(number)
    lost, numbers = next((name, found) for name, found in homes.items() if len(found) >= 3)
    numbers = numbers[:3]
    expected = [two.answer(number, max_tokens=500).json()["choices"] for number in numbers]
    process = two.replica(lost)

    def stream():
        with two.web.stream(
            "POST", "/v1/chat/completions", json=asked(numbers[0], max_tokens=500, stream=True)
        ) as all_:
            return [line for line in all_.iter_lines() if line]

    waiting = [two.many.submit(two.answer, number, max_tokens=500) for number in numbers]
    begun = two.many.submit(stream)
    poll(lambda: two.metrics("num_requests_running").get(lost) == 4)
    process.suspend()
    assert not any(each.done() for each in (*waiting, begun))
    process.kill()
    wait([*waiting, begun], PATIENCE)
    answers = [each.result() for each in waiting]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert [answer.json()["choices"] for answer in answers] == expected
    assert begun.result()[-1] == "data: [DONE]"
    poll(lambda: len(two.metrics("num_requests_running")) == 2 and lost not in two.metrics("num_requests_running"))
    assert two.answer(numbers[0], max_tokens=1).status_code == 200


def test_sigterm_lets_streams_end_and_leaves_nothing(two):
    body = asked(3, max_tokens=300, stream=True)

    def stream():
        with two.web.stream("POST", "/v1/chat/completions", json=body) as response:
            return [line for line in response.iter_lines() if line]

    streams = [two.many.submit(stream) for _ in range(4)]
    poll(lambda: sum(two.metrics("num_requests_running").values()) == 4)
    two.process.send_signal(signal.SIGTERM)
    for each in streams:
        lines = each.result(PATIENCE)
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert two.process.wait(PATIENCE) == 143
    assert two.said().splitlines()[-1] == "terminated"
    assert "Traceback" not in two.said()
    assert not psutil.wait_procs(two.processes(), 10)[1]


def test_encoders_apart_from_the_decoder(engine_dir):
    with served(engine_dir, "--replicas", "1", "--encoder-replicas", "2") as server:
        text = server.answer(1, max_tokens=6).json()["choices"][0]["message"]["content"]
        assert text
        server.replica("", "Encoder").kill()
        for number in range(4):  # the same picture in other sizes: none is cached
            body = asked(1, max_tokens=6, mm_processor_kwargs={"min_pixels": 28 * 28 * (30 + 8 * number)})
            response = server.web.post("/v1/chat/completions", json=body)
            assert (response.status_code, response.json().get("error")) == (200, None)
            assert response.json()["usage"]["prompt_tokens_details"]["image_tokens"] >= 30 + 8 * number
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 130
        assert not psutil.wait_procs(server.processes(), 10)[1]
