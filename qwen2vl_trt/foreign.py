"""Folders that are no Qwen2.5-VL that can be read: other models and formats, incomplete downloads."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from .config import read_json
from .errors import CheckpointError

ADAPTER_FILE = "adapter_config.json"

_FAMILIES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL",
    "qwen2_5_omni": "Qwen2.5-Omni",
    "qwen2_5_omni_thinker": "Qwen2.5-Omni",
    "qwen3_omni_moe": "Qwen3-Omni",
    "qwen2_5_vl_text": "the text half of Qwen2.5-VL alone",
    "qwen2": "Qwen2 or Qwen2.5 without vision",
    "qwen2_moe": "Qwen2 without vision",
    "qwen3": "Qwen3 without vision",
    "qwen3_moe": "Qwen3 without vision",
}
"""By ``model_type``: what is easily taken for a Qwen2.5-VL."""


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder that is known to be something else.

    What it does not know it leaves to the reading of ``config.json``.

    Raises:
        CheckpointError: an adapter, GGUF, no ``config.json``, another model of Qwen's, or a quantisation that is not
            read.
    """
    if (folder / ADAPTER_FILE).is_file():
        adapter = read_json(folder / ADAPTER_FILE)
        kind, base = (_word(adapter.get(name)) for name in ("peft_type", "base_model_name_or_path"))
        raise CheckpointError(
            f"{folder} holds an adapter ({kind or 'PEFT'}, {ADAPTER_FILE}): give it with the model that it was trained"
            f" on, {shlex.join(['--model', base or 'MODEL', '--lora', str(folder)])}"
        )
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf and not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} {gguf_in_words(gguf[0])}")
    if not (folder / "config.json").is_file():
        nested = sorted(path.parent for parent in ("*", "snapshots/*") for path in folder.glob(f"{parent}/config.json"))
        if nested:
            raise CheckpointError(f"{folder} is no checkpoint: it has no config.json. Its folder {nested[-1]} has one")
        raise lacking(folder, "is no checkpoint: it has no config.json")
    config = read_json(folder / "config.json")
    family = _FAMILIES.get(_word(config.get("model_type")))
    if family is not None:
        raise CheckpointError(
            f"{folder} is {family} (model_type {config['model_type']!r}); Qwen2.5-VL alone is supported"
            " (Qwen2.5-VL-3B, for one). Transformers and vLLM run it"
        )
    from .quantized.formats import stated_format  # it imports PyTorch

    stated_format(folder)


def gguf_in_words(name: str) -> str:
    """What is said of a folder or a repository with a GGUF file of this name."""
    return (
        f"holds GGUF, llama.cpp's format ({name}), which is not read: take the checkpoint that it was made from"
        " (config.json, *.safetensors, tokenizer files)"
    )


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""


def lacking(folder: Path, what: str) -> CheckpointError:
    """The error of a folder that lacks a file: an incomplete download where huggingface_hub has put files there.

    Args:
        folder: a snapshot in its cache, the ``--local-dir`` of a download, or any other.
        what: as in "has no weights".
    """
    real = folder.resolve()
    storage = real.parent.parent
    if real.parent.name == "snapshots" and (storage / "blobs").is_dir():
        command = f"hf download {repository_of(storage)}"
    elif (real / ".cache" / "huggingface" / "download").is_dir():
        command = "hf download ... --local-dir"
    else:
        return CheckpointError(f"{folder} {what}")
    return CheckpointError(f"{folder}: incomplete download: it {what}; `{command}` fetches the rest")


def repository_of(storage: Path) -> str:
    """The repository whose files a folder ``models--Org--Name`` of the cache holds."""
    return storage.name.removeprefix("models--").replace("--", "/", 1)


def is_cut_short(storage: Path) -> bool:
    """Whether a folder ``models--Org--Name`` of the cache holds parts of a download."""
    return any((storage / "blobs").glob("*.incomplete")) or any(storage.glob("snapshots/*/*"))
