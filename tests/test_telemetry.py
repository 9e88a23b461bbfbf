"""Nothing that the project imports reports its use: no name is resolved, no host called, no file left in the home."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2vl_trt.telemetry import opt_out
from tests.support.engine_folders import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = (
    "ORT_DISABLE_TELEMETRY",
    "HF_HUB_DISABLE_TELEMETRY",
    "RAY_USAGE_STATS_ENABLED",
    "TRTLLM_NO_USAGE_STATS",
    "HF_HUB_OFFLINE",  # as users have it: not set
    "XDG_CACHE_HOME",
)
ANSWER = [ROOT / "run.py", "--image", ROOT / "docs/digits.png", "--prompt", "What digits?", "--max-tokens", "3"]
OF_THE_LIBRARY = """
import pathlib, time
from {module} import onnxruntime_runner
import torch
path = pathlib.Path({engines!r})
onnxruntime_runner.open_session(path / "vision.onnx", torch.device("cpu"))
time.sleep(2)  # a report is not made at once
"""
REFUSING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *what) {
    int file = open(getenv("ATTEMPTS"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    dprintf(file, "%s\n", what);
    close(file);
}

int getaddrinfo(const char *host, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    note(host ? host : "no name");
    return EAI_FAIL;
}

int connect(int file, const struct sockaddr *address, socklen_t size) {
    int (*system_connect)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    if (address->sa_family != AF_INET && address->sa_family != AF_INET6) return system_connect(file, address, size);
    note("connect");
    errno = ENETUNREACH;
    return -1;
}
"""


@pytest.fixture(scope="module")
def refusing(tmp_path_factory) -> Path:
    """A library in the place of libc's calls, for C++ code as for Python: it notes what is tried and refuses it."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("calls of C++ code can be watched on Linux with a C compiler alone")
    folder = tmp_path_factory.mktemp("refusing")
    (folder / "refusing.c").write_text(REFUSING)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "refusing.so", "refusing.c", "-ldl"], cwd=folder, check=True)
    return folder / "refusing.so"


class Watched:
    """Runs Python with a fresh home and no network."""

    def __init__(self, folder: Path, refusing: Path) -> None:
        self.folder, self.home, self.attempts = folder, folder / "home", folder / "attempts"
        self.home.mkdir()
        self.environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {
            "HOME": str(self.home),
            "LD_PRELOAD": str(refusing),
            "ATTEMPTS": str(self.attempts),
            "PYTHONPATH": str(ROOT),
        }

    def run(self, *arguments: object, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def traces(self) -> list[str]:
        """Hosts that were asked for, and what lies in the home now."""
        tried = self.attempts.read_text().splitlines() if self.attempts.exists() else []
        return tried + sorted(str(path.relative_to(self.home)) for path in self.home.rglob("*"))


@pytest.fixture
def watched(tmp_path, refusing) -> Watched:
    return Watched(tmp_path, refusing)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_command_reports_nothing(watched, backend):
    model = write_checkpoint(watched.folder / "model")
    assert watched.run(*ANSWER, "--model", model, "--backend", backend, "--precision", "fp32")
    assert watched.traces() == []


@pytest.mark.parametrize("module", ["qwen2vl_trt.runtime.backends", "qwen2vl_trt.accuracy.engine_runner"])
def test_the_library_reports_nothing(watched, untied_model, module):
    watched.run("-c", OF_THE_LIBRARY.format(module=module, engines=str(untied_model.engines)))
    assert watched.traces() == []


def test_a_report_would_be_seen(watched):
    """Of C++ code as of Python: both resolve names by libc."""
    code = (
        "import contextlib, pathlib, socket\n"
        "pathlib.Path.home().joinpath('id').touch()\n"
        "with contextlib.suppress(OSError):\n"
        "    socket.create_connection(('host.invalid', 80))"
    )
    watched.run("-c", code)
    assert watched.traces() == ["host.invalid", "id"]


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    opt_out()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_other_libraries_read_that_it_is_off(watched):
    pytest.importorskip("ray", reason="Ray is not installed: the ray extra")
    asked = (
        "import qwen2vl_trt\n"
        "from huggingface_hub import constants\n"
        "from ray._common.usage import usage_lib\n"
        "print(constants.HF_HUB_DISABLE_TELEMETRY, usage_lib.usage_stats_enabled())"
    )
    assert watched.run("-c", asked) == "True False\n"
    assert watched.run("-c", asked, HF_HUB_DISABLE_TELEMETRY="0", RAY_USAGE_STATS_ENABLED="1") == "False True\n"
