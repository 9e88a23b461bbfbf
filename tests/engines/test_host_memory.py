"""What a model needs of a CPU's memory is said before it is tried; nothing is allocated here."""

import logging
import math

import psutil
import pytest
import torch

import build_engines
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.commands.process import run_command
from qwen2vl_trt.engines import host_memory
from qwen2vl_trt.engines.backends import BACKENDS
from qwen2vl_trt.engines.host_memory import available_bytes, expected_bytes, warn_of_memory
from qwen2vl_trt.engines.precision import BF16, FP8, FP32, INT4
from qwen2vl_trt.quantized.linear import PackedWeight
from qwen2vl_trt.runtime.backends.runners import open_engines
from tests.support.engine_folders import build, write_checkpoint
from tests.support.models import model_config, random_model, save_model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request, tmp_path_factory):
    return Checkpoint(save_model(random_model(model_config(tied=request.param)), tmp_path_factory.mktemp("memory")))


def test_expected(checkpoint):
    sizes = {name: math.prod(checkpoint.locate(name).shape) for name in checkpoint.names}
    tied = checkpoint.config.text.tie_word_embeddings
    table = 96 * 64
    assert ("lm_head.weight" in sizes) == (not tied)
    weights = sum(sizes.values())
    assert expected_bytes(checkpoint, BACKENDS["torch"], BF16) == 2 * weights
    assert expected_bytes(checkpoint, BACKENDS["torch"], FP32) == 4 * weights
    in_graphs = weights if tied else weights - table
    assert expected_bytes(checkpoint, BACKENDS["onnxruntime"], FP32) == 4 * (in_graphs + max(sizes.values()))
    for backend, precision in (("tensorrt", BF16), ("onnxruntime", FP8), ("torch", FP8)):
        assert expected_bytes(checkpoint, BACKENDS[backend], precision) is None


def test_weights_of_few_bits(checkpoint, monkeypatch):
    """Packed ones take a half or a whole byte where they are computed with, and two where they are dequantised."""
    shapes = {name: checkpoint.locate(name).shape for name in checkpoint.names}
    kinds = {
        next(name for name in shapes if name.endswith(f"layers.0.mlp.{leaf}.weight") and "visual" not in name): kind
        for leaf, kind in (("up_proj", "int4"), ("down_proj", "int8"))
    }
    packed = {name: PackedWeight(shapes[name], torch.bfloat16, kind, lambda: None) for name, kind in kinds.items()}
    monkeypatch.setattr(checkpoint, "packed", packed)
    up, down = (math.prod(shapes[name]) for name in kinds)
    whole = expected_bytes(checkpoint, BACKENDS["torch"], BF16)
    assert expected_bytes(checkpoint, BACKENDS["torch"], INT4) == whole - 2 * (up + down) + up // 2 + down


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (0.99, "needs about 33.2 GB of memory on a CPU, and 32.9 GB are free here; --backend torch --precision bf16"),
        (0.6, "--precision bf16 needs about 16.6 GB and fits"),
        (0.1, "--precision bf16 needs about 16.6 GB and is the smallest"),
        (1.01, ""),
    ],
)
def test_what_does_not_fit_is_said_in_one_line_with_what_would(checkpoint, monkeypatch, caplog, free, said):
    needs = {"onnxruntime": 33_200_000_000, "torch": 16_600_000_000}
    monkeypatch.setattr(host_memory, "expected_bytes", lambda checkpoint, backend, precision: needs[backend.name])
    monkeypatch.setattr(host_memory, "available_bytes", lambda: int(free * needs["onnxruntime"]))
    with caplog.at_level(logging.WARNING):
        warn_of_memory(checkpoint, BACKENDS["onnxruntime"], FP32)
        warn_of_memory(checkpoint, BACKENDS["onnxruntime"], FP32)  # as a command that builds and then opens
    assert len(caplog.records) == bool(said)
    assert said in caplog.text


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(host_memory, "_said", set())


def test_the_smallest_is_given_no_advice(checkpoint, monkeypatch, caplog):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1)
    warn_of_memory(checkpoint, BACKENDS["torch"], BF16)
    assert caplog.records[0].getMessage().endswith("are free here")


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("0::/a/b", {"a/memory.max": "5000", "a/memory.current": "4000", "a/b/memory.max": "max"}),
        ("0::/elsewhere", {"memory.max": "5000", "memory.current": "4000"}),
        ("7:memory:/a", {"memory/a/memory.limit_in_bytes": "5000", "memory/a/memory.usage_in_bytes": "4000"}),
    ],
    ids=["parent", "container", "version 1"],
)
def test_a_control_group_limits_it(tmp_path, monkeypatch, line, files):
    """What the group's files take of it can be given back."""
    read = host_memory.Path.read_text

    def read_text(path, **options):
        return f"9:cpu:/x\n{line}\n" if str(path) == "/proc/self/cgroup" else read(path, **options)

    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
        (tmp_path / name).with_name("memory.stat").write_text("anon 7\ninactive_file 200\nactive_file 100\n")
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(host_memory.Path, "read_text", read_text)
    assert available_bytes() == 1300


def test_without_control_groups_the_machine_decides(monkeypatch, tmp_path):
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path)
    total = psutil.virtual_memory().total
    assert 0 < available_bytes() <= total


def test_before_a_build_and_before_opening(tmp_path, monkeypatch, caplog):
    model = write_checkpoint(tmp_path / "model")
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1_000_000)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = ["build_engines.py", "--model", str(model), "--engine-dir", str(tmp_path / "e"), "--backend", "torch"]
    monkeypatch.setattr("sys.argv", [*command, "--precision", "fp32"])
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as ended:
        run_command(build_engines.main)
    assert not ended.value.code
    assert caplog.text.count("model: backend torch in fp32 needs about") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit):
        run_command(build_engines.main)
    assert "needs about" not in caplog.text  # nothing is built
    open_engines(build(model, tmp_path / "o", "onnxruntime"), "cpu")
    assert caplog.text.count("of memory on a CPU") == 1  # as `run.py --model` builds and opens in one process
    host_memory._said.clear()
    open_engines(tmp_path / "o", "cpu")
    assert "o: backend onnxruntime in fp32 needs about" in caplog.text
