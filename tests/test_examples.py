"""The examples: a script and a notebook."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from qwen2vl_trt.engines.profile import BuildProfile
from tests.support.engine_folders import build

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "What digits are in the image?"


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    profile = BuildProfile(4, 1024, max_batch_size=2, max_num_seqs=2, max_input_len=512, max_seq_len=640)
    return build("tiny", tmp_path_factory.mktemp("examples") / "engines", "torch", profile=profile)


def test_the_script(engine_dir, monkeypatch, capsys):
    monkeypatch.setenv("ENGINE_DIR", str(engine_dir))
    monkeypatch.setattr(sys, "argv", ["ask.py", str(ROOT / "docs" / "digits.png"), QUESTION])
    runpy.run_path(str(ROOT / "examples" / "ask.py"), run_name="__main__")
    answer, took, embedding = capsys.readouterr().out.splitlines()
    assert answer == "92059"
    assert "prompt tokens" in took
    assert embedding == "embedding of the image: (20, 128)"


@pytest.mark.parametrize("missing", ["image", "engines"])
def test_the_script_says_in_one_line_what_is_missing(engine_dir, monkeypatch, missing, tmp_path):
    monkeypatch.setenv("ENGINE_DIR", str(engine_dir if missing == "image" else tmp_path / "none"))
    monkeypatch.setattr(sys, "argv", ["ask.py", "none.png", QUESTION])
    with pytest.raises(SystemExit, match=r"^error: .*none.*[^\n]$"):
        runpy.run_path(str(ROOT / "examples" / "ask.py"), run_name="__main__")


def test_the_notebook(engine_dir, monkeypatch, capsys):
    """Its cells, one after another in one namespace."""
    monkeypatch.setenv("ENGINE_DIR", str(engine_dir))
    monkeypatch.chdir(ROOT)
    cells = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    assert [output.text for output in names["outputs"]][:2] == ["92059", "5"]
    assert len(names["embeddings"]) == 2
    assert "'9'" in capsys.readouterr().out
