"""The commands on a published checkpoint in the hub's cache, by its alias, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LIMITS = ["--min-hw-dims", "16", "--max-hw-dims", "1024", "--max-batch-size", "2"]
LIMITS += ["--max-input-len", "600", "--max-seq-len", "700"]


@pytest.fixture(scope="module")
def run(published, tmp_path_factory):
    """Runs a command in a folder of its own with the cache as the hub's."""
    folder = tmp_path_factory.mktemp("commands")
    environment = os.environ | {"HF_HUB_CACHE": str(published.cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def command(*arguments):
        return subprocess.run(
            [sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    command.folder = folder
    return command


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def built(request, run):
    """Engines of the alias."""
    done = run(
        "build_engines.py", "--model", "Qwen2.5-VL-3B", "--backend", request.param, "--precision", "fp32", *LIMITS
    )
    assert done.returncode == 0, done.stderr
    return run.folder / "artifacts" / f"Qwen2.5-VL-3B-{request.param}-fp32"


def test_the_links_of_the_cache_are_hard_linked_files(built, published):
    """Weights are not copied out of the cache, and no symbolic link is left."""
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert not (built / name).is_symlink()
        assert (built / name).stat().st_ino == (published.snapshot / name).resolve().stat().st_ino


def test_an_answer(built, run):
    done = run(
        "run.py", "--engine-dir", built, "--image", ROOT / "docs" / "digits.png", "--prompt", "What?",
        "--max-tokens", "3", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 3


def test_inspect(built, run):
    done = run("run.py", "inspect", built)
    assert done.returncode == 0, done.stderr
    assert "Qwen2.5-VL-3B" in done.stdout
    assert "600" in done.stdout


def test_features(built, run, tmp_path):
    done = run(
        "run.py", "features", "--engine-dir", built, "--image", ROOT / "docs" / "digits.png", "--output",
        tmp_path / "features.safetensors", "--pool", "mean",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    (values,) = load_file(tmp_path / "features.safetensors").values()
    assert values.shape == (2048,)


def test_compare(built, run):
    picture = ("--image", ROOT / "docs" / "digits.png", "--prompt", "What?")
    done = run("run.py", "compare", "--engine-dir", built, *picture, "--max-tokens", "2")
    assert done.returncode == 0, done.stdout + done.stderr
