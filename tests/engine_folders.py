"""Checkpoints in the tiny model's layout with random weights, and engines built from them."""

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig

from engines.backends import BACKENDS, Backend, find_backend
from engines.build import build_engines
from engines.profile import BuildProfile
from qwen2vl_trt.hub import resolve_model
from tests.models import random_model, save_model
from tiny.model import config_dict
from tiny.tokenizer import write_processor_files

PROFILE = BuildProfile(min_hw_dims=4, max_hw_dims=180, max_batch_size=4, max_input_len=400, max_seq_len=700)
BUILDS = (("torch", "fp32"), ("onnxruntime", "fp32"))


def installed_backends() -> list[Backend]:
    """Those whose packages are here."""
    return [backend for backend in BACKENDS.values() if all(find_spec(package) for package in backend.packages)]


def write_checkpoint(folder: Path) -> Path:
    """The tiny model's tokenizer, template, processor and shape; its weights are random, in BF16."""
    config = config_dict(write_processor_files(folder))
    model = random_model(Qwen2_5_VLConfig(**config))
    save_model(model, folder, torch.bfloat16, "published")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def build(checkpoint: Path, folder: Path, backend: str, precision: str = "fp32", profile: BuildProfile = PROFILE):
    """Build engines and return their folder."""
    chosen, precision = find_backend(backend, precision)
    build_engines(resolve_model(checkpoint), chosen, precision, profile, folder)
    return folder
