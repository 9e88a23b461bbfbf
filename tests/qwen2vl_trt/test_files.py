"""Files that appear whole or not at all."""

import json
import os
import stat
from pathlib import Path

import pytest

from qwen2vl_trt.errors import FileError
from qwen2vl_trt.files import atomic_file, atomic_write, check_target, write_json


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


def test_a_target_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    check_target(tmp_path / "new.json")
    for path, message in ((tmp_path, "is a folder; give a file"), (tmp_path / "no" / "a.json", "there is no folder")):
        with pytest.raises(FileError, match=message):
            check_target(path)
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(path))  # root may write everywhere
    for path in (tmp_path / "new.json", Path(os.devnull)):  # a file is replaced, a device written itself
        with pytest.raises(FileError, match="no permission"):
            check_target(path)
    assert asked == [tmp_path, Path(os.devnull)]


def test_json_is_whole_or_an_error(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
    with pytest.raises(FileError, match=r"no/a\.json: No such file"):
        write_json(tmp_path / "no" / "a.json", {})
