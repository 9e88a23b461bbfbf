"""An engine folder loads only as it was built; everything else is refused by name."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.manifest import FORMAT, BuiltFile, Manifest, file_hash
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.engines.staging import MANIFEST_FILE
from qwen2vl_trt.errors import EngineError, program
from qwen2vl_trt.runtime.pipeline import Pipeline

BUILD = program("build_engines.py")

MANIFEST = Manifest(
    model="random",
    model_hash="0" * 64,
    backend="onnxruntime",
    precision="fp32",
    profile=BuildProfile(max_batch_size=3, max_num_seqs=5),
    files={"vision.onnx": BuiltFile("1" * 64, 3, 4)},
    versions={"torch": "2.13.0"},
)


@pytest.fixture
def folder(untied_model, tmp_path):
    """A copy of a built folder, to be damaged."""
    return shutil.copytree(untied_model.engines, tmp_path / "engines")


def refused(folder):
    with pytest.raises(EngineError) as error:
        Manifest.read(folder).verify(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(folder, **changes):
    raw = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).write_text(json.dumps(raw | changes))


def test_what_is_written_is_read(tmp_path):
    MANIFEST.write(tmp_path)
    assert Manifest.read(tmp_path) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_FILE], "no temporary file is left"


def test_a_built_folder_verifies(folder):
    manifest = Manifest.read(folder)
    assert (manifest.model, manifest.backend, manifest.precision) == ("random", "onnxruntime", "fp32")
    assert set(manifest.files) == {"vision.onnx", "decoder.onnx"}
    assert {"qwen2vl-trt", "torch", "onnxruntime"} <= set(manifest.versions)
    assert manifest.format == FORMAT
    assert manifest.verify(folder).hash == manifest.model_hash


def test_a_manifest_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError):
        MANIFEST.write(tmp_path / "missing")


def test_writing_replaces_at_once(tmp_path, monkeypatch):
    """A writer that dies before the end leaves the old manifest whole."""
    MANIFEST.write(tmp_path)

    def die(file_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen2vl_trt.files.os.fsync", die)
    with pytest.raises(KeyboardInterrupt):
        replace(MANIFEST, model="another").write(tmp_path)
    assert Manifest.read(tmp_path) == MANIFEST


def test_a_folder_without_a_manifest_is_refused(folder, tmp_path):
    (folder / MANIFEST_FILE).unlink()
    none = tmp_path / "none"
    command = f"{BUILD} --model MODEL --engine-dir"
    assert refused(folder) == f"{folder} holds no engine: it has no {MANIFEST_FILE}. Build one with {command} {folder}."
    assert refused(none) == f"there is no folder {none}. Build one with {command} {none}."


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read"),
        (b'{"format": 1, "model": "ran', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 200_000, "cannot be read"),
        (b'{"files": {"\\ud800": {}}}', "cannot be read"),
        (b"[1]", "built in format None"),
        (b"{}", "built in format None"),
        (b'{"format": %d}' % FORMAT, "is corrupt"),
    ],
)
def test_a_corrupt_manifest(folder, content, said):
    (folder / MANIFEST_FILE).write_bytes(content)
    message = refused(folder)
    assert said in message
    assert str(folder) in message
    assert "Rebuild" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"profile": {"max_num_seqs": 0}},
        {"profile": {"max_images": 1}},
        {"profile": 3},
        {"files": ["vision.onnx"]},
        {"files": {"vision.onnx": None}},
        {"files": {"vision.onnx": {"sha256": "0", "bytes": 3}}},
        {"files": {"vision.onnx": {"sha256": "0", "bytes": 3, "mtime_ns": "4"}}},
        {"files": {"../config.json": {"sha256": "0", "bytes": 3, "mtime_ns": 4}}},
        {"files": {"a\0b": {"sha256": "0", "bytes": 3, "mtime_ns": 4}}},
        {"versions": 3},
        {"precision": 32},
        {"backend": ["torch"]},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_manifest_with_senseless_entries(folder, changes):
    edit(folder, **changes)
    message = refused(folder)
    assert f"{folder / MANIFEST_FILE} is corrupt" in message
    assert "Rebuild" in message


@pytest.mark.parametrize("number", [0, FORMAT - 1, FORMAT + 1, "1", None])
def test_another_format_is_refused(folder, number):
    edit(folder, format=number)
    assert refused(folder) == (
        f"{folder} was built in format {number}, this release loads format {FORMAT}."
        f" Rebuild with {BUILD} --model MODEL --engine-dir {folder} --force."
    )


@pytest.mark.parametrize("value", [None, 3, ["a"]])
def test_what_names_no_folder(value):
    with pytest.raises(EngineError, match=r"the engine folder is .*; give its path"):
        Pipeline.from_engine_dir(value)


@pytest.mark.parametrize("name", ["vision.onnx", "decoder.onnx"])
def test_a_changed_graph(folder, name):
    flip(folder / name)
    assert refused(folder) == f"{folder / name} is not the file that was built (SHA-256 differs). Rebuild."


def flip(path, keep_time=False):
    """Change one bit in the middle."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def hashed(folder, monkeypatch, thorough=False):
    """Names of the files that a check reads."""
    names = []
    monkeypatch.setattr(
        "qwen2vl_trt.engines.manifest.file_hash", lambda path: names.append(path.name) or file_hash(path)
    )
    Manifest.read(folder).verify(folder, thorough)
    return names


