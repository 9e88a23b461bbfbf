"""The server under the load and fuzzing tools of the field; `make test-serve` installs them."""

import base64
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from qwen2vl_trt.engines.profile import BuildProfile
from tests.support.engine_folders import build

ROOT = Path(__file__).resolve().parents[2]
TOOLS = os.environ.get("SERVING_TOOLS")  # folders of programs, as in PATH
PATIENCE = 60

pytestmark = pytest.mark.skipif(TOOLS is None, reason="make test-serve runs these, with the tools that they need")


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    profile = BuildProfile(4, 1024, max_batch_size=4, max_num_seqs=8, max_input_len=768, max_seq_len=1024)
    return build("tiny", tmp_path_factory.mktemp("served") / "engines", "torch", profile=profile)


@contextmanager
def _started(engine_dir, log):
    command = [sys.executable, str(ROOT / "run.py"), "serve", "--engine-dir", str(engine_dir), "--device", "cpu"]
    with log.open("w") as errors:
        command += ["--served-model-name", "tiny", "--port", "0"]
        process = subprocess.Popen(command, cwd=log.parent, stderr=errors, stdout=errors)
    try:
        end = time.monotonic() + PATIENCE
        while not (found := re.search(r"ready at (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def server(engine_dir, tmp_path):
    """A server of its own; its process has no errors to say, and nothing is under way, once a test ends."""
    log = tmp_path / "log"
    with _started(engine_dir, log) as (process, address):
        yield process, address
        end = time.monotonic() + PATIENCE
        while metrics(address)["num_requests_running"] or metrics(address)["num_requests_waiting"]:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert process.poll() is None
        assert "Traceback" not in log.read_text()


def metrics(address):
    families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
    return {
        sample.name.partition(":")[2]: sample.value
        for family in families
        for sample in family.samples
        if not sample.labels
    }


def tool(folder, name, *arguments):
    """Run a tool in an empty folder; returns what it prints."""
    done = subprocess.run(
        [str(Path(shutil.which(name, path=TOOLS)).absolute()), *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_schemathesis_finds_no_5xx_and_no_wrong_body_that_is_taken(server, tmp_path):
    # 504 is the answer to a timeout of the request's own.
    expected = '["2xx", "3xx", "4xx", "504"]'
    (tmp_path / "schemathesis.toml").write_text(f"[checks]\nnot_a_server_error.expected-statuses = {expected}\n")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    tool(
        tmp_path,
        "schemathesis",
        *("run", f"{server[1]}/openapi.json", "--seed", 7, "--max-examples", 50, "--max-time", 150, "--no-color"),
        *("--phases", "coverage,fuzzing", "--checks", f"{checks},negative_data_rejection,unsupported_method"),
    )


@pytest.mark.parametrize(
    "data",
    [
        "kind=synthetic_image,width=112,height=84,output_tokens=16",
        "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
    ],
)
def test_guidellm(server, engine_dir, tmp_path, data):
    tool(
        tmp_path,
        "guidellm",
        *("run", "--backend", f"kind=openai_http,target={server[1]},model=tiny", "--disable-progress"),
        *("--profile", "kind=concurrent,streams=8", "--constraint", "kind=max_requests,count=64"),
        *("--tokenizer", f"kind=hf_auto,model={engine_dir}", "--data", data, "--output", "kind=json,path=report.json"),
    )
    (run,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    assert run["metrics"]["request_totals"] == {"successful": 64, "errored": 0, "incomplete": 0, "total": 64}
    assert run["metrics"]["output_token_count"]["successful"]["mean"] == 16


def test_evalscope_perf(server, engine_dir, tmp_path):
    tool(
        tmp_path,
        "evalscope",
        *("perf", "--api", "openai", "--url", f"{server[1]}/v1/chat/completions", "--model", "tiny", "--stream"),
        *("--tokenizer-path", engine_dir, "--dataset", "random_vl", "--image-width", 112, "--image-height", 84),
        *("--min-prompt-length", 4, "--max-prompt-length", 16, "--max-tokens", 16, "--number", 64, "--parallel", 8),
        *("--outputs-dir", "out", "--no-timestamp"),
    )
    (summary,) = tmp_path.glob("out/**/benchmark_summary.json")
    found = json.loads(summary.read_text())
    assert (found["Total Requests"], found["Failed Requests"]) == (64, 0), found


def test_locust_with_a_third_hanging_up(server, tmp_path):
    seconds = 60
    tool(
        tmp_path,
        "locust",
        *("--locustfile", ROOT / "tests/serving/locustfile.py", "--host", server[1], "--headless", "--only-summary"),
        *("--users", 12, "--spawn-rate", 12, "--run-time", f"{seconds}s", "--stop-timeout", 10, "--csv", "report"),
    )
    aggregated = (tmp_path / "report_stats.csv").read_text().splitlines()[-1].split(",")
    requests, failures = map(int, aggregated[2:4])
    assert failures == 0
    assert requests > 60


def test_memory_over_2000_different_images(server):
    process, address = server
    resident = []
    with httpx.Client(base_url=address, timeout=PATIENCE) as web:
        for number in range(2000):
            file = io.BytesIO()
            Image.new("RGB", (336, 336), tuple(number.to_bytes(3, "little"))).save(file, "PNG")
            image = {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
            content = [{"type": "image_url", "image_url": image}]
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
            assert web.post("/v1/chat/completions", json=body).status_code == 200
            if number % 100 == 99:
                # The embedding cache has a bound of its own, which so many small images do not reach.
                cached = metrics(address)["mm_cache_bytes"]
                resident.append(round((psutil.Process(process.pid).memory_info().rss - cached) / 1e6))
    assert max(resident) < 1.05 * resident[1], f"{resident} MB, and a cache of {cached / 1e6:.0f} MB"


def _huge_png():
    """The header of a PNG of 30,000 x 30,000 pixels, and the little data that a flat one compresses to."""
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + 3 * 30_000)) for _ in range(30_000)) + rows.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def test_what_is_too_large_is_refused_and_takes_no_memory(server):
    process, address = server
    image = {"url": "data:image/png;base64," + base64.b64encode(_huge_png()).decode()}
    asked = [{"role": "user", "content": "x"}]
    schema = "{" + '"a":{' * 10_000 + "}" * 10_000 + "}"
    form = '{"type": "json_schema", "json_schema": {"schema": ' + schema + "}}"
    bodies = {
        "image": json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": image}]}]}),
        "n": json.dumps({"messages": asked, "n": 10**9}),
        "schema": '{"messages": [{"role": "user", "content": "x"}], "response_format": ' + form + "}",
        "bytes": b" " * (64 << 20) + b"{}",
        "chunks": (b" " * (1 << 20) for _ in range(65)),
    }
    before, most = psutil.Process(process.pid).memory_info().rss, 0
    with httpx.Client(base_url=address, timeout=PATIENCE, headers={"Content-Type": "application/json"}) as web:
        for name, body in bodies.items():
            with suppress(httpx.WriteError):  # it hangs up on who goes on to send
                status = web.post("/v1/chat/completions", content=body).status_code
                assert 400 <= status < 500, name
            most = max(most, psutil.Process(process.pid).memory_info().rss)
    assert most - before < 200e6
