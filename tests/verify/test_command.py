"""``run.py verify`` as a user meets it: the table, the two files, what a failure, Ctrl-C and the minutes do to them."""

import errno
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from filelock import FileLock

from qwen2vl_trt import published
from qwen2vl_trt.benchmarks.measure import Until
from qwen2vl_trt.benchmarks.roofline import Rates
from qwen2vl_trt.engines.backends import BACKENDS
from qwen2vl_trt.errors import BenchmarkError, ExecutionError
from qwen2vl_trt.verify import report as reports
from qwen2vl_trt.verify import speed, verification
from qwen2vl_trt.verify.finding import Finding
from tests.support.models import SMALL_SHAPE

ROOT = Path(__file__).resolve().parents[2]
TORCH = {"torch": BACKENDS["torch"]}
KERNELS = ("fused_attention", "fp8_products", "preprocessor", "decode_graphs", "overlap")
PASSED = Finding("passed", "yes", 1.5, "units")


class Here:
    """A worker without a process; it keeps the deadlines of its calls."""

    deadlines: ClassVar[list[float]] = []
    pickles = False

    def __init__(self, name, setup):
        self.deadline, self._setup, self._target = None, setup, None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._target = None

    def call(self, method, *arguments):
        self.deadlines.append(self.deadline)
        self._target = self._target or self._through_pickle(self._setup)()
        return self._through_pickle(getattr(self._target, method)(*self._through_pickle(arguments)))

    def _through_pickle(self, value):
        return pickle.loads(pickle.dumps(value)) if self.pickles else value


@pytest.fixture
def verify(command, monkeypatch, tmp_path):
    """Run the command with the torch backend alone and workers without processes: exit code, stdout, stderr, JSON."""
    monkeypatch.setattr(verification, "BACKENDS", TORCH)
    monkeypatch.setattr(verification, "Worker", Here)
    monkeypatch.setattr(Here, "deadlines", [])

    def run(*options):
        code, out, errors = command("verify", "--device", "cpu", "--output-dir", tmp_path / "out", *options)
        return code, out, errors, json.loads((tmp_path / "out" / "verify.json").read_text())

    return run


@pytest.fixture
def instant(monkeypatch):
    """Checks that take no time; what is left is who is asked, and when."""
    for name in KERNELS:
        monkeypatch.setattr(verification.kernels, name, lambda *given: PASSED)
    rates = Rates(copy=1e10, read={1 << 20: 1e10}, gemm=1e11, fp8_gemm=None)
    monkeypatch.setattr(verification, "build_tiny", lambda *given: PASSED)
    monkeypatch.setattr(verification, "compare_tiny", lambda *given: PASSED)
    monkeypatch.setattr(verification, "measure_rates", lambda device, dtype: rates)
    monkeypatch.setattr(verification, "requests_per_second", lambda *given: {1: 2.0, 8: 9.0})
    monkeypatch.setattr(verification.speed, "deepest", lambda *given: Finding("skipped", speed.NO_ROOM))


def rows(report):
    return {check["check"]: check for check in report["checks"]}


