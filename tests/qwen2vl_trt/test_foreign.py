"""Folders that people give as a model and that are none: each is named for what it is, with the way out."""

import json
import shutil

import pytest

from qwen2vl_trt.checkpoint import INDEX_FILE, Checkpoint
from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.tokenizer import check_tokenizer_files
from tests.support.models import MINIMAL_CONFIG, model_config, random_model, save_model


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def write(folder, **files):
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen2_vl", "is Qwen2-VL"),
        ("qwen3_vl", "is Qwen3-VL"),
        ("qwen3_vl_moe", "is Qwen3-VL"),
        ("qwen2_5_omni", "is Qwen2.5-Omni"),
        ("qwen2", "is Qwen2 or Qwen2.5 without vision"),
        ("qwen2_5_vl_text", "is the text half of Qwen2.5-VL"),
    ],
)
def test_other_models_of_qwens(tmp_path, model_type, name):
    message = refusal(write(tmp_path, config__json={"model_type": model_type}))
    assert name in message
    assert f"model_type '{model_type}'" in message
    assert "Qwen2.5-VL alone is supported" in message


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes (4 bits)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes (8 bits)"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "Transformers' block-wise FP8"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"group_size": 64, "bits": 4}, "MLX"),
        ({"quant_method": ["awq"]}, "an unknown method"),
        ([], "an unknown method"),
    ],
    ids=str,
)
def test_quantisations_that_are_not_read(tmp_path, config, name):
    message = refusal(write(tmp_path, config__json=MINIMAL_CONFIG | {"quantization_config": config}))
    assert f"is quantised by {name}; AWQ, GPTQ" in message
    assert "can be read. Take the unquantised checkpoint: --precision fp8, int8, int4 or nvfp4 quantises it" in message
    assert ("model.dequantize()" in message) == (name.startswith("bitsandbytes"))


def test_quantisations_that_older_tools_note_elsewhere(tmp_path):
    write(tmp_path, config__json=MINIMAL_CONFIG | {"quantization": {"group_size": 64, "bits": 4}})
    assert "is quantised by MLX" in refusal(tmp_path)
    for file, name in (("quant_config__json", "AWQ"), ("quantize_config__json", "GPTQ")):
        write(tmp_path, config__json=MINIMAL_CONFIG, **{file: {"w_bit": 4}})
        assert f"is quantised by {name}, which {file.replace('__', '.')} says and config.json does not" in refusal(
            tmp_path
        )


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_an_adapter(tmp_path, beside_a_model):
    """Beside a model too: Transformers applies it there, so to leave it out would change the answers."""
    if beside_a_model:
        save_model(random_model(model_config()), tmp_path)
    base = "my models/3B"
    message = refusal(write(tmp_path, adapter_config__json={"peft_type": "LORA", "base_model_name_or_path": base}))
    assert "holds an adapter (LORA, adapter_config.json): give it" in message
    assert message.endswith(f"--model 'my models/3B' --lora {tmp_path}")
    assert "--model MODEL --lora" in refusal(write(tmp_path, adapter_config__json={}))


@pytest.mark.parametrize("config", [{}, {"config__json": MINIMAL_CONFIG}], ids=["alone", "with a configuration"])
def test_gguf(tmp_path, config):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    message = refusal(write(tmp_path, **config))
    assert "holds GGUF, llama.cpp's format (model-Q4_K_M.gguf), which is not read" in message


@pytest.mark.parametrize("inner", ["checkpoint-100", "snapshots/0123abcd"])
def test_a_folder_around_the_checkpoint(tmp_path, inner):
    (tmp_path / inner).mkdir(parents=True)
    write(tmp_path / inner, config__json=MINIMAL_CONFIG)
    assert refusal(tmp_path).endswith(f"it has no config.json. Its folder {tmp_path / inner} has one")


@pytest.fixture(params=["cache", "local-dir"])
def download(request, tmp_path):
    """A whole download, as huggingface_hub leaves it in its cache or in a folder of the user's, and what to run."""
    whole = save_model(random_model(model_config()), tmp_path / "whole", shards=3)
    (whole / "tokenizer.json").write_text("{}")
    if request.param == "local-dir":
        (whole / ".cache" / "huggingface" / "download").mkdir(parents=True)
        return whole, "hf download ... --local-dir"
    storage = tmp_path / "hub" / "models--Org--Name-7B"
    snapshot = storage / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (storage / "blobs").mkdir()
    for number, path in enumerate(sorted(whole.iterdir())):
        path.rename(storage / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot, "hf download Org/Name-7B"


def test_a_download_that_was_cut_short(download):
    folder, command = download
    assert Checkpoint(folder).names
    for missing, what in (
        ("model-00002-of-00003.safetensors", f"has 2 of the 3 shards that {INDEX_FILE} names"),
        ("model-00003-of-00003.safetensors", f"has 1 of the 3 shards that {INDEX_FILE} names"),
        (INDEX_FILE, "has no weights"),
        ("config.json", "has no config.json"),
    ):
        (folder / missing).unlink()
        message = refusal(folder)
        assert f"{folder}: incomplete download: it " in message
        assert what in message
        assert f"`{command}` fetches the rest" in message
    with pytest.raises(CheckpointError, match="incomplete download: it has no chat template"):
        check_tokenizer_files(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="incomplete download: it has no tokenizer"):
        check_tokenizer_files(folder)


def test_a_blob_that_was_deleted(download):
    """A link that leads nowhere."""
    folder, _ = download
    if folder.parent.name != "snapshots":
        pytest.skip("no links there")
    (folder / "model-00001-of-00003.safetensors").resolve().unlink()
    assert "incomplete download" in refusal(folder)


def test_another_folder_is_no_download(tmp_path):
    folder = save_model(random_model(model_config()), tmp_path / "copied", shards=2)
    next(folder.glob("*.safetensors")).unlink()
    assert "incomplete download" not in refusal(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    assert refusal(folder) == f"{folder} is no checkpoint: it has no config.json"
