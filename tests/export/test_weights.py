"""Weights stay in the checkpoint's own files: hard links, copies only where a link is impossible."""

import errno
import os
import shutil

import pytest
import torch

import qwen2vl_trt.export.onnx_model as onnx_model
import qwen2vl_trt.export.weights as weights
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.export.graphs import decoder_graph, vision_graph
from qwen2vl_trt.export.onnx_model import check_fit, export_onnx
from qwen2vl_trt.export.weights import link_checkpoint
from tests.support.models import edit_checkpoint, model_config, random_model, save_model


@pytest.fixture(scope="module")
def model():
    return random_model(model_config(text={"num_hidden_layers": 1}, vision={"depth": 1, "fullatt_block_indexes": [0]}))


@pytest.fixture
def folder(model, tmp_path):
    return save_model(model, tmp_path / "checkpoint")


def graphs(checkpoint):
    return [graph(checkpoint.config, torch.float32) for graph in (vision_graph, decoder_graph)]


def test_a_built_folder_holds_the_checkpoints_own_files(built_model):
    stored = list(built_model.checkpoint.glob("*.safetensors"))
    assert stored
    for path in stored:
        assert (built_model.engines / path.name).stat().st_ino == path.stat().st_ino
    assert Checkpoint(built_model.engines).hash == Checkpoint(built_model.checkpoint).hash


def test_what_is_not_the_models_stays_behind(folder, tmp_path):
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt", "notes.md", "training.bin"):
        (folder / name).write_text("{}")
    (folder / "other.safetensors").write_bytes(b"not of the index")
    target = tmp_path / "engines"
    target.mkdir()
    link_checkpoint(Checkpoint(folder), target)
    assert {path.name for path in target.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
        "model.safetensors",
    }


def test_only_weights_are_linked(folder, tmp_path):
    """A configuration edited in the engine folder must not change the checkpoint's."""
    target = tmp_path / "engines"
    target.mkdir()
    link_checkpoint(Checkpoint(folder), target)
    assert (target / "config.json").stat().st_ino != (folder / "config.json").stat().st_ino
    assert (target / "model.safetensors").stat().st_ino == (folder / "model.safetensors").stat().st_ino


def test_the_links_of_the_hubs_cache_lead_to_the_blob(folder, tmp_path):
    """A hard link to a symbolic link would be a symbolic link, which ONNX Runtime refuses."""
    blob = tmp_path / "blobs" / "0123abcd"
    blob.parent.mkdir()
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    target = tmp_path / "engines"
    target.mkdir()
    link_checkpoint(Checkpoint(folder), target)
    assert not (target / "model.safetensors").is_symlink()
    assert (target / "model.safetensors").stat().st_ino == blob.stat().st_ino


_NO_LINK = [
    *(errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.EACCES, errno.EOPNOTSUPP, errno.ENOTSUP),
    *(errno.EINVAL, errno.ENOTTY, errno.EBADF, errno.ENOTCONN),
]
"""What file systems, containers and security modules answer."""


@pytest.mark.parametrize("number", _NO_LINK, ids=errno.errorcode.get)
def test_weights_are_copied_where_no_link_is_possible(folder, tmp_path, monkeypatch, caplog, number):
    def refuse(source, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(weights.os, "link", refuse)
    target = tmp_path / "engines"
    target.mkdir()
    link_checkpoint(Checkpoint(folder), target)
    copy = target / "model.safetensors"
    assert copy.stat().st_ino != (folder / copy.name).stat().st_ino
    assert copy.read_bytes() == (folder / copy.name).read_bytes()
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "model.safetensors is copied" in message
    assert os.strerror(number) in message


def test_what_a_copy_runs_into_is_the_error(folder, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    target = tmp_path / "engines"
    target.mkdir()
    monkeypatch.setattr(weights.os, "link", refuse)
    monkeypatch.setattr(weights.shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        link_checkpoint(Checkpoint(folder), target)


def test_a_model_in_the_folder_is_not_written_through(model, folder, tmp_path):
    """The old weights are a hard link to another checkpoint, which must keep its bytes."""
    old = save_model(random_model(model.config, seed=1), tmp_path / "old")
    before = (old / "model.safetensors").read_bytes()
    target = tmp_path / "engines"
    target.mkdir()
    link_checkpoint(Checkpoint(old), target)
    with pytest.raises(FileExistsError):
        link_checkpoint(Checkpoint(folder), target)
    assert (old / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("dialect", ["new", "published"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.0.mlp.up_proj.weight", r"1 missing \(model.layers.0.mlp.up_proj.weight\)"),
        ("visual.blocks.0.attn.qkv.bias", r"1 missing \(visual.blocks.0.attn.qkv.bias\)"),
        ("model.embed_tokens.weight", "missing.*model.embed_tokens.weight"),
    ],
)
def test_a_missing_tensor_is_named(model, tmp_path, dialect, name, said):
    folder = save_model(model, tmp_path / "checkpoint", dialect=dialect)
    theirs = name
    if dialect == "new":
        theirs = f"model.{name}" if name.startswith("visual") else name.replace("model.", "model.language_model.", 1)

    def without(tensors):
        del tensors[theirs]
        return tensors

    edit_checkpoint(folder, without)
    target = tmp_path / "engines"
    target.mkdir()
    with pytest.raises(CheckpointError, match=said):
        export_onnx(Checkpoint(folder), target, torch.float32)
    assert not list(target.iterdir()), "refused before anything is written"


def test_a_misshapen_tensor_is_named(folder):
    def wider(tensors):
        name = "model.visual.merger.mlp.0.bias"
        return tensors | {name: torch.zeros(len(tensors[name]) + 1)}

    edit_checkpoint(folder, wider)
    checkpoint = Checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"misshapen \(model.visual.merger.mlp.0.bias \[257\] instead of \[256\]"):
        check_fit(checkpoint, graphs(checkpoint))


def test_a_weight_of_a_type_that_no_graph_takes_is_named(folder, tmp_path):
    def precise(tensors):
        return tensors | {"model.visual.merger.ln_q.weight": tensors["model.visual.merger.ln_q.weight"].double()}

    edit_checkpoint(folder, precise)
    with pytest.raises(CheckpointError, match=r"model.visual.merger.ln_q.weight.*float64"):
        export_onnx(Checkpoint(folder), tmp_path, torch.float32)


@pytest.fixture
def no_trace(monkeypatch):
    """Without the seconds that tracing takes; nothing after it matters to these tests."""
    monkeypatch.setattr(onnx_model, "trace", lambda graph, dtype: None)
    monkeypatch.setattr(onnx_model, "point_to_checkpoint", lambda *arguments: None)


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_while_a_graph_is_written(folder, tmp_path, monkeypatch, no_trace):
    monkeypatch.setattr(onnx_model.ir, "save", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        export_onnx(Checkpoint(folder), tmp_path, torch.float32)


def test_a_disk_that_fills_up_while_weights_are_copied(folder, tmp_path, monkeypatch, no_trace):
    monkeypatch.setattr(weights.shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        export_onnx(Checkpoint(folder), tmp_path, torch.float32)


def test_steps_are_told_in_order(folder, tmp_path, monkeypatch, no_trace):
    monkeypatch.setattr(onnx_model.ir, "save", lambda model, path: path.touch())
    steps = []
    written = export_onnx(Checkpoint(folder), tmp_path, torch.float32, on_step=steps.append)
    assert tuple(steps) == onnx_model.STEPS
    assert [path.name for path in written] == ["vision.onnx", "decoder.onnx"]
    shutil.rmtree(folder)  # the engine folder stands alone
    assert Checkpoint(tmp_path).names