def test_everything_is_measured(verify, small_shapes, monkeypatch, tmp_path):
    monkeypatch.setattr(Here, "pickles", True)  # as what goes to a process and comes back
    monkeypatch.setattr(verification, "CLIENTS", [1, 3])
    monkeypatch.setattr(verification, "_SECONDS", 0.1)
    monkeypatch.setattr("qwen2vl_trt.benchmarks.roofline._SIZES", (1 << 20, 1 << 22))
    monkeypatch.setattr("qwen2vl_trt.benchmarks.roofline._PRODUCTS", ((64, 256, 256),))
    monkeypatch.setattr(speed, "UNTIL", Until(None, 0.0, 1))
    monkeypatch.setattr(speed, "_DEPTHS", (2,))
    code, out, errors, report = verify("--minutes", "600")
    assert (code, errors) == (0, "")
    found = rows(report)
    figures = [name for name, row in found.items() if row["result"] == "measured"]
    tiny = f"tiny, torch {found_precision(found)}"
    assert figures == [
        *("copy", "matrix product, float32", "matrix product, bfloat16"),
        *(name for name in found if name.startswith("tiny") and "client" in name),
        "scheduler: host time of a step",
        *("3B, 2 layers: vision, 1 of 448x448", "3B, 2 layers: prefill of 128 tokens"),
        *("3B, 2 layers: decode, batch 1", "3B, 2 layers: decode, batch 4"),
    ]
    assert {f"{tiny}: 1 client", f"{tiny}: 3 clients"} <= set(figures)
    assert min(found[name]["value"] for name in figures) > 0
    assert [row["result"] for name, row in found.items() if name not in figures and name != "GPU"] == ["passed"] * (
        len(found) - len(figures) - 1
    )
    for name in figures[-4:]:
        assert found[name]["share"] > 0
        assert found[name]["limit"] in ("memory", "arithmetic")
    assert not any(row["share"] for name, row in found.items() if name not in figures[-4:])
    check_schema(report)
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(found)
    page = (tmp_path / "out" / "verify.md").read_text()
    assert page.startswith("## `run.py verify`: ")
    assert [line for line in page.splitlines() if line.startswith("|")] == table
    assert "    run.py verify --device cpu" in page
    assert torch.__version__ in page
    assert out.startswith(f"{report['machine']['cpu']}, ")


@pytest.fixture
def small_shapes(monkeypatch):
    monkeypatch.setitem(published.SHAPES, "Qwen2.5-VL-3B", SMALL_SHAPE)
    for name, value in (("hidden_size", 160), ("num_heads", 2), ("intermediate_size", 64)):
        monkeypatch.setitem(published.VISION, name, value)


def found_precision(found):
    """Of the torch backend on this CPU."""
    return "bf16" if "tiny, torch bf16: build" in found else "fp32"


def check_schema(report):
    """As the docstring of report.py has it."""
    top = {
        **{"format": int, "command": list, "interrupted": bool, "minutes": float, "seconds": float, "device": str},
        **{"machine": dict, "checks": list},
    }
    of_check = {
        **{"check": str, "result": str, "words": str, "value": (int, float, type(None)), "unit": str},
        **{"share": (float, type(None)), "limit": str, "seconds": float, "warnings": list},
    }
    assert report["format"] == 1
    for kinds, entry in [(top, report), *((of_check, check) for check in report["checks"])]:
        assert entry.keys() == kinds.keys()
        assert not [name for name, kind in kinds.items() if not isinstance(entry[name], kind)]
    assert {check["result"] for check in report["checks"]} <= {"passed", "measured", "skipped", "failed"}


def test_a_failure_is_a_row_and_the_others_go_on(verify, instant, monkeypatch):
    def broken(*given):
        raise ExecutionError("CUDA error: an illegal memory access\nwas met")

    monkeypatch.setattr(verification.kernels, "fp8_products", broken)
    monkeypatch.setattr(verification.kernels, "overlap", lambda *given: Finding("failed", "3 differ"))
    monkeypatch.setattr(verification, "requests_per_second", lambda *given: 1 / 0)
    code, out, errors, report = verify()
    assert (code, errors) == (1, "")
    failed = {name: row["words"] for name, row in rows(report).items() if row["result"] == "failed"}
    requests = [name for name in failed if name.endswith("requests")]  # one, or two where the CPU has BF16
    assert 1 <= len(requests) <= 2
    assert list(failed) == ["FP8 products", "overlap", *requests]
    assert [*failed.values()] == [
        "CUDA error: an illegal memory access",
        "3 differ",
        *["ZeroDivisionError: division by zero"] * len(requests),
    ]
    assert out.count("| failed: ") == len(failed)
    assert rows(report)["decode steps"]["result"] == "passed"
    check_schema(report)


