"""The command on a Ray of its own, with two workers: what is lost is done again, and nothing twice."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from qwen2vl_trt import Request, SamplingParams
from qwen2vl_trt.batch.ray_driver import RayDriver
from tests.batch.outputs import failures, rows, write_lines
from tests.support.bounds import FP32
from tests.support.media_files import save_images
from tests.support.models import relative_error

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 600  # seconds; others may use the machine


class Ray:
    """Commands whose Ray processes are known by the folder that Ray keeps its sockets in."""

    def __init__(self, folder):
        self.folder = folder

    def start(self, log, *options, path=ROOT):
        environment = os.environ | {
            "RAY_TMPDIR": self.folder,
            "RAY_memory_monitor_refresh_ms": "0",  # the memory of others is no reason to end a worker
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(path),
        }
        command = [sys.executable, str(ROOT / "run.py"), "batch", "--device", "cpu", "--workers", "2"]
        with log.open("w") as file:
            return subprocess.Popen(
                [*command, "--cpus-per-worker", "1", *map(str, options)],
                env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                # A shell's background job ignores Ctrl-C, and its children inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip

    def processes(self):
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("RAY_TMPDIR") == self.folder and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def workers(self):
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if "MapWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return found


@pytest.fixture
def ray():
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # the path of a socket has at most 107 characters
    ray = Ray(folder)
    yield ray
    for process in ray.processes():
        with suppress(psutil.Error):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def wait_for(condition, process, log):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def wait_until_none_is_left(ray):
    deadline = time.monotonic() + DEADLINE
    while ray.processes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def done(output):
    return len(list((output / "data").glob("*.parquet")))


def test_a_driver_that_is_lost_when_nothing_more_is_asked_of_it(ray, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", ray.folder)
    with RayDriver(None, 1) as driver:
        driver._process.kill()
        driver._process.join()
    for process in ray.processes():
        with suppress(ProcessLookupError):
            assert os.getsid(process.pid) != driver._process.pid


def test_a_lost_worker_and_a_lost_driver(ray, engine_dir, pipeline, tmp_path):
    folder = save_images(tmp_path / "in", 2000, [(56, 56), (56, 84)])
    bad = [f"{number:04d}.png" for number in range(13, 2000, 100)]
    for name in bad:
        (folder / name).write_bytes((folder / name).read_bytes()[:500])
    output, log = tmp_path / "out", tmp_path / "log"
    options = ("--engine-dir", engine_dir, "--input", folder, "--output", output, "--task", "features")
    options += ("--pool", "mean", "--shard-size", 50)
    process = ray.start(log, *options)
    wait_for(lambda: done(output) >= 4, process, log)
    lost, other = ray.workers()
    lost.kill()
    other.suspend()  # or it might do all the rest before another is there
    wait_for(lambda: len(ray.workers()) == 2 and lost not in ray.workers(), process, log)
    other.resume()
    before = done(output)
    wait_for(lambda: done(output) > before, process, log)
    process.kill()
    process.wait()
    wait_until_none_is_left(ray)  # nobody told the driver: it saw that its parent had ended
    before = done(output)
    assert 4 < before < 40
    process = ray.start(tmp_path / "again", *options, "--resume")
    assert process.wait(DEADLINE) == 0, (tmp_path / "again").read_text()
    said = (tmp_path / "again").read_text()
    assert ", 1,980 rows" not in said
    assert "were there" in said
    assert "warning: 20 rows could not be used" in said
    assert done(output) == 40
    assert sorted(failures(output)) == bad
    found = rows(output)
    names = [f"{number:04d}.png" for number in range(2000) if f"{number:04d}.png" not in bad]
    assert list(found) == names
    expected = torch.stack([e.mean(0) for e in pipeline.embed_images([folder / name for name in names])])
    features = torch.tensor([found[name]["features"] for name in names])
    assert relative_error(features, expected) < FP32


KILLER = '''
"""A file system whose files end the process that reads them: an image that crashes its decoder."""
import os, signal
import fsspec
from fsspec.implementations.local import LocalFileSystem

class Kill(LocalFileSystem):
    protocol = "kill"
    def cat_file(self, path, start=None, end=None, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

fsspec.register_implementation("kill", Kill)
'''


def test_answers_and_a_row_that_kills_its_worker(ray, engine_dir, pipeline, tmp_path):
    folder = save_images(tmp_path / "in", 24)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLER)
    values = [
        {"image": f"in/{number:04d}.png", "prompt": f"What is {number}?", "id": f"row {number}"} for number in range(24)
    ]
    values[9]["image"] = "kill:///crash.png"
    values[3]["image"] = f"file://{folder}/0003.png"
    values[20]["image"] = "in/none.png"
    table = write_lines(tmp_path / "rows.jsonl", values)
    output, log = tmp_path / "out", tmp_path / "log"
    options = ("--engine-dir", engine_dir, "--input", table, "--output", output, "--task", "generate")
    options += ("--shard-size", 6, "--max-tokens", 6, "--max-retries", 0)
    process = ray.start(log, *options, path=f"{tmp_path / 'site'}{os.pathsep}{ROOT}")
    assert process.wait(DEADLINE) == 0, log.read_text()
    assert "out: 22 rows, " in log.read_text()
    reasons = failures(output)
    assert sorted(reasons) == ["row 20", "row 9"]
    assert "no such file" in reasons["row 20"]
    assert reasons["row 9"] == "row row 9: 3 workers were lost with it in hand (crashed or out of memory)"
    good = [number for number in range(24) if number not in (9, 20)]
    found = rows(output)
    assert list(found) == [f"row {number}" for number in good]
    requests = [Request(f"What is {number}?", [folder / f"{number:04d}.png"]) for number in good]
    expected = pipeline.generate(requests, SamplingParams(max_tokens=6))
    assert [found[f"row {number}"]["answer"] for number in good] == [answer.text for answer in expected]
    wait_until_none_is_left(ray)


@pytest.mark.parametrize(
    ("number", "send", "after"),
    [
        (signal.SIGTERM, os.kill, 4),
        (signal.SIGINT, os.killpg, 4),
        (signal.SIGTERM, os.killpg, 0),
    ],
)
def test_ended_by_a_signal(ray, engine_dir, tmp_path, number, send, after):
    """To the command alone or to its whole group, at work or while Ray starts: one line, a code, nothing left."""
    folder = save_images(tmp_path / "in", 2000, [(56, 56)])
    output, log = tmp_path / "out", tmp_path / "log"
    options = ("--engine-dir", engine_dir, "--input", folder, "--output", output, "--task", "features")
    options += ("--pool", "mean", "--shard-size", 50)
    process = ray.start(log, *options)
    wait_for(lambda: done(output) >= after and any(p.name() == "raylet" for p in ray.processes()), process, log)
    send(process.pid, number)
    code = process.wait(DEADLINE)
    assert code == (143 if number == signal.SIGTERM else 130)
    _, left = psutil.wait_procs(ray.processes(), 5)  # Ray's own agents would live on for a minute
    assert not left
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    saved = len(rows(output))
    assert log.read_text() == f"{word}: {saved:,} rows are saved; run again with --resume to go on\n"
    assert after * 50 <= saved < 2000
    assert not (output / ".work").exists()
    if number == signal.SIGINT:
        assert ray.start(tmp_path / "again", *options, "--resume").wait(DEADLINE) == 0
        assert f"out: {2000 - saved:,} rows, {saved:,} were there, " in (tmp_path / "again").read_text()
        assert len(rows(output)) == 2000
