"""Lazy reading of a checkpoint folder, and every way in which one can be broken."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from qwen2vl_trt.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from qwen2vl_trt.errors import CheckpointError
from tests.support.models import MINIMAL_CONFIG

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def make_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(7, 5, generator=generator).to(torch.bfloat16),
        "a.bias": torch.randn(5, generator=generator),
        "b.weight": torch.randn(300, 40, generator=generator),
        "b.empty": torch.zeros(0, 3),
        "c.scale": torch.randn(4, generator=generator).to(torch.float8_e4m3fn),
        "c.count": torch.tensor(3),
    }


@pytest.fixture
def single(tmp_path):
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MINIMAL_CONFIG))
    save_file(make_tensors(), folder / SINGLE_FILE, metadata={"format": "pt"})
    return folder


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MINIMAL_CONFIG))
    tensors = make_tensors()
    weight_map = {name: SHARDS[name.startswith("b")] for name in tensors}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_every_tensor_loads_and_lies_where_it_is_said_to(layout, request):
    checkpoint = Checkpoint(request.getfixturevalue(layout))
    tensors = make_tensors()
    assert checkpoint.names == tuple(sorted(tensors))
    assert checkpoint.config.text.hidden_size == 32
    assert "a.bias" in checkpoint
    assert "a.bia" not in checkpoint
    for name, expected in tensors.items():
        loaded = checkpoint.load(name)
        assert loaded.dtype == expected.dtype
        assert torch.equal(loaded.float(), expected.float())
        location = checkpoint.locate(name)
        assert (location.dtype, location.shape) == (expected.dtype, tuple(expected.shape))
        with location.path.open("rb") as file:
            file.seek(location.offset)
            data = file.read(location.length)
        assert data == expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_location_is_the_real_file_behind_a_link(single, tmp_path):
    blob = tmp_path / "blob"  # as in the hub's cache
    (single / SINGLE_FILE).rename(blob)
    (single / SINGLE_FILE).symlink_to(blob)
    checkpoint = Checkpoint(single)
    assert checkpoint.locate("a.bias").path == blob
    assert torch.equal(checkpoint.load("a.bias"), make_tensors()["a.bias"])


def test_opening_reads_headers_only(single, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("qwen2vl_trt.checkpoint.safe_open", refuse)
    checkpoint = Checkpoint(single)
    checkpoint.locate("b.weight")
    with pytest.raises(AssertionError, match="a tensor was read"):
        checkpoint.load("b.weight")


def test_hash_is_of_the_content(single, sharded, tmp_path):
    first = Checkpoint(single).hash
    assert len(first) == 64
    assert Checkpoint(shutil.copytree(single, tmp_path / "copy")).hash == first
    (single / "README.md").write_text("does not matter")
    assert Checkpoint(single).hash == first
    assert Checkpoint(sharded).hash != first


@pytest.mark.parametrize("name", ["a.bias", "b.weight", "a.weight"])
@pytest.mark.parametrize("end", ["head", "tail"])
def test_hash_sees_both_ends_of_every_tensor(single, name, end):
    before = Checkpoint(single)
    location = before.locate(name)
    position = location.offset + (0 if end == "head" else location.length - 1)
    content = bytearray(location.path.read_bytes())
    content[position] ^= 1
    expected = before.hash
    location.path.write_bytes(content)
    assert Checkpoint(single).hash != expected


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"])
def test_hash_sees_the_files_beside_the_weights(single, file):
    before = Checkpoint(single).hash
    path = single / file
    path.write_text((path.read_text() if path.exists() else "") + "\n")
    assert Checkpoint(single).hash != before


def refuses(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_a_missing_folder_is_named(tmp_path):
    refuses(tmp_path / "nowhere", "nowhere", "no such folder")


def test_file_instead_of_folder(single):
    refuses(single / "config.json", "is a file")


def test_folder_without_config(single):
    (single / "config.json").unlink()
    refuses(single, str(single), "config.json")


def test_folder_without_weights(single):
    (single / SINGLE_FILE).unlink()
    refuses(single, "no weights", SINGLE_FILE, INDEX_FILE)


def test_pickled_weights_only(single):
    (single / SINGLE_FILE).rename(single / "pytorch_model.bin")
    refuses(single, ".bin", "safetensors are needed")


def test_a_missing_shard_is_named(sharded):
    (sharded / SHARDS[1]).unlink()
    refuses(sharded, SHARDS[1], "missing")


def test_a_dangling_link_is_named(sharded, tmp_path):
    (sharded / SHARDS[1]).unlink()
    (sharded / SHARDS[1]).symlink_to(tmp_path / "gone")
    refuses(sharded, SHARDS[1], "missing")


@pytest.mark.parametrize("kept", [0, 5, 8, 30, -1])
def test_a_truncated_shard_is_named(sharded, kept):
    path = sharded / SHARDS[0]
    path.write_bytes(path.read_bytes()[:kept])
    refuses(sharded, str(path), "truncated")


def test_a_git_lfs_pointer_is_called_one(single):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 3990\n"
    (single / SINGLE_FILE).write_text(pointer)
    refuses(single, SINGLE_FILE, "Git LFS pointer", "git lfs pull")


def test_a_folder_of_another_model_is_named(single):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    refuses(single, str(single), "model_type is 'gpt2'", "Qwen2.5-VL")


def test_shard_with_bytes_left_over(single):
    with (single / SINGLE_FILE).open("ab") as file:
        file.write(b"x")
    refuses(single, SINGLE_FILE, "corrupt", "promises")


def write_header(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"{nonsense", b"", ["corrupt", "JSON"]),
        (b"\xff\xfe\xfd", b"", ["corrupt", "JSON"]),
        (b"[1, 2]", b"", ["corrupt", "JSON object"]),
        (b"[" * 200_000, b"", ["corrupt", "not JSON"]),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"1234", ["corrupt", "makes no sense"]),
        ({"a": {"dtype": "F32", "shape": [10**300], "data_offsets": [0, 4]}}, b"1234", ["corrupt", "makes no sense"]),
        ({"a": {"dtype": "F32", "shape": [1] * 5000, "data_offsets": [0, 4]}}, b"1234", ["corrupt", "makes no sense"]),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", ["corrupt", "'a'"]),
        ({"a": 3}, b"", ["corrupt", "'a'"]),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234", ["corrupt", "'a'"]),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234", ["'a'", "needs 8 bytes"]),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678", ["overlap or leave gaps"]),
        ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"1", ["'a'", "'F4'", "BF16"]),
    ],
)
def test_a_corrupt_header_is_named(single, header, data, words):
    write_header(single / SINGLE_FILE, header, data)
    refuses(single, SINGLE_FILE, *words)


def test_corrupt_length_does_not_allocate(single):
    path = single / SINGLE_FILE
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    refuses(single, SINGLE_FILE, "truncated or no safetensors")


def test_tensor_that_the_index_misplaces(sharded):
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"]["a.bias"] = SHARDS[1]
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    refuses(sharded, SHARDS[1], "'a.bias'")


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_a_corrupt_index_is_named(sharded, content):
    (sharded / INDEX_FILE).write_text(content)
    refuses(sharded, INDEX_FILE)


def test_index_cannot_point_outside_the_folder(sharded):
    (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../single/model.safetensors"}}))
    refuses(sharded, "../single/model.safetensors", "not a file name")


def test_an_unknown_tensor_is_named(single):
    with pytest.raises(CheckpointError, match=r"no tensor 'd\.weight'"):
        Checkpoint(single).load("d.weight")


def test_file_that_shrinks_after_opening(single):
    checkpoint = Checkpoint(single)
    path = single / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'a\.bias' cannot be read"):
        checkpoint.load("a.bias")
