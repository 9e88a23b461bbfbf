"""Builds: nothing is done twice, nothing half done loads, and nobody's files are lost."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qwen2vl_trt.export.onnx_model
import qwen2vl_trt.export.weights
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.backends import BACKENDS, default_backend, find_backend
from qwen2vl_trt.engines.build import build_engines, default_engine_dir, engines_in
from qwen2vl_trt.engines.manifest import FORMAT, Manifest
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.engines.staging import MANIFEST_FILE
from qwen2vl_trt.errors import BuildError, CheckpointError, EngineError, MissingDependencyError
from qwen2vl_trt.hub import ResolvedModel
from qwen2vl_trt.runtime.backends.runners import open_engines
from tests.support.engine_folders import installed_backends
from tests.support.models import model_config, random_model, save_model

REPOSITORY = Path(__file__).parents[2]
PROFILE = BuildProfile(
    min_hw_dims=4, max_hw_dims=64, max_batch_size=2, max_num_seqs=2, max_input_len=32, max_seq_len=64
)

BUILD = """
import logging, sys
from pathlib import Path
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.hub import ResolvedModel

logging.basicConfig(level=logging.INFO, stream=sys.stderr)
print(build_engines(ResolvedModel("random", Path(sys.argv[1])), *find_backend("onnxruntime", None),
                    BuildProfile(max_batch_size=2), Path(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def model():
    return random_model(model_config(text={"num_hidden_layers": 1}, vision={"depth": 1, "fullatt_block_indexes": [0]}))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    return save_model(model, tmp_path_factory.mktemp("build") / "checkpoint")


def build(checkpoint, folder, backend="torch", precision="fp32", profile=PROFILE, name="random", **options):
    """The torch backend by default: all that surrounds a build, without the seconds of an export."""
    return build_engines(ResolvedModel(name, checkpoint), *find_backend(backend, precision), profile, folder, **options)


def loads(folder):
    try:
        engines = open_engines(folder, "cpu")
        engines.vision, engines.decoder  # noqa: B018  (loaded when first used)
    except EngineError:
        return False
    return True


def content(folder):
    """Modification times: whether anything was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def edit_manifest(folder, change):
    raw = json.loads((folder / MANIFEST_FILE).read_text())
    change(raw)
    (folder / MANIFEST_FILE).write_text(json.dumps(raw))


def spoil(*arguments, **options):
    raise AssertionError("this must not run")


class TestAgain:
    def test_a_second_build_does_nothing(self, checkpoint, tmp_path):
        folder = tmp_path / "new" / "engines"
        assert build(checkpoint, folder)
        before = content(folder)
        assert not build(checkpoint, folder)
        assert content(folder) == before
        assert loads(folder)

    def test_a_second_export_does_nothing(self, untied_model, tmp_path, monkeypatch):
        monkeypatch.setattr(qwen2vl_trt.export.onnx_model, "trace", spoil)
        monkeypatch.setattr(qwen2vl_trt.export.weights, "link_checkpoint", spoil)
        profile = Manifest.read(untied_model.engines).profile
        assert not build(untied_model.checkpoint, untied_model.engines, "onnxruntime", profile=profile)

    def test_more_tokens_than_the_model_has_positions_is_a_warning(self, checkpoint, tmp_path, caplog):
        build(checkpoint, tmp_path, profile=replace(PROFILE, max_seq_len=513))
        (line,) = [record.getMessage() for record in caplog.records]
        assert "max_position_embeddings is 512" in line
        assert "--max-seq-len is 513" in line

    def test_force_builds_again(self, checkpoint, tmp_path):
        assert build(checkpoint, tmp_path)
        before = content(tmp_path)
        assert build(checkpoint, tmp_path, force=True)
        assert content(tmp_path)[MANIFEST_FILE] != before[MANIFEST_FILE]
        assert loads(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"profile": replace(PROFILE, max_batch_size=3)}, "--max-batch-size 2 there, 3 wanted"),
            ({"profile": replace(PROFILE, max_hw_dims=100)}, "--max-hw-dims 64 there, 100 wanted"),
            ({"precision": "bf16"}, "--precision fp32 there, bf16 wanted"),
            ({"backend": "onnxruntime"}, "--backend torch there, onnxruntime wanted"),
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_other_engines_are_replaced_by_force_alone(self, checkpoint, tmp_path, changes, said):
        assert build(checkpoint, tmp_path)
        before = content(tmp_path)
        with pytest.raises(BuildError) as refused:
            build(checkpoint, tmp_path, **changes)
        assert str(refused.value) == (
            f"{tmp_path} holds other engines: {said}. Pass --force to replace them, or give another --engine-dir"
        )
        assert content(tmp_path) == before
        assert loads(tmp_path)
        assert build(checkpoint, tmp_path, force=True, **changes)
        assert not build(checkpoint, tmp_path, **changes)

    def test_all_that_differs_is_said(self, checkpoint, tmp_path):
        build(checkpoint, tmp_path)
        with pytest.raises(BuildError, match="precision fp32 there, bf16 wanted; --max-batch-size 2 there, 8 wanted"):
            build(checkpoint, tmp_path, precision="bf16", profile=replace(PROFILE, max_batch_size=8))

    def test_other_weights_are_built_by_force_alone(self, model, checkpoint, tmp_path):
        other = save_model(random_model(model.config, seed=1), tmp_path / "other")
        folder = tmp_path / "engines"
        assert build(checkpoint, folder)
        hashes = [Checkpoint(source).hash[:12] for source in (checkpoint, other)]
        said = f"--model random ({hashes[0]}) there, new ({hashes[1]}) wanted"
        with pytest.raises(BuildError, match=re.escape(said)):
            build(other, folder, name="new")
        assert build(other, folder, force=True)
        assert open_engines(folder, "cpu").checkpoint.hash == Checkpoint(other).hash
        assert (folder / "model.safetensors").stat().st_ino == (other / "model.safetensors").stat().st_ino

    def test_another_name_and_other_versions_are_no_difference(self, checkpoint, tmp_path):
        build(checkpoint, tmp_path)
        edit_manifest(tmp_path, lambda raw: raw["versions"].update(torch="1.0", onnxruntime="1.0"))
        assert not build(checkpoint, tmp_path, name="another name")

    def test_a_plan_of_another_release_is_a_difference(self, checkpoint, tmp_path, monkeypatch):
        """It does not load in this one; and it is not thrown away, for it does in its own."""
        build(checkpoint, tmp_path)
        edit_manifest(tmp_path, lambda raw: raw["versions"].update({"torch": "1.0"}))
        monkeypatch.setitem(BACKENDS, "torch", replace(BACKENDS["torch"], bound_to="torch"))
        with pytest.raises(BuildError, match=r"torch 1\.0 there, .* wanted"):
            build(checkpoint, tmp_path)

    def test_engines_of_another_format_are_replaced_by_force_alone(self, checkpoint, tmp_path):
        build(checkpoint, tmp_path)
        edit_manifest(tmp_path, lambda raw: raw.update(format=1))
        with pytest.raises(BuildError, match=r"was built in format 1, .* --force"):
            build(checkpoint, tmp_path)
        assert build(checkpoint, tmp_path, force=True)
        assert loads(tmp_path)

    def test_a_damaged_folder_is_repaired(self, checkpoint, tmp_path, caplog):
        build(checkpoint, tmp_path)
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "model.safetensors").write_bytes(b"damaged")
        assert not loads(tmp_path)
        with caplog.at_level(logging.WARNING):
            assert build(checkpoint, tmp_path)
        assert "is damaged" in caplog.text
        assert loads(tmp_path)

    @pytest.mark.parametrize("damage", ["{", f'{{"format": {FORMAT}}}', "", "[" * 200_000])
    def test_engines_with_a_damaged_manifest_are_replaced_by_force_alone(self, checkpoint, tmp_path, damage):
        """What their limits were cannot be known."""
        build(checkpoint, tmp_path)
        (tmp_path / MANIFEST_FILE).write_text(damage)
        with pytest.raises(BuildError, match=r"manifest\.json .* --force"):
            build(checkpoint, tmp_path)
        with pytest.raises(BuildError, match=r"manifest\.json .* --force"):
            engines_in(tmp_path)
        assert build(checkpoint, tmp_path, force=True)
        assert loads(tmp_path)

    def test_fewer_and_other_files_of_another_model(self, model, checkpoint, tmp_path):
        """What a model of one file leaves must not be read in place of the shards of the next."""
        shards = save_model(random_model(model.config, seed=1), tmp_path / "shards", shards=3)
        folder = tmp_path / "engines"
        (folder / "notes").mkdir(parents=True)
        (folder / "photo.png").touch()
        for source in (checkpoint, shards, checkpoint):
            assert build(source, folder, force=True)
            assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
                *("manifest.json", "photo.png", "notes"),
                *(path.name for path in source.iterdir()),
            }
            assert open_engines(folder, "cpu").checkpoint.hash == Checkpoint(source).hash
            assert not build(source, folder)


class TestRefused:
    def test_the_checkpoint_itself(self, model, tmp_path):
        folder = save_model(model, tmp_path / "checkpoint")
        before = content(folder)
        with pytest.raises(BuildError, match="is the checkpoint itself"):
            build(folder, folder)
        (tmp_path / "link").symlink_to(folder)
        with pytest.raises(BuildError, match="is the checkpoint itself"):
            build(folder, tmp_path / "link")
        assert content(folder) == before

    def test_somebody_elses_checkpoint(self, model, checkpoint, tmp_path):
        """A build clears its folder of older models; it must never clear this one."""
        other = save_model(model, tmp_path / "other")
        before = content(other)
        for force in (False, True):
            with pytest.raises(BuildError, match=r"holds config\.json, which no build put there"):
                build(checkpoint, other, force=force)
        assert content(other) == before

    def test_other_files_stay(self, checkpoint, tmp_path):
        (tmp_path / "photo.png").write_bytes(b"photo")
        (tmp_path / "notes").mkdir()
        assert build(checkpoint, tmp_path)
        assert build(checkpoint, tmp_path, force=True)
        assert (tmp_path / "photo.png").read_bytes() == b"photo"
        assert (tmp_path / "notes").is_dir()

    def test_a_file_in_place_of_the_folder(self, checkpoint, tmp_path):
        (tmp_path / "engines").write_text("a file")
        with pytest.raises(BuildError, match="File exists"):
            build(checkpoint, tmp_path / "engines")

    def test_a_folder_that_is_no_checkpoint(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            build(tmp_path, tmp_path / "engines")
        assert not (tmp_path / "engines").exists()

    def test_unknown_backends_and_precisions(self):
        with pytest.raises(BuildError, match="unknown backend 'cuda'; known: onnxruntime, torch"):
            find_backend("cuda", None)
        with pytest.raises(BuildError, match="onnxruntime cannot be built in 'bf16', only in fp32, fp8"):
            find_backend("onnxruntime", "bf16")
        with pytest.raises(BuildError, match="tensorrt cannot be built in 'int8', only in bf16, fp32, fp16-decoder"):
            find_backend("tensorrt", "int8")

    def test_defaults(self):
        backend, precision = find_backend(default_backend(), None)
        assert (backend.name, precision) in {("onnxruntime", "fp32"), ("torch", "bf16")}  # by the CPU
        for backend in installed_backends():
            assert set(backend.versions()) == {"torch", backend.package}
        assert default_engine_dir("tiny", "torch", "bf16") == Path("artifacts/tiny-torch-bf16")


class TestInterrupted:
    @pytest.mark.parametrize("step", ["link", "vision", "decoder", "manifest"])
    def test_by_an_exception_at_any_step(self, checkpoint, untied_model, tmp_path, monkeypatch, step):
        """An engine was there before: it still loads, and nothing is left beside it."""
        build(checkpoint, tmp_path)
        before = content(tmp_path)
        traced = []

        def interrupt(*arguments):  # not by a signal: where tests run in the background, Python may not handle it
            raise KeyboardInterrupt

        def trace(graph, dtype):
            traced.append(graph.name)
            if graph.name == step:
                interrupt()

        monkeypatch.setattr(qwen2vl_trt.export.onnx_model, "trace", trace)
        monkeypatch.setattr(qwen2vl_trt.export.onnx_model, "point_to_checkpoint", lambda *arguments: None)
        monkeypatch.setattr(qwen2vl_trt.export.onnx_model.ir, "save", lambda model, path: path.touch())
        with monkeypatch.context() as patch:
            if step == "link":
                patch.setattr(qwen2vl_trt.export.weights.os, "link", interrupt)
            if step == "manifest":
                patch.setattr("qwen2vl_trt.files.os.fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                build(checkpoint, tmp_path, "onnxruntime", profile=PROFILE, force=True)
        assert content(tmp_path) == before
        assert loads(tmp_path)

    def test_by_a_full_disk_at_the_end(self, checkpoint, tmp_path, monkeypatch):
        def full(number):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr("qwen2vl_trt.files.os.fsync", full)
            with pytest.raises(BuildError, match="No space left on device"):
                build(checkpoint, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        assert build(checkpoint, tmp_path)
        assert loads(tmp_path)

    def test_by_a_kill_and_then_built_by_two_at_once(self, checkpoint, tmp_path):
        """SIGKILL between the two graphs leaves nothing that loads; then one of two builds works, the other waits."""
        folder = tmp_path / "engines"
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", BUILD, checkpoint, folder]

        def start():
            return subprocess.Popen(
                command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
            )

        with start() as killed:
            for line in killed.stderr:
                if "exporting the decoder graph" in line:
                    killed.kill()
                    break
        assert killed.returncode == -signal.SIGKILL
        assert (folder / ".building" / "vision.onnx").exists()
        with pytest.raises(EngineError, match="holds no engine"):
            open_engines(folder)

        builds = [start(), start()]
        answers = [build.communicate(timeout=240) for build in builds]
        assert [build.returncode for build in builds] == [0, 0], answers
        assert sorted(out.split()[-1] for out, _ in answers) == ["False", "True"]
        assert sum(err.count("exporting the decoder graph") for _, err in answers) == 1
        assert not (folder / ".building").exists()
        assert loads(folder)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB, and a function that enlarges it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        return subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)

    if sys.platform != "linux" or not shutil.which("mount"):
        pytest.skip("mounting a small file system needs Linux")
    if (done := mount("-t", "tmpfs", "-o", "size=600k", "tmpfs")).returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
    yield folder, lambda: mount("-o", "remount,size=64m").returncode == 0
    for _ in range(50):
        if not subprocess.run(["umount", str(folder)], capture_output=True).returncode:
            return
        time.sleep(0.1)  # a memory map of the last test may still be open
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(checkpoint, small_disk, caplog):
    """Another file system, so weights are copied; they do not fit. With room, the next build succeeds."""
    disk, enlarge = small_disk
    assert (checkpoint / "model.safetensors").stat().st_size > 600_000
    folder = disk / "engines"
    with pytest.raises(BuildError) as refused:
        build(checkpoint, folder)
    assert str(refused.value) == f"{folder}: No space left on device; what it held is unchanged"
    assert [path.name for path in folder.iterdir()] == [".lock"]
    assert enlarge()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert build(checkpoint, folder)
    assert "is copied: a hard link to" in caplog.text
    assert Manifest.read(folder).verify(folder).hash == Checkpoint(checkpoint).hash


def test_a_disk_that_is_too_small_for_both_keeps_the_old_engines(model, checkpoint, small_disk, tmp_path):
    disk, enlarge = small_disk
    assert enlarge()
    folder = disk / "engines"
    build(checkpoint, folder)
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 300_000))
    other = save_model(random_model(model.config, seed=1), tmp_path / "other")
    with pytest.raises(BuildError, match="No space left on device"):
        build(other, folder, force=True)
    assert open_engines(folder, "cpu").checkpoint.hash == Checkpoint(checkpoint).hash
    assert not (folder / ".building").exists()
    (disk / "filler").unlink()
    assert build(other, folder, force=True)
    assert open_engines(folder, "cpu").checkpoint.hash == Checkpoint(other).hash


def test_bf16_weights_in_a_torch_engine(tied_model, tmp_path):
    build(tied_model.checkpoint, tmp_path, precision="bf16")
    engines = open_engines(tmp_path, "cpu")
    assert engines.dtype == torch.bfloat16
    assert engines.decoder.embed([1, 2]).dtype == torch.bfloat16


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("qwen2vl_trt.errors.find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match=r"needs onnxruntime, which is not installed: pip install .*or --backend torch"
    ):
        find_backend("onnxruntime", None)
