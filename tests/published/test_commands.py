"""The commands on a published checkpoint in the hub's cache, by its alias, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file

from qwen2vl_trt.commands import call

ROOT = Path(__file__).resolve().parent.parent.parent
LIMITS = ["--min-hw-dims", "16", "--max-hw-dims", "1024", "--max-batch-size", "2", "--max-num-seqs", "2"]
LIMITS += ["--max-input-len", "600", "--max-seq-len", "700"]


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def built(request, published, tmp_path_factory):
    """Engines of the alias; those of torch are built by a process that finds the cache by the environment."""
    folder = tmp_path_factory.mktemp("commands")
    options = ["--model", "Qwen2.5-VL-3B", "--backend", request.param, "--precision", "fp32", *LIMITS]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if request.param == "torch":
            environment = os.environ | {"HF_HUB_CACHE": str(published.cache), "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, ROOT / "build_engines.py", *options]
            subprocess.run(command, env=environment, check=True, timeout=600)
        else:
            patch.setattr(constants, "HF_HUB_CACHE", str(published.cache))
            call("build", options)
    return folder / "artifacts" / f"Qwen2.5-VL-3B-{request.param}-fp32"


@pytest.fixture
def run(built, capsys):
    """Runs a command of ``run.py`` over the engines; gives its stdout."""

    def run(name, *options):
        call(name, list(map(str, options)))
        return capsys.readouterr().out

    return run


def test_the_links_of_the_cache_are_hard_linked_files(built, published):
    """Weights are not copied out of the cache, and no symbolic link is left."""
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert not (built / name).is_symlink()
        assert (built / name).stat().st_ino == (published.snapshot / name).resolve().stat().st_ino


PICTURE = ("--image", ROOT / "docs" / "digits.png")


def test_an_answer(built, run):
    out = run("generate", "--engine-dir", built, *PICTURE, "--prompt", "What?", "--max-tokens", "3", "--json")
    assert len(json.loads(out)["token_ids"]) == 3


def test_inspect(built, run):
    out = run("inspect", built)
    assert "Qwen2.5-VL-3B" in out
    assert "600" in out


def test_features(built, run, tmp_path):
    output = tmp_path / "features.safetensors"
    run("features", "--engine-dir", built, *PICTURE, "--output", output, "--pool", "mean")
    (values,) = load_file(output).values()
    assert values.shape == (256,)


@pytest.mark.parametrize("built", ["onnxruntime"], indirect=True)
def test_compare(built, run):
    run("compare", "--engine-dir", built, *PICTURE, "--prompt", "What?", "--max-tokens", "2")
