"""Whatever a message echoes, it is one line that can be read."""

import pickle

import pytest

from qwen2vl_trt.errors import MediaError, Qwen2VLError, shortened


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
