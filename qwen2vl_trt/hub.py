"""From what a user calls a model to a checkpoint folder on this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError

TINY = "tiny"
SIZES = ("3B", "7B", "32B", "72B")
HUB_MODELS = {f"Qwen2.5-VL-{size}": f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in SIZES}

# What a checkpoint needs. No *.bin and no *.pth: some repositories carry the weights twice.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class ResolvedModel:
    """A model found on this machine.

    Attributes:
        name: safe as part of a folder name; one model has one name however it was spelled.
        folder: its checkpoint, in the layout of Hugging Face.
        revision: commit of the hub, or None for a folder that came from elsewhere.
    """

    name: str
    folder: Path
    revision: str | None = None


def resolve_model(name: str | Path, revision: str | None = None) -> ResolvedModel:
    """Find a model, downloading it where it is one of the hub's and not yet in the hub's cache.

    Args:
        name: ``tiny`` (ships with the project), ``Qwen2.5-VL-{3B,7B,32B,72B}`` with or without ``-Instruct``,
            a hub id ``Org/Name``, or a folder. The names win over folders of the same name (write ``./tiny`` for
            a folder); a folder wins over a hub id.
        revision: branch, tag or commit; only a hub model has one.

    Raises:
        CheckpointError: unknown name, no such folder, or the hub cannot deliver it.
    """
    text = str(name)
    alias = _alias(text)
    folder = Path(text).expanduser()
    if alias == TINY:
        found = ResolvedModel(TINY, _tiny_folder())
    elif alias is not None:
        return _from_hub(alias, HUB_MODELS[alias], revision)
    elif text and folder.is_dir():
        found = ResolvedModel(_safe_name(folder), folder)
    elif isinstance(name, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise CheckpointError(f"{name}: there is no such folder")
    elif _HUB_ID.fullmatch(text):
        return _from_hub(text.replace("/", "--"), text, revision)
    else:
        raise CheckpointError(
            f"unknown model {text!r}; known are {', '.join([TINY, *HUB_MODELS])},"
            " any hub id (Org/Name) and the path of a checkpoint folder"
        )
    if revision is not None:
        raise CheckpointError(f"model {text!r} has no revision {revision!r}: only a model of the hub has revisions")
    return found


def _alias(text: str) -> str | None:
    """``tiny`` or the short name of a published model, whatever its spelling; None for everything else."""
    spelling = text.lower().removeprefix("qwen/").removesuffix("-instruct")
    known = {alias.lower(): alias for alias in HUB_MODELS}
    return TINY if text.lower() == TINY else known.get(spelling)


def _tiny_folder() -> Path:
    folder = Path(__file__).resolve().parent.parent / "tiny" / "checkpoint"
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"the tiny model is not installed: {folder} has no config.json")
    return folder


def _safe_name(folder: Path) -> str:
    folder = folder.resolve()
    name = folder.name
    if folder.parent.name == "snapshots":  # a folder of the hub's cache: models--Org--Name/snapshots/commit
        name = folder.parent.parent.name.removeprefix("models--")
    return re.sub(r"[^\w.-]+", "_", name).strip("._-") or "model"


def _from_hub(name: str, repository: str, revision: str | None) -> ResolvedModel:
    from huggingface_hub import snapshot_download  # slow to import, and not needed for a local folder
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    instead = "The path of a checkpoint folder (config.json, *.safetensors, tokenizer files) serves as --model, too."
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=_PATTERNS))
    except GatedRepoError:
        problem = f"is gated: accept its terms at https://huggingface.co/{repository} and run 'hf auth login'"
    except RepositoryNotFoundError:
        problem = "is not on the Hugging Face hub, or is private ('hf auth login')"
    except RevisionNotFoundError:
        problem = f"has no revision {revision!r} on the Hugging Face hub"
    except HFValidationError:
        problem = "is no valid name on the Hugging Face hub"
    except (LocalEntryNotFoundError, ConnectionError):
        problem = "is not in the local cache, and the Hugging Face hub (huggingface.co) cannot be reached"
    except (HfHubHTTPError, OSError) as error:
        problem = f"could not be fetched from the Hugging Face hub: {' '.join(str(error).split())}"
    else:
        return ResolvedModel(name, folder, folder.name)
    raise CheckpointError(f"{repository} {problem}. {instead}")
