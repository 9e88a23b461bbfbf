"""The benchmarks' branches of a GPU, on the tiny model: that they run and what they report. Skipped without one."""

import json

import pytest
import torch

import qwen2vl_trt.benchmarks.bench
import qwen2vl_trt.benchmarks.operators
from qwen2vl_trt.benchmarks.roofline import measure_rates
from qwen2vl_trt.benchmarks.timeline import CALLERS_STREAM, SIDE_STREAM
from qwen2vl_trt.commands import call
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.hub import resolve_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

PROFILE = BuildProfile(
    min_hw_dims=4, max_hw_dims=1024, max_batch_size=4, max_num_seqs=4, max_input_len=512, max_seq_len=1024
)
FEW = ("--warm-up", "10", "--duration", "0.1", "--iterations", "3", "--json")
OF_A_GPU = {"latency", "enqueue", "h2d", "compute", "d2h"}


class Here:
    """A worker without a process, which costs seconds of imports."""

    def __init__(self, name, setup):
        self._target = setup()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def call(self, method, *arguments):
        return getattr(self._target, method)(*arguments)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    build_engines(resolve_model("tiny"), *find_backend("torch", "bf16"), PROFILE, folder)
    return folder


@pytest.fixture
def bench(engines, monkeypatch, capsys, tmp_path):
    """Runs a command in a folder of its own; gives its JSON."""
    monkeypatch.chdir(tmp_path)
    for module in (qwen2vl_trt.benchmarks.bench, qwen2vl_trt.benchmarks.operators):
        monkeypatch.setattr(module, "Worker", Here)

    def run(*arguments):
        call("bench", [*arguments, "--engine-dir", str(engines), *FEW])
        return json.loads(capsys.readouterr().out)

    return run


def measured(result):
    return {figure for figure, values in result["ours"]["milliseconds"].items() if values}


@pytest.mark.parametrize("option", [(), ("--use-cuda-graph",), ("--streams", "2")], ids=["plain", "graph", "streams"])
def test_vision(bench, option):
    (result,) = bench("vision", "--shapes", "112x140,56x56", *option)["results"]
    assert measured(result) == OF_A_GPU


def test_decoder_and_its_kernels(bench, tmp_path, caplog):
    (result,) = bench("decoder", "--shapes", "batch:2,prompt:16,generate:8", "--export-profile", "p.json")["results"]
    assert {"prefill", "time_between_tokens", "compute"} <= measured(result)
    (case,) = json.loads((tmp_path / "p.json").read_text())
    names = [operator["name"] for operator in case["operators"]]
    assert names
    assert not [name for name in names if name.startswith("aten::")], "an operator's time is that of its kernels"
    assert not caplog.records  # graphs were captured


def test_pipeline_and_its_timeline(bench, tmp_path, caplog):
    (result,) = bench("pipeline", "--shapes", "84x84,batch:2,generate:6", "--trace", "t.json")["results"]
    assert sum(result["ours"]["shares"].values()) == pytest.approx(1)
    tracks = {
        event["args"]["name"]
        for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert {CALLERS_STREAM, SIDE_STREAM} <= tracks  # decoding, and vision beside it
    assert not caplog.records


def test_rates():
    rates = measure_rates(torch.device("cuda"), torch.bfloat16)
    assert rates.gemm > 0
    assert (rates.fp8_gemm is not None) == (torch.cuda.get_device_capability() >= (8, 9))
