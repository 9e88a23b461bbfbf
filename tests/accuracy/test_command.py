"""``run.py compare`` as a user meets it, on the tiny model's real weights: verdicts, files, and what goes wrong."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stdout
from importlib import util
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from qwen2vl_trt.accuracy import report as report_module
from qwen2vl_trt.accuracy.report import is_block
from qwen2vl_trt.accuracy.transformers_runner import TransformersRunner
from qwen2vl_trt.commands import call
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import (
    CompareError,
    EngineError,
    ExecutionError,
    FileError,
    LimitError,
    MediaError,
    MissingDependencyError,
)
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.plots import color_of
from tests.accuracy.damaged import damage
from tests.support.engine_folders import PROFILE, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
PICTURE = ("--image", ROOT / "docs" / "digits.png", "--prompt", "What digits are in the image?")
STAGES = ["image_embeds", "hidden_states", "logits", "decode_logits"]
BLOCKS = ["visual.patch_embed", *(f"visual.blocks.{n}" for n in range(4)), *(f"model.layers.{n}" for n in range(4))]


@pytest.fixture(scope="module")
def full(tiny, tmp_path_factory):
    """Everything that the command can write, of ONNX Runtime's engine over all default cases."""
    folder = tmp_path_factory.mktemp("report")
    engine = tiny["onnxruntime", "fp32"]
    before = {path.name: path.stat().st_mtime_ns for path in engine.iterdir()}
    # No SystemExit: within the tolerance.
    with (folder / "r.json").open("w") as file, redirect_stdout(file):
        call("compare", ["--engine-dir", str(engine), "--json", "--plot", str(folder / "r.png")])
    assert {path.name: path.stat().st_mtime_ns for path in engine.iterdir()} == before
    return folder


def test_onnxruntime_is_within_the_tolerance_of_fp32(full):
    report = json.loads((full / "r.json").read_text())
    assert report["passed"]
    assert report["departures"] == {}
    assert report["first_departing_block"] is None
    assert report["reference"] == "Transformers fp32"
    assert report["engine"]["backend"] == "onnxruntime"
    assert report["machine"]["polygraphy"]
    assert report["tolerance"]["logits"] == 1e-4
    names = [case["name"] for case in report["cases"]]
    assert len(names) == len(set(names)) == 10
    assert sum(len(case["images"]) == 2 for case in report["cases"]) == 3
    assert max(frames for case in report["cases"] for frames in case["videos"]) == 6
    assert sum(not case["images"] + case["videos"] for case in report["cases"]) == 1


def test_every_runner_gives_every_output_and_every_block(full):
    report = json.loads((full / "r.json").read_text())
    rows = [report["rows"]["engine"], report["rows"]["baseline"], *report["rows"]["others"]]
    assert [row["name"] for row in rows] == ["onnxruntime fp32", "Transformers bf16", "torch fp32"]
    assert list(report["inputs"]["outputs"]) == ["pixel_values", "input_ids"]
    for row in rows:
        assert sorted(row["outputs"]) == sorted(STAGES + BLOCKS)
        assert len(row["cases"]) == 10
        tokens = row["greedy_tokens"]
        assert tokens["tokens"] >= 40
        assert tokens["agreeing"] == tokens["tokens"]
        for figures in row["outputs"].values():
            assert set(figures) == {
                *("max_absolute", "mean_absolute", "max_relative", "mean_relative", "cosine", "scale", "values")
            }
    for name in STAGES + BLOCKS:
        engine, baseline = (row["outputs"][name] for row in rows[:2])
        assert 0 < engine["mean_relative"] < 1e-5 < 1e-3 < baseline["mean_relative"] < 2e-2, name
        assert engine["values"] == baseline["values"]


def test_the_plot_shows_something(full):
    pixels = np.asarray(Image.open(full / "r.png").convert("RGB"), np.int64)
    assert min(pixels.shape[:2]) > 500
    for name in ("onnxruntime", "torch", "Transformers"):  # the engine's line, another runner's, the baseline's
        colour = tuple(bytes.fromhex(color_of(name)[1:]))
        assert (np.abs(pixels - colour).max(-1) < 8).sum() > 200, name


def test_the_torch_engine_in_bf16_is_no_worse_than_transformers_in_bf16(tiny, compare):
    code, out = compare("--engine-dir", tiny["torch", "bf16"], "--layers", "--also", tiny["onnxruntime", "fp32"])
    assert code == 0
    assert "torch bf16 is within the tolerance of bf16" in out
    assert "no block departs" in out
    for runner in ("torch bf16", "torch fp32", "onnxruntime fp32", "Transformers bf16"):
        assert f"{runner}: 55 of 55 greedy tokens agree" in out