def test_engines_that_are_not_built_are_not_asked(verify, instant, monkeypatch):
    monkeypatch.setattr(verification, "build_tiny", lambda *given: 1 / 0)
    code, _, _, report = verify()
    found = rows(report)
    assert code == 1
    assert [found[name]["result"] for name in ("decode steps", "overlap", "3B")] == ["skipped"] * 3
    assert not [name for name in found if name.endswith(("accuracy", "client"))]


def test_what_is_logged_as_a_warning_is_told(verify, instant, monkeypatch):
    def warns(*given):
        verification.logging.getLogger("qwen2vl_trt.runtime").warning("decoding goes on\nwithout CUDA graphs")
        return PASSED

    monkeypatch.setattr(verification.kernels, "decode_graphs", warns)
    code, out, _, report = verify()
    assert code == 0
    assert rows(report)["decode steps"]["warnings"] == ["decoding goes on without CUDA graphs"]
    assert "| passed: yes; warned: decoding goes on without CUDA graphs | 1.50 units" in out


def test_a_gpu_is_asked_for_what_it_is_for(instant, monkeypatch, tmp_path):
    """The order and the arguments of checks there, none of which runs."""
    asked = []
    for name in KERNELS:
        monkeypatch.setattr(
            verification.kernels, name, lambda *given, name=name: asked.append((name, *given)) or PASSED
        )
    monkeypatch.setattr(verification, "Worker", Here)
    facts = {"gpus": [{"name": "NVIDIA L4", "memory_bytes": 24e9, "compute_capability": "8.9"}] * 2}
    monkeypatch.setattr(verification, "environment", lambda device: facts)
    places = {"torch": ("2", "cuda:1", ["bf16", "fp32"]), "onnxruntime": ("1", "cpu", ["fp32"])}
    missing = Finding("skipped", "not installed")
    monkeypatch.setattr(verification, "where_it_runs", lambda name, device: places.get(name, missing))

    def deepest(*given):
        asked.append(given)
        return Finding("skipped", speed.NO_ROOM)

    monkeypatch.setattr(verification.speed, "deepest", deepest)
    report = verification.Report(["run.py", "verify"], 8.0, "cuda:1")
    verification.Verification(report, lambda row: None, tmp_path, wants_gpu=True).run()
    gpu = torch.device("cuda", 1)
    folders = [tmp_path / f"torch-{precision}" for precision in ("fp32", "bf16")]
    assert asked[:-2] == [
        *((name, gpu) for name in KERNELS[:3]),
        *((name, folder, gpu) for folder in folders for name in KERNELS[3:]),
    ]
    assert [(name, precision.name) for name, precision, *_ in asked[-2:]] == [
        ("Qwen2.5-VL-3B", "bf16"),  # torch's on the GPU, whatever ONNX Runtime does on the CPU
        ("Qwen2.5-VL-7B", "bf16"),
    ]
    assert {given[6] for given in asked[-2:]} == {0.9 * 24e9}
    assert asked[-2][5] == pytest.approx(asked[-1][5] / 2, rel=0.01)  # the first leaves time for the second
    assert not report.failed
    assert [row.name for row in report.rows if row.finding.words == speed.NO_ROOM] == ["3B", "7B"]


@pytest.mark.parametrize(("load", "said"), [(9.5, True), (1.5, False)])
def test_other_processes_are_named(load, said):
    machine = {"cpu": "EPYC", "cores": 2, "threads": 2, "load": load, "memory_bytes": 4e9, "gpus": []}
    lines = list(reports.facts(machine | {"instruction_sets": ["avx2"]}))
    assert lines[0] == "EPYC, 2 cores, 4 GB; avx2"
    assert ("load 9.5 on 2 threads: other processes took part, figures are low" in lines) == said


