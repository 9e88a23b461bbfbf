"""Without --precision the torch backend takes on a CPU what that multiplies well."""

import argparse
import logging
from pathlib import Path
from statistics import median

import pytest
import torch

from qwen2vl_trt.building.plan import BuildRequest, plan_build
from qwen2vl_trt.commands.options import add_build_arguments
from qwen2vl_trt.engines import precision as precision_module
from qwen2vl_trt.engines.backends import find_backend


def planned(*options: str) -> tuple[str, Path]:
    parser = argparse.ArgumentParser()
    add_build_arguments(parser)
    plan = plan_build(
        BuildRequest.from_arguments(parser.parse_args(["--model", "tiny", "--backend", "torch", *options]))
    )
    return plan.precision, plan.folder


@pytest.fixture(params=[(0.3, "bf16"), (2.0, "bf16"), (7.0, "fp32")])
def cpu(request, monkeypatch) -> str:
    """The precision that suits a CPU on which BF16 takes so many times as long."""
    slowdown, precision = request.param
    monkeypatch.setattr(precision_module, "bf16_slowdown", lambda: slowdown)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return precision


def test_precision_and_folder_follow_the_cpu_and_one_line_says_so(cpu, caplog):
    caplog.set_level(logging.INFO)
    assert planned() == (cpu, Path(f"artifacts/tiny-torch-{cpu}"))
    (record,) = caplog.records
    assert record.levelno == (logging.WARNING if cpu == "fp32" else logging.INFO)  # the commands show warnings
    assert record.getMessage().startswith(f"precision {cpu}: ")
    assert "--precision" in record.getMessage()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_precision_that_is_given_is_taken_without_a_word(cpu, caplog, precision):
    assert planned("--precision", precision) == (precision, Path(f"artifacts/tiny-torch-{precision}"))
    assert not caplog.records


def test_a_gpu_has_bf16(cpu, caplog, monkeypatch):
    assert planned("--device", "cuda:1")[0] == "bf16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert planned()[0] == "bf16"
    assert not caplog.records
    assert planned("--device", "cpu")[0] == cpu


def test_other_backends_keep_their_first(cpu, caplog):
    assert find_backend("onnxruntime", None)[1] == "fp32"
    assert not caplog.records


def test_measuring_tells_emulation_from_instructions():
    has = torch.cpu.get_capabilities()
    fast = has.get("avx512_bf16") or has.get("amx_bf16")
    if has["architecture"] != "x86_64" or (not fast and (has["avx512_f"] or has["avx_ne_convert"])):
        pytest.skip("whether BF16 is fast on this CPU is not known beforehand")
    threads = torch.get_num_threads()
    emulated = median(precision_module.bf16_slowdown.__wrapped__() for _ in range(5)) >= precision_module._EMULATED
    assert emulated == (not fast)
    assert torch.get_num_threads() == threads
