"""A build's files take the place of older ones: whenever it is broken off, the old engines load or the new ones do."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines import staging
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.engines.staging import staged
from qwen2vl_trt.errors import BuildError, EngineError
from qwen2vl_trt.hub import ResolvedModel
from tests.support.models import model_config, random_model, save_model

REPOSITORY = Path(__file__).parents[2]
SHAPE = model_config(text={"num_hidden_layers": 1}, vision={"depth": 1, "fullatt_block_indexes": [0]})
KILLED = """
import os, signal, sys, tempfile
from pathlib import Path
from qwen2vl_trt.engines import staging
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.hub import ResolvedModel

calls, last = 0, int(sys.argv[1])

def count(event, arguments):  # every call that changes the file system
    global calls
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree") or (
        event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    ):
        if sys.argv[3] in str(arguments[0]):
            calls += 1
            if calls > last:
                os.kill(os.getpid(), signal.SIGKILL)

model, folder = ResolvedModel("random", Path(sys.argv[2])), Path(sys.argv[3])
backend, precision = find_backend("torch", "fp32")
with tempfile.TemporaryDirectory() as other:  # what a build imports, once for all
    build_engines(model, backend, precision, BuildProfile(), Path(other))
sys.addaudithook(count)
for last in range(last, last + 1000):
    pid = os.fork()
    if not pid:
        build_engines(model, backend, precision, BuildProfile(max_batch_size=3), folder, force=True)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
    if sys.stdin.readline() != "next\\n":
        break
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint of one file with a template, and one of three shards: neither has all the other's files."""
    folder = tmp_path_factory.mktemp("staging")
    old = save_model(random_model(SHAPE), folder / "old")
    (old / "chat_template.jinja").write_text("the old one's")
    return old, save_model(random_model(SHAPE, seed=1), folder / "new", shards=3)


def build(checkpoint, folder, **options):
    backend, precision = find_backend("torch", "fp32")
    return build_engines(ResolvedModel("random", checkpoint), backend, precision, BuildProfile(), folder, **options)


def verified(folder):
    return Manifest.read(folder).verify(folder, thorough=True).hash


def test_a_kill_at_any_moment_leaves_the_old_engines_or_the_new(checkpoints, tmp_path):
    """SIGKILL before each call that changes the folder, one build after the other, until one is through."""
    old, new = checkpoints
    hashes = {Checkpoint(old).hash: "old", Checkpoint(new).hash: "new"}
    folder = tmp_path / "engines"
    build(old, folder)
    saved = tmp_path / "saved"
    shutil.copytree(folder, saved, copy_function=shutil.copy2)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    seen = []
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, "0", new, folder],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            code = int(line)
            assert code in (0, -signal.SIGKILL)
            seen.append(hashes[verified(folder)])
            assert not list(folder.glob(".built*"))
            shutil.rmtree(folder)
            shutil.copytree(saved, folder, copy_function=shutil.copy2)
            if code == 0:
                break
            process.stdin.write("next\n")
            process.stdin.flush()
        process.stdin.close()
    assert seen == ["old"] * seen.count("old") + ["new"] * seen.count("new")
    assert min(seen.count("old"), seen.count("new")) > 5


def test_what_a_killed_build_left_is_cleared_by_the_next(checkpoints, tmp_path):
    old, new = checkpoints
    build(old, tmp_path)
    left = tmp_path / ".building" / "plans"
    left.mkdir(parents=True)
    (left / "decoder.engine").write_bytes(b"gigabytes")
    assert verified(tmp_path) == Checkpoint(old).hash
    build(new, tmp_path, force=True)
    assert not left.parent.exists()


def test_files_of_another_backend_are_removed_and_the_users_stay(tmp_path):
    for name in ("vision.engine", "decoder.layers", "model.safetensors", "manifest.json", "mine.onnx", "photo.png"):
        (tmp_path / name).write_text("old")
    with staged(tmp_path) as folder:
        (folder / "manifest.json").write_text("new")
        (folder / "vision.onnx").write_text("new")
        assert (tmp_path / "manifest.json").read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "manifest.json": "new",
        "vision.onnx": "new",
        "mine.onnx": "old",
        "photo.png": "old",
    }


def test_folders_of_the_users_with_names_of_files(checkpoints, tmp_path):
    old, new = checkpoints
    build(old, tmp_path)
    (tmp_path / "notes.txt").mkdir()
    build(new, tmp_path, force=True)
    assert (tmp_path / "notes.txt").is_dir()
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(BuildError, match=r"chat_template\.jinja is a folder there.*what it held is unchanged"):
        build(old, tmp_path, force=True)
    assert verified(tmp_path) == Checkpoint(new).hash


def test_a_list_that_the_disk_lost_moves_nothing(checkpoints, tmp_path):
    build(checkpoints[0], tmp_path)
    (tmp_path / ".built").mkdir()
    (tmp_path / ".built" / ".names").touch()
    assert verified(tmp_path) == Checkpoint(checkpoints[0]).hash
    assert not (tmp_path / ".built").exists()


def test_a_file_system_without_locks_is_named(checkpoints, tmp_path, monkeypatch):
    def no_locks(lock, **options):
        raise NotImplementedError("no flock")

    monkeypatch.setattr(staging.FileLock, "acquire", no_locks)
    with pytest.raises(BuildError, match="no locks on this file system"):
        build(checkpoints[0], tmp_path)


def test_a_process_keeps_the_files_that_it_has_open(checkpoints, tmp_path):
    old, new = checkpoints
    build(old, tmp_path)
    with (tmp_path / "model.safetensors").open("rb") as file, (tmp_path / "config.json").open("rb") as config:
        before = file.read(), config.read()
        build(new, tmp_path, force=True)
        file.seek(0)
        config.seek(0)
        assert (file.read(), config.read()) == before
    assert Checkpoint(old).names  # its weights were a hard link


def test_a_build_that_cannot_be_finished_is_named(checkpoints, tmp_path, monkeypatch):
    old, new = checkpoints
    build(old, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(staging, "_move", lambda folder: None)  # killed here
        build(new, tmp_path, force=True)

    def read_only(folder):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(staging, "_move", read_only)
        with pytest.raises(EngineError, match=r"cannot be finished \(Permission denied\). Make the folder writable"):
            Manifest.read(tmp_path)
    assert verified(tmp_path) == Checkpoint(new).hash