def test_the_torch_engine_in_fp32_at_any_width(tiny, compare, monkeypatch):
    """Every figure is printed whole, however narrow the terminal."""
    printed_reports, print_report = [], report_module.print_report
    monkeypatch.setattr(
        report_module, "print_report", lambda *given: (printed_reports.append(given[0]), print_report(*given))
    )
    code, out = compare("--engine-dir", tiny["torch", "fp32"], "--layers", *PICTURE)
    assert code == 0
    assert "torch fp32 is within the tolerance of fp32" in out
    rows = [printed_reports[0].inputs, *printed_reports[0].rows]
    figures = [
        f"{value:.2e}"
        for row in rows
        for name, of in row.outputs.items()
        for value in ((of.mean_relative,) if is_block(name) else (of.max_absolute, of.mean_absolute, of.max_relative))
        if value
    ]
    assert len(figures) > 20
    for width in (40, 60, 100, 1000):
        printed = StringIO()
        print_report(printed_reports[0], Console(file=printed, soft_wrap=True, width=width))
        assert not Counter(figures) - Counter(printed.getvalue().split()), width


@pytest.mark.parametrize("error", [KeyboardInterrupt, ExecutionError("out of memory")])
def test_what_was_compared_is_not_lost(tiny, monkeypatch, capsys, tmp_path, error, reports):
    """Before the baseline there is no verdict, but the engine's figures are there."""

    def fails(self, *given, **options):
        raise error

    infer = TransformersRunner.infer_impl
    monkeypatch.setattr(
        TransformersRunner, "infer_impl", lambda self, feed: (fails if "bf16" in self.name else infer)(self, feed)
    )
    options = ("--layers", "--plot", tmp_path / "r.png")
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        call("compare", [str(part) for part in ("--engine-dir", tiny["torch", "fp32"], *PICTURE, *options)])
    out = capsys.readouterr().out
    assert "torch fp32: 6 of 6 greedy tokens agree" in out
    assert "ended before torch fp32 could be judged" in out
    assert "within the tolerance" not in out
    assert "departs" not in out
    report = json.loads(reports[0].as_json())
    assert (report["interrupted"], report["rows"]["baseline"]) == (True, None)
    assert not {"passed", "departures", "first_departing_block"} & set(report)
    assert report["rows"]["engine"]["outputs"]["logits"]["mean_relative"] < 1e-5
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_a_picture_too_large_for_the_engine_is_compared_at_the_size_that_fits(tiny, compare, tmp_path):
    """Transformers is told the limits that checkpoint and engine have in common."""
    Image.open(PICTURE[1]).resize((1600, 1200)).save(tmp_path / "large.png")
    picture = ("--image", tmp_path / "large.png", "--max-pixels", 2_000_000)
    code, out = compare("--engine-dir", tiny["torch", "fp32"], *picture, "--prompt", "What?", "--max-tokens", 2)
    assert code == 0, out


@pytest.mark.parametrize(
    ("graph", "scope", "block"),
    [
        ("vision", "blocks.0", "visual.blocks.0"),
        ("vision", "blocks.3", "visual.blocks.3"),
        ("decoder", "model.layers.2", "model.layers.2"),
    ],
)
def test_the_damaged_block_is_named(tiny, compare, reports, tmp_path, graph, scope, block):
    folder = damage(tiny["onnxruntime", "fp32"], tmp_path / "damaged", graph, scope)
    code, out = compare("--engine-dir", folder, "--layers", *PICTURE)
    assert code == 1
    assert f"first block that departs: {block}: maximum relative error" in out
    assert "DEPARTS: hidden_states of onnxruntime fp32" in out
    report = json.loads(reports[0].as_json())
    assert (report["passed"], report["first_departing_block"]) == (False, block)
    assert ("image_embeds" in report["departures"]) == (graph == "vision")


def test_a_broken_engine_departs_and_its_report_is_json(tiny, compare, reports, tmp_path):
    folder = damage(tiny["onnxruntime", "fp32"], tmp_path / "damaged", "decoder", "model.layers.1", float("nan"))
    code, out = compare("--engine-dir", folder, "--layers", *PICTURE)
    assert code == 1
    assert "first block that departs: model.layers.1: holds values that are not finite" in out
    assert json.loads(reports[0].as_json())["rows"]["engine"]["outputs"]["logits"]["cosine"] is None


def test_other_models_are_asked_photographs(compare, tmp_path):
    model = Path(shutil.copytree(resolve_model("tiny").folder, tmp_path / "other"))
    build_engines(resolve_model(model), *find_backend("torch", "fp32"), BuildProfile(max_batch_size=2), tmp_path / "e")
    code, out = compare("--engine-dir", tmp_path / "e", "--max-tokens", "2", "--json")
    assert code == 0, out
    cases = json.loads(out)["cases"]
    assert [len(case["images"]) for case in cases] == [1, 1, 1, 2, 0, 0]
    assert [case["videos"] for case in cases] == [[], [], [], [], [8], []]  # more frames than a vision call takes


