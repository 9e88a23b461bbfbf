"""The FP8 checkpoint of a model: made once, found again, made anew when something changes, never half."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2vl_trt.checkpoint import RECORD, Checkpoint
from qwen2vl_trt.engines.arguments import BuildPlan, CalibrationChoice
from qwen2vl_trt.engines.backends import BACKENDS, find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import BuildError, MissingDependencyError
from qwen2vl_trt.hub import ResolvedModel, resolve_model
from qwen2vl_trt.runtime import quantized_model
from qwen2vl_trt.runtime.calibration import CalibrationData
from qwen2vl_trt.runtime.quantized_model import quantize_first
from qwen2vl_trt.tiny.evaluation import training_data


@pytest.fixture
def made(tmp_path, monkeypatch, fp8_checkpoint):
    """A folder to work in; quantising copies a checkpoint made before, and is counted."""
    calls = []

    def quantize(checkpoint, folder, samples, device, on_sample, vision):
        calls.append(checkpoint.folder)
        shutil.copytree(fp8_checkpoint, folder)
        return Checkpoint(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantized_model, "quantize_checkpoint", quantize)
    return calls


def plan(model=None, size=2, folder=None, precision="fp8"):
    choice = CalibrationChoice(folder, size) if precision == "fp8" else None
    return BuildPlan(
        model or resolve_model("tiny"), BACKENDS["torch"], precision, BuildProfile(), Path("engines"), choice
    )


def test_a_backend_that_takes_the_decoder_alone_has_a_folder_of_its_own(made, monkeypatch):
    quantised = []

    def quantize(checkpoint, folder, samples, device, on_sample, vision):
        quantised.append(vision)
        return original(checkpoint, folder, samples, device, on_sample, vision)

    original = quantized_model.quantize_checkpoint
    monkeypatch.setattr(quantized_model, "quantize_checkpoint", quantize)
    folders = [
        quantize_first(replace(plan(), backend=BACKENDS[name]), training_data).model.folder.name
        for name in ("torch", "tensorrt-llm")
    ]
    assert folders == ["tiny-fp8", "tiny-fp8-decoder"]
    assert quantised == [True, False]


class TestFound:
    def test_made_once(self, made):
        first = quantize_first(plan(), training_data)
        assert first.model == ResolvedModel("tiny", Path("artifacts/tiny-fp8"))
        assert quantize_first(plan(), training_data) == first
        assert len(made) == 1
        record = json.loads((first.model.folder / RECORD).read_text())
        assert record["model_hash"] == Checkpoint(resolve_model("tiny").folder).hash
        assert record["samples"] == 2
        assert [path.name for path in Path("artifacts").iterdir() if path.is_dir()] == ["tiny-fp8"]

    def test_what_is_not_given_is_no_difference(self, made):
        first = quantize_first(plan(), training_data)
        assert quantize_first(plan(size=None), training_data).model == first.model
        assert len(made) == 1

    def test_of_other_data_or_another_model_it_is_made_anew_by_force_alone(self, made, tmp_path):
        folder = quantize_first(plan(), training_data).model.folder
        other = ResolvedModel("tiny", tmp_path / "other")
        shutil.copytree(resolve_model("tiny").folder, other.folder)
        (other.folder / "config.json").write_text((other.folder / "config.json").read_text() + " ")
        before = (folder / RECORD).read_text()
        for wanted, data, said in (
            (plan(size=3), training_data, r"other calibration data \(2 samples\)"),
            (plan(size=2), lambda size: CalibrationData(training_data(size).requests, "others"), "other calibration"),
            (plan(other, size=None), training_data, "another model"),
        ):
            with pytest.raises(BuildError, match=f"artifacts/tiny-fp8 was quantised from {said}.*; pass --force"):
                quantize_first(wanted, data)
            assert (folder / RECORD).read_text() == before
            quantize_first(replace(wanted, force=True), data)
            before = (folder / RECORD).read_text()
        assert len(made) == 4

    def test_damaged_it_is_made_anew(self, made):
        folder = quantize_first(plan(), training_data).model.folder
        (folder / RECORD).write_text("{}")
        quantize_first(plan(), training_data)
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")  # not what was made
        quantize_first(plan(), training_data)
        (folder / "model.safetensors").unlink()
        quantize_first(plan(), training_data)
        assert len(made) == 4

    def test_engines_serve_without_the_checkpoint_that_they_were_built_from(self, made, tmp_path):
        first = quantize_first(plan(), training_data)
        backend, precision = find_backend("torch", "fp8")
        build_engines(first.model, backend, precision, BuildProfile(), tmp_path / "engines")
        shutil.rmtree(first.model.folder)
        found = quantize_first(plan(size=None), training_data)
        assert found.model.folder == Path("engines")
        assert not build_engines(found.model, backend, precision, BuildProfile(), tmp_path / "engines")
        with pytest.raises(BuildError, match=r"engines holds engines that were quantised from other .* --force"):
            quantize_first(plan(size=3), training_data)
        assert len(made) == 1
        (tmp_path / "engines" / RECORD).unlink()
        with pytest.raises(BuildError, match="do not say what they were quantised from"):
            quantize_first(plan(size=None), training_data)
        quantize_first(replace(plan(size=3), force=True), training_data)
        assert len(made) == 2

    def test_a_model_that_is_quantised_already(self, made, fp8_checkpoint):
        given = plan(ResolvedModel("other", fp8_checkpoint))
        assert quantize_first(given, training_data) is given

    def test_another_precision(self, made):
        given = plan(precision="bf16")
        assert quantize_first(given, training_data) is given
        assert made == []


class TestWhatGoesWrong:
    def test_no_data_for_another_model(self, made):
        other = ResolvedModel("Qwen2.5-VL-7B", resolve_model("tiny").folder)
        with pytest.raises(
            BuildError, match=r"quantising Qwen2\.5-VL-7B to FP8 needs images .* --calibration-data DIR"
        ):
            quantize_first(plan(other), training_data)

    def test_somebody_elses_folder(self, made):
        Path("artifacts/tiny-fp8").mkdir(parents=True)
        Path("artifacts/tiny-fp8/precious.txt").touch()
        with pytest.raises(BuildError, match="is not a checkpoint that was quantised here"):
            quantize_first(plan(), training_data)
        assert Path("artifacts/tiny-fp8/precious.txt").exists()

    @pytest.mark.parametrize("error", [KeyboardInterrupt, BuildError, OSError(28, os.strerror(28))])
    def test_nothing_half_made_is_left(self, made, monkeypatch, error):
        def fail(checkpoint, folder, *others):
            folder.mkdir()
            (folder / "model.safetensors").touch()
            raise error

        monkeypatch.setattr(quantized_model, "quantize_checkpoint", fail)
        with pytest.raises(BuildError if isinstance(error, OSError) else error):
            quantize_first(plan(), training_data)
        assert [path.name for path in Path("artifacts").iterdir()] == [".tiny-fp8.lock"]

    def test_an_older_one_outlives_a_failure(self, made, monkeypatch):
        folder = quantize_first(plan(), training_data).model.folder
        before = Checkpoint(folder).hash
        monkeypatch.setattr(quantized_model, "quantize_checkpoint", lambda *others: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize_first(replace(plan(size=3), force=True), training_data)
        assert Checkpoint(folder).hash == before

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, os.strerror(28))])
    def test_an_older_one_outlives_a_failure_between_the_renames(self, made, monkeypatch, error):
        folder = quantize_first(plan(), training_data).model.folder
        before, rename = Checkpoint(folder).hash, Path.rename

        def fail(path, target):
            if path.name == ".tiny-fp8.unfinished":
                raise error
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(BuildError if isinstance(error, OSError) else error):
            quantize_first(replace(plan(size=3), force=True), training_data)
        assert Checkpoint(folder).hash == before
        assert not Path("artifacts/.tiny-fp8.older").exists()

    def test_a_kill_between_the_renames(self, made):
        folder = quantize_first(plan(), training_data).model.folder
        folder.rename("artifacts/.tiny-fp8.older")
        assert quantize_first(plan(), training_data).model.folder == folder
        assert len(made) == 1

    def test_what_a_killed_run_left_is_cleared(self, made):
        folder = quantize_first(plan(), training_data).model.folder
        left = [Path("artifacts") / f".tiny-fp8.{state}" for state in ("unfinished", "older")]
        for each in left:
            each.mkdir()
        quantize_first(replace(plan(size=3), force=True), training_data)
        assert [path.name for path in Path("artifacts").iterdir() if path.is_dir()] == [folder.name]

    def test_a_file_system_without_locks(self, made, monkeypatch):
        def no_locks(lock):
            raise NotImplementedError("no flock")

        monkeypatch.setattr(quantized_model.FileLock, "__enter__", no_locks)
        with pytest.raises(BuildError, match="artifacts/tiny-fp8: no flock"):
            quantize_first(plan(), training_data)

    def test_model_optimizer_missing(self, made, monkeypatch):
        monkeypatch.setattr(
            "qwen2vl_trt.export.quantize.find_spec", lambda name: None if name == "requests" else object()
        )
        with pytest.raises(MissingDependencyError, match=r"needs requests, which is not installed: pip install"):
            quantize_first(plan(), training_data)
        assert made == []
