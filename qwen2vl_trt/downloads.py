"""What huggingface_hub leaves of a download that was cut short."""

from __future__ import annotations

from pathlib import Path

from .errors import CheckpointError


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
