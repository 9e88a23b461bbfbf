"""The quantised checkpoint of a model: made once, found again, made anew when something changes, never half."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2vl_trt.building import quantized_model
from qwen2vl_trt.building.calibration import CalibrationData, training_data
from qwen2vl_trt.building.plan import BuildPlan, BuildRequest
from qwen2vl_trt.building.quantized_model import quantize_first
from qwen2vl_trt.checkpoint import RECORD, Checkpoint
from qwen2vl_trt.engines.backends import BACKENDS, find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import BuildError, MissingDependencyError
from qwen2vl_trt.hub import ResolvedModel, resolve_model


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


def plan(model=None, size=2, precision="fp8", force=False, method=None):
    request = BuildRequest(calibration_size=size if precision == "fp8" else None, force=force, quant_method=method)
    found = model or resolve_model("tiny")
    return BuildPlan(request, found, BACKENDS["torch"], precision, BuildProfile(), Path("engines"))


def forced(given):
    return replace(given, request=replace(given.request, force=True))


def test_a_backend_that_takes_the_decoder_alone_has_a_folder_of_its_own(made, monkeypatch):
    quantised = []

    def quantize(checkpoint, folder, samples, device, on_sample, vision):
        quantised.append(vision)
        return original(checkpoint, folder, samples, device, on_sample, vision)

    original = quantized_model.quantize_checkpoint
    monkeypatch.setattr(quantized_model, "quantize_checkpoint", quantize)
    folders = [
        quantize_first(replace(plan(), backend=BACKENDS[name])).model.folder.name for name in ("torch", "tensorrt-llm")
    ]
    assert folders == ["tiny-fp8", "tiny-fp8-decoder"]
    assert quantised == [True, False]


class TestFound:
    def test_made_once(self, made):
        first = quantize_first(plan())
        assert first.model == ResolvedModel("tiny", Path("artifacts/tiny-fp8"))
        assert quantize_first(plan()) == first
        assert len(made) == 1
        record = json.loads((first.model.folder / RECORD).read_text())
        assert record["model_hash"] == Checkpoint(resolve_model("tiny").folder).hash
        assert record["samples"] == 2
        assert [path.name for path in Path("artifacts").iterdir() if path.is_dir()] == ["tiny-fp8"]

    def test_what_is_not_given_is_no_difference(self, made):
        first = quantize_first(plan())
        assert quantize_first(plan(size=None)).model == first.model
        assert len(made) == 1

    def test_of_other_data_or_another_model_it_is_made_anew_by_force_alone(self, made, tmp_path, monkeypatch):
        folder = quantize_first(plan()).model.folder
        other = ResolvedModel("tiny", tmp_path / "other")
        shutil.copytree(resolve_model("tiny").folder, other.folder)
        (other.folder / "config.json").write_text((other.folder / "config.json").read_text() + " ")
        before = (folder / RECORD).read_text()
        for wanted, data, said in (
            (plan(size=3), training_data, r"other calibration data \(2 samples\)"),
            (plan(size=2), lambda size: CalibrationData(training_data(size).requests, "others"), "other calibration"),
            (plan(other, size=None), training_data, "another model"),
        ):
            monkeypatch.setattr(quantized_model, "training_data", data)
            with pytest.raises(BuildError, match=f"artifacts/tiny-fp8 was quantised from {said}.*; pass --force"):
                quantize_first(wanted)
            assert (folder / RECORD).read_text() == before
            quantize_first(forced(wanted))
            before = (folder / RECORD).read_text()
        assert len(made) == 4

    def test_damaged_it_is_made_anew(self, made):
        folder = quantize_first(plan()).model.folder
        (folder / RECORD).write_text("{}")
        quantize_first(plan())
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")  # not what was made
        quantize_first(plan())
        (folder / "model.safetensors").unlink()
        quantize_first(plan())
        assert len(made) == 4

    def test_engines_serve_without_the_checkpoint_that_they_were_built_from(self, made, tmp_path):
        first = quantize_first(plan())
        backend, precision = find_backend("torch", "fp8")
        build_engines(first.model, backend, precision, BuildProfile(), tmp_path / "engines")
        shutil.rmtree(first.model.folder)
        found = quantize_first(plan(size=None))
        assert found.model.folder == Path("engines")
        assert not build_engines(found.model, backend, precision, BuildProfile(), tmp_path / "engines")
        with pytest.raises(BuildError, match=r"engines holds engines that were quantised from other .* --force"):
            quantize_first(plan(size=3))
        assert len(made) == 1
        (tmp_path / "engines" / RECORD).unlink()
        with pytest.raises(BuildError, match="do not say what they were quantised from"):
            quantize_first(plan(size=None))
        quantize_first(forced(plan(size=3)))
        assert len(made) == 2

    def test_a_model_that_is_quantised_already(self, made, fp8_checkpoint):
        given = plan(ResolvedModel("other", fp8_checkpoint), size=None)
        assert quantize_first(given) is given
        with pytest.raises(BuildError, match=r"--calibration-size is for an unquantised model, .* is quantised: leave"):
            quantize_first(plan(ResolvedModel("other", fp8_checkpoint)))

    def test_another_precision(self, made):
        given = plan(precision="bf16")
        assert quantize_first(given) is given
        assert made == []


@pytest.fixture
def int4(tmp_path, monkeypatch):
    """A folder to work in; counts the searches for factors, of which each finds none."""
    calls = []

    def search(checkpoint, samples, device, on_sample):
        calls.append(sum(1 for _ in samples))
        return {}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantized_model, "awq_factors", search)
    monkeypatch.setattr(quantized_model, "folded", lambda checkpoint, factors: factors)
    monkeypatch.setattr(quantized_model, "CALIBRATION_SIZES", {"awq": 3})
    return calls


def record():
    return json.loads(Path("artifacts/tiny-int4", RECORD).read_text())


class TestWeightsAlone:
    @pytest.mark.parametrize("precision", ["int8", "nvfp4"])
    def test_to_nearest_without_data_or_model_optimizer(self, tmp_path, monkeypatch, precision):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("qwen2vl_trt.errors.find_spec", lambda name: None)
        other = replace(resolve_model("tiny"), name="other")  # which has no data of its own
        first = quantize_first(plan(other, precision=precision))
        assert first.model.folder == Path(f"artifacts/other-{precision}")
        numbers = {weight.numbers for weight in Checkpoint(first.model.folder).packed.values()}
        assert numbers == {precision}
        found = json.loads((first.model.folder / RECORD).read_text())
        assert (found["method"], found["calibration"], found["samples"]) == ("rtn", "", 0)
        monkeypatch.setattr(quantized_model, "quantize_weights", None)  # not called again
        assert quantize_first(plan(other, precision=precision)) == first

    def test_int4_is_calibrated_unless_told(self, int4):
        pytest.importorskip("modelopt", reason="NVIDIA Model Optimizer is not installed: the quantize extra")
        quantize_first(plan(precision="int4"))
        assert int4 == [3]
        assert (record()["method"], record()["samples"]) == ("awq", 3)
        with pytest.raises(BuildError, match=r"tiny-int4 was quantised by another method \(awq\); pass --force"):
            quantize_first(plan(precision="int4", method="rtn"))
        quantize_first(plan(precision="int4", method="rtn", force=True))
        assert record()["method"] == "rtn"
        assert len(int4) == 1
        quantize_first(plan(precision="int4"))  # what is not said is no difference
        assert len(int4) == 1
        wanted = plan(precision="int4", method="awq")
        with pytest.raises(BuildError, match=r"was quantised by another method \(rtn\)"):
            quantize_first(wanted)
        sized = replace(wanted, request=replace(wanted.request, quant_method=None, calibration_size=2))
        with pytest.raises(BuildError, match=r"was quantised by another method \(rtn\)"):
            quantize_first(sized)
        quantize_first(forced(sized))
        assert int4 == [3, 2]

    def test_int4_of_another_model_needs_data_or_none(self, int4):
        other = ResolvedModel("Qwen2.5-VL-7B", resolve_model("tiny").folder)
        with pytest.raises(
            BuildError, match=r"to INT4 needs images .* --calibration-data DIR\. --quant-method rtn needs"
        ):
            quantize_first(plan(other, precision="int4"))
        quantize_first(plan(other, precision="int4", method="rtn"))
        assert int4 == []

    def test_engines_serve_without_the_checkpoint(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        first = quantize_first(plan(precision="int8"))
        backend, precision = find_backend("torch", "int8")
        build_engines(first.model, backend, precision, BuildProfile(), tmp_path / "engines")
        shutil.rmtree(first.model.folder)
        assert quantize_first(plan(precision="int8")).model.folder == Path("engines")

    def test_a_model_that_is_quantised_already(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        made = quantize_first(plan(precision="int8")).model
        for precision in ("int8", "int4"):  # the build refuses what does not fit
            given = plan(replace(made, name="other"), precision=precision)
            assert quantize_first(given) is given
        with pytest.raises(BuildError, match="--quant-method is for an unquantised model"):
            quantize_first(plan(made, precision="int4", method="rtn"))

    def test_a_full_disk(self, tmp_path, monkeypatch):
        def full(*arguments):
            raise OSError(28, os.strerror(28))

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("qwen2vl_trt.export.weight_only.write_tensors", full)
        with pytest.raises(BuildError, match="artifacts/tiny-int8: No space left on device; what it held is unchanged"):
            quantize_first(plan(precision="int8"))
        assert [path.name for path in Path("artifacts").iterdir()] == [".tiny-int8.lock"]


class TestWhatGoesWrong:
    def test_no_data_for_another_model(self, made):
        other = ResolvedModel("Qwen2.5-VL-7B", resolve_model("tiny").folder)
        with pytest.raises(
            BuildError, match=r"quantising Qwen2\.5-VL-7B to FP8 needs images .* --calibration-data DIR"
        ):
            quantize_first(plan(other))

    def test_somebody_elses_folder(self, made):
        Path("artifacts/tiny-fp8").mkdir(parents=True)
        Path("artifacts/tiny-fp8/precious.txt").touch()
        with pytest.raises(BuildError, match="is not a checkpoint that was quantised here"):
            quantize_first(plan())
        assert Path("artifacts/tiny-fp8/precious.txt").exists()

    @pytest.mark.parametrize("error", [KeyboardInterrupt, BuildError, OSError(28, os.strerror(28))])
    def test_nothing_half_made_is_left(self, made, monkeypatch, error):
        def fail(checkpoint, folder, *others):
            folder.mkdir()
            (folder / "model.safetensors").touch()
            raise error

        monkeypatch.setattr(quantized_model, "quantize_checkpoint", fail)
        with pytest.raises(BuildError if isinstance(error, OSError) else error):
            quantize_first(plan())
        assert [path.name for path in Path("artifacts").iterdir()] == [".tiny-fp8.lock"]

    def test_an_older_one_outlives_a_failure(self, made, monkeypatch):
        folder = quantize_first(plan()).model.folder
        before = Checkpoint(folder).hash
        monkeypatch.setattr(quantized_model, "quantize_checkpoint", lambda *others: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize_first(forced(plan(size=3)))
        assert Checkpoint(folder).hash == before

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, os.strerror(28))])
    def test_an_older_one_outlives_a_failure_between_the_renames(self, made, monkeypatch, error):
        folder = quantize_first(plan()).model.folder
        before, rename = Checkpoint(folder).hash, Path.rename

        def fail(path, target):
            if path.name == ".tiny-fp8.unfinished":
                raise error
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(BuildError if isinstance(error, OSError) else error):
            quantize_first(forced(plan(size=3)))
        assert Checkpoint(folder).hash == before
        assert not Path("artifacts/.tiny-fp8.older").exists()

    def test_a_kill_between_the_renames(self, made):
        folder = quantize_first(plan()).model.folder
        folder.rename("artifacts/.tiny-fp8.older")
        assert quantize_first(plan()).model.folder == folder
        assert len(made) == 1

    def test_what_a_killed_run_left_is_cleared(self, made):
        folder = quantize_first(plan()).model.folder
        left = [Path("artifacts") / f".tiny-fp8.{state}" for state in ("unfinished", "older")]
        for each in left:
            each.mkdir()
        quantize_first(forced(plan(size=3)))
        assert [path.name for path in Path("artifacts").iterdir() if path.is_dir()] == [folder.name]

    def test_a_file_system_without_locks(self, made, monkeypatch):
        def no_locks(lock):
            raise NotImplementedError("no flock")

        monkeypatch.setattr(quantized_model.FileLock, "__enter__", no_locks)
        with pytest.raises(BuildError, match="artifacts/tiny-fp8: no flock"):
            quantize_first(plan())

    def test_model_optimizer_missing(self, made, monkeypatch):
        monkeypatch.setattr("qwen2vl_trt.errors.find_spec", lambda name: None if name == "requests" else object())
        with pytest.raises(MissingDependencyError, match=r"needs requests, which is not installed: pip install"):
            quantize_first(plan())
        assert made == []
