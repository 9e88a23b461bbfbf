"""``run.py bench`` as a user meets it. No figure is compared with a time: only with the other figures of its run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import run
from qwen2vl_trt.benchmarks import bench as run_bench
from qwen2vl_trt.commands import process
from qwen2vl_trt.commands.process import run_command
from qwen2vl_trt.engines import progress
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import BenchmarkError, BuildError
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.plots import color_of

ROOT = Path(__file__).resolve().parent.parent.parent
PROFILE = BuildProfile(
    min_hw_dims=4, max_hw_dims=200, max_batch_size=2, max_num_seqs=2, max_input_len=100, max_seq_len=140
)
FEW = ("--warm-up", 0, "--duration", 0, "--iterations", 2)
SHAPES = ("--shapes", "112x140,56x56", "batch:2,prompt:9,generate:4", "56x84,batch:2,generate:3")
FIGURES = {"count", "min", "max", "mean", "median", "p90", "p95", "p99"}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Folders of the tiny model's engines, by backend."""
    folder = tmp_path_factory.mktemp("engines")
    for backend in ("torch", "onnxruntime"):
        chosen, precision = find_backend(backend, "fp32")
        build_engines(resolve_model("tiny"), chosen, precision, PROFILE, folder / backend)
    return folder


@pytest.fixture
def bench(small_rates, monkeypatch, capfd, tmp_path):
    """Run the command in a folder of its own; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "LINE_SECONDS", 1e6)  # no line on stderr however slow the machine is

    def bench(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_command(run.main)
        found = capfd.readouterr()
        return ended.value.code or 0, found.out, found.err

    return bench


def check_consistent(result, found):
    """What follows from the definitions, whatever the machine."""
    iterations, seconds = found["iterations"], found["seconds"]
    per_second, *others = found["throughput"].values()
    assert iterations >= 2
    assert per_second * seconds == pytest.approx(iterations)
    latency = found["milliseconds"]["latency"]
    assert latency["count"] == iterations
    for values in found["milliseconds"].values():
        if values is not None:
            assert values.keys() == FIGURES
            assert 0 < values["min"] <= values["median"] <= values["p90"] <= values["p95"] <= values["p99"]
            assert values["p99"] <= values["max"]
            assert values["min"] <= values["mean"] <= values["max"]
    at_once = result["batch"] if result["stage"] == "pipeline" else result["streams"]
    assert latency["mean"] * iterations <= 1e3 * seconds * at_once * 1.001
    for name in ("enqueue", "h2d", "compute", "d2h"):
        assert found["milliseconds"][name] is None  # not 0: there are no CUDA events
    assert found["memory_bytes"]["host"] > 50e6
    assert found["memory_bytes"]["device"] is None
    return per_second, others


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_all_stages_are_measured(no_processes, bench, engines, backend, tmp_path):
    """Transformers takes part once. Real processes are those of the tests that stream and that interrupt."""
    traces = ("--trace", "trace.json", "--trace-plot", "trace.png")
    baseline = ("--against", "transformers", "--plot", "p.png") if backend == "torch" else traces
    code, out, errors = bench(
        "--engine-dir", engines / backend, *FEW, *SHAPES, *baseline, "--json", "--export-times", "t.json"
    )
    assert (code, errors) == (0, "")
    report = json.loads(out)
    assert report["command"][:2] == ["run.py", "bench"]
    assert (report["engines"]["backend"], report["engines"]["device"]) == (backend, "cpu")
    assert report["machine"]["torch"] == torch.__version__
    assert min(report["rates"]["copy_bytes_per_second"], report["rates"]["gemm_flops_per_second"]) > 0
    vision, decoder, more_images, pipeline = report["results"]  # two images are a vision call and a request
    assert more_images["shape"] == "112x140,56x56,batch:1,generate:32"

    assert (vision["stage"], vision["shape"], vision["patches"]) == ("vision", "112x140,56x56", 8 * 10 + 16)
    queries, (images,) = check_consistent(vision, vision["ours"])
    assert images == pytest.approx(2 * queries)

    queries, (tokens, decoding) = check_consistent(decoder, decoder["ours"])
    answers = decoder["ours"]["iterations"]
    times = decoder["ours"]["milliseconds"]
    assert tokens == pytest.approx(2 * 4 * queries)
    assert times["time_to_first_token"]["count"] == times["prefill"]["count"] == 2 * answers
    assert times["time_between_tokens"]["count"] == 3 * answers
    assert decoding == pytest.approx(2e3 / times["time_between_tokens"]["mean"])
    # An answer is both prompts, one after the other, and then three tokens.
    parts = 2 * times["prefill"]["mean"] + 3 * times["time_between_tokens"]["mean"]
    assert parts == pytest.approx(times["latency"]["mean"], rel=1e-6)

    requests, (tokens,) = check_consistent(pipeline, pipeline["ours"])
    assert tokens == pytest.approx(3 * requests)
    shares = pipeline["ours"]["shares"]
    assert set(shares) == {"preprocess", "vision", "prefill", "decode", "sampling", "host"}
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) > 0

    for result, figures in ((vision, {"latency"}), (decoder, {"prefill", "time_between_tokens"}), (pipeline, set())):
        assert set(result["roofline"]) == figures
        for figure, bound in result["roofline"].items():
            median = result["ours"]["milliseconds"][figure]["median"]
            assert bound["reached"] == pytest.approx(bound["ms"] / median)
            assert min(bound["flops"], bound["bytes"]) > 0

    exported = json.loads((tmp_path / "t.json").read_text())
    ours = [case for case in exported if not case["name"].startswith("Transformers")]
    assert [case["stage"] for case in ours] == ["vision", "decoder", "pipeline", "pipeline"]
    for result, case in zip(report["results"], ours):
        latencies = sorted(sample["latencyMs"] for sample in case["iterations"])
        assert len(latencies) == result["ours"]["iterations"]
        assert latencies[-1] == result["ours"]["milliseconds"]["latency"]["max"]
    assert len(ours[1]["iterations"][0]["timeBetweenTokensMs"]) == 3
    if backend != "torch":
        titles = [event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
        assert {"load", "preprocess", "vision", "prefill chunk", "decode step", "sample", "request 2"} < set(titles)
        assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
        assert [result["baseline"] for result in report["results"]] == [None] * 4
        return
    assert report["machine"]["transformers"]
    assert len(exported) == 8
    for result in report["results"]:
        check_baseline(result)
    assert {"time_between_tokens", "time_to_first_token"} < set(decoder["ratios"])
    pixels = set(map(tuple, np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).reshape(-1, 3).tolist()))
    assert {tuple(bytes.fromhex(color_of(name)[1:])) for name in ("torch", "Transformers")} < pixels


def check_baseline(result):
    ours, baseline = result["ours"], result["baseline"]
    check_consistent(result, baseline)
    assert baseline["name"] == "Transformers fp32"
    assert baseline["how"] in ("batched", "one at a time", "one request")
    unit = next(iter(ours["throughput"]))
    assert result["ratios"][unit] == pytest.approx(ours["throughput"][unit] / baseline["throughput"][unit])
    theirs, median = (each["milliseconds"]["latency"]["median"] for each in (baseline, ours))
    assert result["ratios"]["latency"] == pytest.approx(theirs / median)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt, 130, "interrupted\n"),
        (BenchmarkError("it died"), 2, "error: it died\n"),
        (OSError(28, "full", "a"), 1, "error: a: full\n"),
    ],
)
def test_what_was_measured_is_not_lost(no_processes, bench, engines, monkeypatch, tmp_path, error, code, said):
    """Ctrl-C, or a system that dies, in the third shape of four."""
    measure, measured = run_bench.measure, []

    def ended(case, *given):
        if len(measured) == 2:
            raise error
        measured.append(case)
        return measure(case, *given)

    monkeypatch.setattr(run_bench, "measure", ended)
    options = (
        "--json",
        "--export-times",
        "t.json",
        "--plot",
        "p.png",
        "--trace",
        "trace.json",
        "--trace-plot",
        "t.png",
    )
    monkeypatch.setattr(process, "_discard_output", lambda: None)  # it would discard what capfd holds
    found, out, errors = bench("--engine-dir", engines / "torch", *FEW, *SHAPES, *options)
    assert (found, errors) == (code, said)
    report = json.loads(out)
    assert report["interrupted"]
    assert [result["stage"] for result in report["results"]] == ["vision", "decoder"]
    for result in report["results"]:
        check_consistent(result, result["ours"])
        assert not result["roofline"]  # the rates were not measured again
    assert [case["stage"] for case in json.loads((tmp_path / "t.json").read_text())] == ["vision", "decoder"]
    assert (tmp_path / "p.png").exists()
    assert not list(tmp_path.glob("t*.png")) + list(tmp_path.glob("trace*"))


def test_streams_and_a_full_disk(bench, engines):
    arguments = ("--shapes", "56x56", "--streams", 2, "--export-times", "/dev/full")
    code, out, errors = bench("vision", "--engine-dir", engines / "onnxruntime", *FEW, *arguments)
    assert (code, errors) == (2, "error: /dev/full: No space left on device\n")
    assert "vision 56x56 (16 patches), 2 streams" in out  # what was measured is not lost
    assert re.search(r"onnxruntime fp32: .* images/s; [2468] in", out)  # each of the two as often
    assert "enqueue, H2D, GPU compute, D2H: n/a" in out


@pytest.mark.parametrize(
    ("backend", "stage", "shape", "expected"),
    [
        ("onnxruntime", "vision", "56x56", {"Attention", "MatMul", "Gemm"}),
        ("torch", "pipeline", "56x56,batch:1,generate:2", {"torch"}),
    ],
)
def test_time_by_operator(no_processes, bench, engines, backend, stage, shape, expected, tmp_path):
    code, _, errors = bench(
        stage, "--engine-dir", engines / backend, *FEW, "--shapes", shape, "--export-profile", "profile.json"
    )
    assert (code, errors) == (0, "")
    (case,) = json.loads((tmp_path / "profile.json").read_text())
    operators = case["operators"]
    assert expected <= {operator["kind"] for operator in operators}
    assert sum(operator["percentage"] for operator in operators) == pytest.approx(100)
    times = [operator["milliseconds"] for operator in operators]
    assert times == sorted(times, reverse=True)
    if backend == "onnxruntime":
        attention = [operator for operator in operators if operator["kind"] == "Attention"]
        assert [operator["calls"] for operator in attention] == [3] * 4  # a block each; the preparing run is left out


WRONG = {
    ("--shapes", "448"): "--shapes 448: '448' is neither an image",
    ("vision", "--shapes", "448x448"): "image 1 (448x448) needs 256 patches; this engine takes 4 to 200",
    ("vision", "--shapes", "56x56x3"): "images of one call of 3; these engines take 2 (--max-batch-size)",
    ("decoder", "--shapes", "batch:3"): "batch of 3; these engines take 2 (--max-num-seqs)",
    ("decoder", "--shapes", "prompt:120"): "prompt of 120; these engines take 100 (--max-input-len)",
    ("decoder", "--shapes", "56x56"): "fits no stage",
    ("pictures",): "invalid choice: 'pictures'",
    ("--streams", "2"): "only the vision engine runs several calls at once",
    ("vision", "--streams", "0"): "--streams",
    ("vision", "--iterations", "0"): "--iterations",
    ("vision", "--duration", "-1"): "--duration",
    ("vision", "--duration", "nan"): "--duration",
    ("vision", "--use-cuda-graph"): "--use-cuda-graph needs a GPU; these engines run on cpu",
    ("vision", "--device", "cpu", "--decode", "gpu"): "(--decode gpu) needs a GPU",
    ("--against", "vllm"): "--against vllm: known is transformers",
    ("--against", "transformers:int4"): "--against transformers:int4",
    ("--layers", "2"): "--layers and --blocks cut a model of --random-weights",
    ("--random-weights",): "--random-weights needs a --model",
    ("--random-weights", "--model", "tiny"): "no shape of 'tiny' is known",
    ("--export-times", "none/t.json"): "none/t.json: there is no folder none",
    ("--export-profile", "."): "is a folder; give a file",
    ("--trace", "none/t.json"): "there is no folder none",
    ("decoder", "--trace", "t.json"): "--trace is a timeline of the pipeline; bench decoder has none",
    ("decoder", "--trace-plot", "t.png"): "--trace-plot is a timeline of the pipeline; bench decoder has none",
    ("--trace-plot", "none/t.png"): "there is no folder none",
    ("--plot", "none/p.png"): "there is no folder none",
    ("--plot", "plot.xyz"): "plot.xyz is no name of a picture; let it end in .png",
    ("--plot", "plot"): "plot is no name of a picture",
    ("--device", "cuda:99"): "cuda:99",
    ("--max-batch-size", "4"): "runs as it was built",
}


def assert_one_line(found, message):
    code, out, errors = found
    assert (code, out) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize(("arguments", "message"), WRONG.items(), ids=[" ".join(arguments) for arguments in WRONG])
def test_wrong_options_are_one_line(bench, engines, arguments, message):
    if "--model" not in arguments:
        arguments = ("--engine-dir", engines / "torch", *arguments)
    assert_one_line(bench(*arguments), message)


def test_fp8_is_quantised_as_for_every_command(bench, monkeypatch):
    def quantize(plan):
        raise BuildError(f"{plan.precision}, {plan.request.calibration_size} samples")

    monkeypatch.setattr("qwen2vl_trt.building.quantized_model.quantize_first", quantize)
    answer = bench("--model", "tiny", "--precision", "fp8", "--calibration-size", 4)
    assert_one_line(answer, "fp8, 4 samples")


@pytest.mark.parametrize("option", ["--plot", "--trace-plot"])
def test_a_missing_package_names_its_extra(bench, engines, monkeypatch, option):
    monkeypatch.setattr("qwen2vl_trt.errors.find_spec", lambda name: None)
    answer = bench("--engine-dir", engines / "torch", option, "p.png")
    assert_one_line(answer, "[bench]'")
    assert f"{option} needs matplotlib" in answer[2]
    monkeypatch.setattr("qwen2vl_trt.errors.find_spec", lambda name: None)
    needed = "needs torchvision, which is not installed: pip install -e"
    assert_one_line(bench("--engine-dir", engines / "torch", "--against", "transformers"), needed)
    assert_one_line(bench("comparisons"), needed)


def test_an_interrupt_ends_the_workers_too(engines, tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "run.py", "bench", "vision", "--engine-dir", engines / "torch", "--duration", "600"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    started = psutil.Process(process.pid)
    deadline = time.monotonic() + 120
    while not (children := started.children(recursive=True)):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors.decode().splitlines()[-1]) == (130, b"", "interrupted")  # after progress
    psutil.wait_procs(children, timeout=30)
    assert not any(child.is_running() for child in children)
    assert list(tmp_path.iterdir()) == []


def test_a_build_is_measured(bench, tmp_path):
    code, out, errors = bench("build", "--model", "tiny", "--backend", "onnxruntime", "--precision", "fp32", "--json")
    assert (code, errors.count("\n"), errors.endswith(": built\n")) == (0, 1, True)
    found = json.loads(out)
    assert found["command"][:3] == ["run.py", "bench", "build"]
    assert found["time_s"] > 0
    assert found["peak_memory_mb"] >= found["of_it_after_the_imports_mb"] > 50
    assert min(found["vision.onnx_mb"], found["decoder.onnx_mb"]) > 0
    assert list(tmp_path.iterdir()) == []
    assert_one_line(bench("build", "--model", "tiny", "--layers", 2), "cut a model of --random-weights")
    assert_one_line(bench("build", "--model", "tiny", "--precision", "int3"), "int3")


def test_the_preprocessor_is_measured_where_it_is_named(no_processes, bench, engines):
    arguments = ("--shapes", "112x140,56x56", "56x84x3", "--against", "transformers", "--json")
    code, out, errors = bench("processor", "--engine-dir", engines / "torch", *FEW, *arguments)
    assert (code, errors) == (0, "")
    results = json.loads(out)["results"]
    assert [(result["stage"], result["shape"], result["patches"]) for result in results] == [
        ("processor", "112x140,56x56", 8 * 10 + 16),
        ("processor", "56x84x3", 3 * 4 * 6),  # more than the engine's batch: it is the preprocessor's alone
    ]
    for result in results:
        queries, (images,) = check_consistent(result, result["ours"])
        assert images == pytest.approx(
            len(result["shape"].split(",")) * queries if "," in result["shape"] else 3 * queries
        )
        check_baseline(result)
        bound = result["roofline"]["latency"]
        assert bound["limit"] == "memory"
    assert results[1]["roofline"]["latency"]["bytes"] == 3 * (3 * 56 * 84 + 24 * 1176 * 4)