def test_untouched_files_are_not_read(folder, monkeypatch):
    assert hashed(folder, monkeypatch) == []
    assert hashed(folder, monkeypatch, thorough=True) == ["vision.onnx", "decoder.onnx"]


def test_files_with_another_time_are_read(folder, monkeypatch):
    """As after ``cp`` without ``-p``; an archive keeps whole seconds, which count as the same time."""
    path = folder / "decoder.onnx"
    built = Manifest.read(folder).files[path.name].mtime_ns
    os.utime(path, ns=(0, built // 10**9 * 10**9))
    assert hashed(folder, monkeypatch) == []
    os.utime(path, ns=(0, built + 1))
    assert hashed(folder, monkeypatch) == ["decoder.onnx"]


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"\0", lambda content: b""])
def test_another_size_is_refused_whatever_the_time(folder, change):
    path = folder / "vision.onnx"
    stat, content = path.stat(), change(path.read_bytes())
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    expected = f"it has {len(content):,} bytes instead of {stat.st_size:,}"
    assert refused(folder) == f"{path} is not the file that was built ({expected}). Rebuild."


def test_a_bit_that_the_disk_lost(folder):
    """Size and time are as they were: only the thorough check sees it."""
    flip(folder / "vision.onnx", keep_time=True)
    Manifest.read(folder).verify(folder)
    with pytest.raises(EngineError, match=r"vision\.onnx is not the file that was built \(SHA-256 differs\)"):
        Manifest.read(folder).verify(folder, thorough=True)


@pytest.mark.parametrize("name", ["vision.onnx", "decoder.onnx"])
def test_a_missing_graph(folder, name):
    (folder / name).unlink()
    assert refused(folder) == f"{folder / name} cannot be read: No such file or directory. Rebuild."


def test_a_truncated_model(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "is damaged" in (message := refused(folder))
    assert "truncated" in message


def test_a_missing_model(folder):
    (folder / "model.safetensors").unlink()
    assert "is damaged" in (message := refused(folder))
    assert "no weights" in message


def test_a_changed_model(folder):
    """One byte in the first KiB of a tensor: what the hash samples."""
    location = Checkpoint(folder).locate("visual.blocks.1.mlp.down_proj.weight")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[location.offset + 300] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert "is not the one that was built" in refused(folder)


def test_a_changed_configuration(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"image_token_id": 3}))
    assert "is not the one that was built" in refused(folder)


def test_a_missing_configuration(folder):
    (folder / "config.json").unlink()
    assert "config.json" in refused(folder)


def test_the_hash_of_a_file(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_hash(tmp_path / "empty").startswith("e3b0c44298fc1c14")
    assert file_hash(tmp_path / "abc").startswith("ba7816bf8f01cfea")
