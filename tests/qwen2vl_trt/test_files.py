"""Files that appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from qwen2vl_trt.files import atomic_file, atomic_write


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "a.json"
    atomic_write(path, b"old")
    with pytest.raises(KeyboardInterrupt):
        _break_off(path)
    with pytest.raises(OSError, match="nothing written"), atomic_file(path, _refuse) as temporary:
        temporary.write_bytes(b"new")
    with pytest.raises(FileNotFoundError), atomic_file(path):
        pass  # nothing is written
    assert path.read_bytes() == b"old"
    atomic_write(path, memoryview(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def _break_off(path):
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"ne")
        raise KeyboardInterrupt


def _refuse(path):
    raise OSError(f"nothing written to {path.name} counts")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
def test_a_device_or_a_pipe_stays_what_it_is(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        atomic_write(pipe, b"content")
        assert os.read(reader, 100) == b"content"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    if Path("/dev/full").is_char_device():
        with pytest.raises(OSError, match="No space left"):
            atomic_write(Path("/dev/full"), b"content")
        assert Path("/dev/full").is_char_device()