def test_against_our_modules_and_against_another_folder(tiny, compare, tmp_path):
    for against in ("torch", tiny["torch", "fp32"]):
        options = ("--engine-dir", tiny["onnxruntime", "fp32"], "--against", against, "--json")
        code, out = compare(*options, *PICTURE)
        assert code == 0
        report = json.loads(out)
        assert report["reference"] == ("torch fp32" if against == "torch" else str(against))
        assert report["rows"]["engine"]["greedy_tokens"]["tokens"] > 3, "the reference answered by itself"


def test_a_coarse_reference_loosens_the_limits(tiny, compare):
    engine, coarse = tiny["onnxruntime", "fp32"], tiny["torch", "bf16"]
    assert compare("--engine-dir", engine, "--against", coarse, *PICTURE)[0] == 0
    code, out = compare("--engine-dir", engine, "--against", coarse, "--tolerance", "hidden_states=1e-5", *PICTURE)
    assert code == 1
    assert "DEPARTS: hidden_states of onnxruntime fp32: maximum relative error" in out


def test_what_is_wrong_is_said(tiny, compare, tmp_path, monkeypatch):
    engine = tiny["onnxruntime", "fp32"]
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(MediaError, match=r"image 1 .*no\.png"):
        compare("--engine-dir", engine, "--image", tmp_path / "no.png", "--prompt", "What?")
    with pytest.raises(CompareError, match="--image and --video need a --prompt"):
        compare("--engine-dir", engine, "--image", tmp_path / "no.png")
    with pytest.raises(EngineError, match="holds no engine"):
        compare("--engine-dir", tmp_path)
    with pytest.raises(CompareError, match="tensorflow: there is no such folder; besides folders there are"):
        compare("--engine-dir", engine, "--against", "tensorflow")
    with pytest.raises(LimitError, match="unknown limit 'speed'"):
        compare("--engine-dir", engine, "--tolerance", "speed=1")
    with pytest.raises(FileError, match=r"there is no folder .*missing"):
        compare("--engine-dir", engine, "--plot", tmp_path / "missing" / "r.png")
    with pytest.raises(FileError, match="is a folder"):
        compare("--engine-dir", engine, "--plot", tmp_path)
    with pytest.raises(CompareError, match="has no ONNX graphs"):
        compare("--engine-dir", tiny["torch", "fp32"], "--save-inputs", tmp_path / "inputs")
    with pytest.raises(LimitError, match=r"case 'yours', image 1 \(\d+x\d+\) needs .* patches"):
        compare("--engine-dir", engine, "--min-pixels", 2_000_000, "--max-pixels", 2_000_000, *PICTURE)
    with pytest.raises(LimitError, match=r"case 'yours' has .* tokens; these engines take 1,024"):
        compare("--engine-dir", engine, "--prompt", "What? " * 2000)
    monkeypatch.setattr(
        "qwen2vl_trt.errors.find_spec", lambda name: None if name == "matplotlib" else util.find_spec(name)
    )
    with pytest.raises(MissingDependencyError, match=r"matplotlib, which is not installed: .*\[compare\]"):
        compare("--engine-dir", engine)


def test_another_model_is_refused(tiny, compare, tmp_path):
    other = write_checkpoint(tmp_path / "model")
    build_engines(resolve_model(other), *find_backend("torch", "fp32"), PROFILE, tmp_path / "other")
    engine = tiny["onnxruntime", "fp32"]
    for option, value in (("--against", tmp_path / "other"), ("--also", tmp_path / "other"), ("--model", other)):
        with pytest.raises(CompareError, match="are different models") as caught:
            compare("--engine-dir", engine, option, value)
        assert str(engine) in str(caught.value)
        assert str(value) in str(caught.value)


def test_a_checkpoint_that_lost_a_file_is_refused(tiny, compare, tmp_path):
    folder = Path(shutil.copytree(tiny["torch", "fp32"], tmp_path / "engine"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(EngineError, match="is not the one that was built"):
        compare("--engine-dir", folder)


def test_the_command_line(tiny, tmp_path):
    """As a process: the exit code of a departure, the table on stdout, nothing on stderr."""
    arguments = ["compare", "--engine-dir", tiny["torch", "bf16"], "--tolerance", "hidden_states=1e-9", *PICTURE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "run.py", *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.stderr == ""
    assert done.returncode == 1
    assert "DEPARTS: hidden_states of torch bf16: maximum relative error" in done.stdout
    assert "image_embeds" in done.stdout
