"""Checkpoints in the tiny model's layout with random weights, and engines built from them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig

import qwen2vl_trt.runtime.backends.tensorrt_runner
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.backends import BACKENDS, Backend, find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.manifest import BuiltFile, Manifest
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.engines.tensorrt_profiles import decoder_ranges, vision_ranges
from qwen2vl_trt.export import onnx_model
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.tiny.model import config_dict
from qwen2vl_trt.tiny.tokenizer import write_processor_files
from tests.support import fake_tensorrt
from tests.support.fake_cuda import FakeCuda
from tests.support.models import random_model, save_model

PROFILE = BuildProfile(
    min_hw_dims=4, max_hw_dims=180, max_batch_size=4, max_num_seqs=4, max_input_len=400, max_seq_len=700
)
BUILDS = (("torch", "fp32"), ("onnxruntime", "fp32"))


def installed_backends() -> list[Backend]:
    """Those whose packages are here."""
    return [backend for backend in BACKENDS.values() if find_spec(backend.package)]


def write_checkpoint(folder: Path) -> Path:
    """The tiny model's tokenizer, template, processor and widths, and half its depth; weights are random, in BF16."""
    config = config_dict(write_processor_files(folder)) | {"num_hidden_layers": 2, "max_window_layers": 2}
    config["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}
    model = random_model(Qwen2_5_VLConfig(**config))
    save_model(model, folder, torch.bfloat16, "published")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def build(checkpoint: str | Path, folder: Path, backend: str, precision: str = "fp32", profile: BuildProfile = PROFILE):
    """Build engines and return their folder."""
    chosen, precision = find_backend(backend, precision)
    build_engines(resolve_model(checkpoint), chosen, precision, profile, folder)
    return folder


def build_fake_tensorrt(checkpoint: Path, folder: Path) -> Path:
    """As the backend tensorrt leaves it, with plans for the fake runtime; in FP32, which it computes in."""
    folder.mkdir()
    opened = Checkpoint(checkpoint)
    onnx_model.export_onnx(opened, folder, torch.float32, PROFILE.max_seq_len)
    manifest = Manifest(
        model="random",
        model_hash=opened.hash,
        backend="tensorrt",
        precision="fp32",
        profile=PROFILE,
        files={},
        versions={"tensorrt": fake_tensorrt.VERSION},
    )
    write_plans(folder, manifest)
    return folder


def write_plans(folder: Path, manifest: Manifest, stripped: bool = False) -> None:
    """Plans of the fake runtime for the graphs in a folder, and its manifest."""
    config = Checkpoint(folder).config
    profiles = {"vision": (vision_ranges(PROFILE, config.vision),), "decoder": decoder_ranges(PROFILE)}
    for name, ranges in profiles.items():
        fake_tensorrt.write_plan(folder / f"{name}.engine", folder / f"{name}.onnx", ranges, stripped)
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The manifest, with the files as they are now."""
    files = [folder / f"{name}.{suffix}" for name in ("vision", "decoder") for suffix in ("onnx", "engine")]
    replace(manifest, files={file.name: BuiltFile.of(file) for file in files}).write(folder)


@contextmanager
def fake_tensorrt_runtime(name: str = "tensorrt") -> Iterator[type]:
    """Put the fake runtime in the place of TensorRT, or TensorRT for RTX, and of the GPU; yields its module.

    Fails at what a GPU might do in another order, see :class:`FakeCuda`.
    """
    module = fake_tensorrt.module(name)
    with pytest.MonkeyPatch.context() as monkeypatch, FakeCuda() as cuda:
        monkeypatch.setattr(Backend, "load", lambda self: module)
        monkeypatch.setattr(qwen2vl_trt.runtime.backends.tensorrt_runner, "CudaDevice", fake_tensorrt.CpuDevice)
        cuda.install(monkeypatch)
        yield module
