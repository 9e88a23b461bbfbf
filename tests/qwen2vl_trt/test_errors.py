"""Whatever a message echoes, it is one line that can be read."""

import pickle
import sys
from pathlib import Path

import pytest

from qwen2vl_trt import errors
from qwen2vl_trt.errors import (
    MediaError,
    MissingDependencyError,
    Qwen2VLError,
    pip_install,
    program,
    require,
    shortened,
)


def test_ordinary_messages_are_left_alone():
    message = "image 3 (/data/" + "a" * 250 + "/\u65e5\u672c \u202f.png): no such file; give another"
    assert shortened(message) == message == str(MediaError(message))


@pytest.mark.parametrize("text", ["x" * 4_000_000, "word " * 800_000, "A" * 500 + " " + "B" * 500])
def test_the_beginning_and_the_end_are_kept(text):
    message = str(Qwen2VLError(f"image 1 ({text}): no such file. Give another."))
    assert len(message) <= 2000
    assert message.startswith("image 1 (" + text[:50])
    assert message.endswith("no such file. Give another.")
    assert "characters)..." in message


def test_it_says_how_long_it_was():
    assert "...(4,000,003 characters)..." in shortened("(" + "x" * 4_000_000 + "):")


def test_one_line_and_nothing_for_a_terminal():
    assert shortened("a\nb\r\x1b[31m\u2028\ud800\x9b") == r"a\nb\r\x1b[31m\u2028\ud800\x9b"


def test_twice_is_once():
    error = Qwen2VLError("x" * 5000 + "\n")
    assert str(Qwen2VLError(str(error))) == str(error) == str(pickle.loads(pickle.dumps(error)))


class TestCommandsInMessages:
    """They are to work where the user is."""

    def test_in_a_checkout(self, monkeypatch):
        monkeypatch.chdir(Path(__file__).parents[2])
        assert program("build_engines.py") == "python build_engines.py"
        assert pip_install("ray") == "pip install -e '.[ray]'"

    def test_a_script_that_runs(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["/there/run.py", "inspect"])
        assert program("build_engines.py") == "python /there/build_engines.py"

    def test_a_checkout_that_is_somewhere_else(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert program("run.py") == "qwen2vl-trt"
        assert pip_install("ray") == f"pip install -e '{Path(__file__).parents[2]}[ray]'"

    def test_a_wheel(self, monkeypatch, tmp_path):
        monkeypatch.setattr(errors, "_CHECKOUT", tmp_path)
        assert program("build_engines.py") == "qwen2vl-trt-build"
        assert pip_install("ray") == "pip install 'qwen2vl-trt[ray]'"
        assert pip_install() == "pip install 'qwen2vl-trt'"

    def test_all_that_is_missing_is_named_at_once(self, monkeypatch):
        there = {"numpy": "numpy", "no_such_module": "No-Such", "nor_this": "Nor-This"}
        with pytest.raises(
            MissingDependencyError, match=r"^compare needs No-Such and Nor-This, which are not .*\[x\]'$"
        ):
            require("compare", "x", there)
        require("compare", "x", {"numpy": "numpy"})