class Clock:
    """Seconds that pass where a check says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(verification.time, "monotonic", lambda: self.now)

    def spend(self, seconds, found=PASSED):
        def check(*given):
            self.now += seconds
            if isinstance(found, Exception):
                raise found
            return found

        return check


def test_what_does_not_fit_the_minutes_is_skipped(verify, instant, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(verification.kernels, "fused_attention", clock.spend(56.0))
    code, out, _, report = verify("--minutes", "1")
    found = rows(report)
    assert code == 0
    names = list(found)
    after = names[names.index("fused attention") + 1 :]
    unmeasured = "the matrix product was not measured"  # for lack of time, which that row says
    assert [found[name]["words"] for name in after] == ["no time left"] * (len(after) - 1) + [unmeasured]
    assert out.count("| skipped: no time left ") == len(after) - 1
    assert report["seconds"] == 56.0
    assert max(Here.deadlines) == pytest.approx(72)  # whatever a check does, the minutes are kept within a quarter


def test_a_check_that_is_stopped_for_the_minutes_has_not_failed(verify, instant, monkeypatch):
    clock = Clock(monkeypatch)
    slow = BenchmarkError("this check was stopped")
    monkeypatch.setattr(verification.kernels, "fp8_products", clock.spend(10.0, slow))
    monkeypatch.setattr(verification.kernels, "preprocessor", clock.spend(62.0, slow))
    _, _, _, report = verify("--minutes", "1")
    found = rows(report)
    assert (found["FP8 products"]["result"], found["FP8 products"]["words"]) == ("failed", str(slow))
    assert found["preprocessor"]["result"] == "skipped"
    assert found["preprocessor"]["words"] == "no time left after 62 s of it"


def test_an_interrupt_writes_what_there_is(verify, instant, monkeypatch, tmp_path):
    def interrupts(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(verification.kernels, "preprocessor", interrupts)
    code, _, errors, report = verify()
    assert (code, errors) == (130, "interrupted\n")
    assert report["interrupted"]
    assert list(rows(report))[-1] == "FP8 products"
    assert "Interrupted after " in (tmp_path / "out" / "verify.md").read_text()


def test_a_report_that_cannot_be_written_is_known_before_the_checks(command, instant, monkeypatch, tmp_path):
    def full(path, *content, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    asked = []
    monkeypatch.setattr(verification, "environment", asked.append)
    monkeypatch.setattr(Path, "write_text", full)
    code, _, errors = command("verify", "--device", "cpu", "--output-dir", tmp_path)
    assert (code, errors) == (2, f"error: {tmp_path / 'verify.json'}: No space left on device\n")
    assert not asked


def test_two_runs_in_one_folder(command, instant, tmp_path):
    with FileLock(tmp_path / ".verify.lock"):
        code, _, errors = command("verify", "--device", "cpu", "--output-dir", tmp_path)
    message = f"error: {tmp_path}: another verify writes there; wait for it, or give another --output-dir\n"
    assert (code, errors) == (2, message)
    assert not (tmp_path / "verify.json").exists()


def test_with_processes_and_little_time(tmp_path):
    """Real workers; how many checks fit depends on the machine."""
    command = [sys.executable, str(ROOT / "run.py"), "verify", "--device", "cpu", "--minutes", "0.1"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "verify.json").read_text())
    check_schema(report)
    assert report["seconds"] <= time.monotonic() - began
    found = rows(report)
    assert found["3B"]["result"] == "skipped"  # building engines for it takes more than these 6 seconds
    assert "skipped: no time left" in done.stdout
    assert done.stdout.endswith("; verify.json, verify.md\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--minutes", "0"), "--minutes: '0' is not a number above 0"),
        (("--minutes", "inf"), "--minutes"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--output-dir", "/dev/null"), "a folder is needed"),
        (("--output-dir", "/proc/none"), "/proc/none: "),
    ],
)
def test_wrong_options_are_one_line(command, options, message):
    code, out, errors = command("verify", *options)
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert message in errors
