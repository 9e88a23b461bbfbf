"""From what a user calls a model to a checkpoint folder on this machine."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from .config import Qwen2VLConfig
from .errors import CheckpointError, reason
from .foreign import ADAPTER_FILE, gguf_in_words, is_cut_short, refuse_foreign

logger = logging.getLogger(__name__)

TINY = "tiny"
SIZES = ("3B", "7B", "32B", "72B")
HUB_MODELS = {f"Qwen2.5-VL-{size}": f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in SIZES}

# What a checkpoint needs. No *.bin and no *.pth: some repositories carry the weights twice.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
_FIRST = ["config.json", ADAPTER_FILE]
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
        name: a checkpoint folder, ``tiny`` (ships with the project), ``Qwen2.5-VL-{3B,7B,32B,72B}`` with or without
            ``-Instruct``, or a hub id ``Org/Name``. A folder wins over a name, as in Transformers, and a log line says
            so; one without ``config.json`` does not stand in the way of ``tiny`` and the short names.
        revision: branch, tag or commit; only a hub model has one.

    Raises:
        CheckpointError: unknown name, no such folder, or the hub cannot deliver it or has another kind of model there.
    """
    text = str(name)
    found = find_local(name)
    if found is not None:
        if revision is not None:
            raise CheckpointError(
                f"model {text!r} is the folder {found.folder} and has no revision {revision!r}: only a model of the hub"
                " has revisions"
            )
        if _is_known(text) and found.folder == _path(text):
            logger.warning("--model %s is taken to be the folder %s here, not the hub's", text, found.folder)
        return found
    alias = published_name(text)
    if alias is not None:
        return _from_hub(alias, HUB_MODELS[alias], revision)
    if _path(text).is_file():
        raise CheckpointError(f"unknown model {text!r}: {_file_in_words(Path(text))}")
    if isinstance(name, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise CheckpointError(f"{name}: there is no such folder")
    if _HUB_ID.fullmatch(text):
        return _from_hub(text.replace("/", "--"), text, revision)
    raise CheckpointError(
        f"unknown model {text!r}; known are {', '.join([TINY, *HUB_MODELS])},"
        " any hub id (Org/Name) and the path of a checkpoint folder"
    )


def find_local(name: str | Path) -> ResolvedModel | None:
    """Find a model that needs no hub: a folder, or ``tiny``; None for every other name.

    Raises:
        CheckpointError: ``tiny`` is not installed, or the system refuses to look at a folder of that name.
    """
    text = str(name)
    folder = _path(text)
    try:
        if (folder / "config.json").is_file() if _is_known(text) else text and folder.is_dir():
            return ResolvedModel(_safe_name(folder), folder)
    except OSError as error:
        raise CheckpointError(f"model {text!r}: {reason(error)}") from None
    return ResolvedModel(TINY, _tiny_folder()) if text.lower() == TINY else None


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~name, and there is no such user
        return Path(text)


def _is_known(text: str) -> bool:
    return text.lower() == TINY or published_name(text) is not None


def published_name(text: str) -> str | None:
    """The short name of a published model, whatever its spelling; None for everything else."""
    spelling = text.lower().removeprefix("qwen/").removesuffix("-instruct")
    return {name.lower(): name for name in HUB_MODELS}.get(spelling)


def _file_in_words(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"{path} {gguf_in_words(path.name)}"
    return f"{path} is a file; a checkpoint is a folder with config.json"


def _tiny_folder() -> Path:
    folder = Path(__file__).resolve().parent / "tiny" / "checkpoint"
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
    from httpx import TransportError
    from huggingface_hub import list_repo_files, snapshot_download  # slow to import, and not needed for a local folder
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    instead = "The path of a checkpoint folder (config.json, *.safetensors, tokenizer files) serves as --model, too."
    try:
        first = Path(snapshot_download(repository, revision=revision, allow_patterns=_FIRST))
        if not any((first / file).is_file() for file in _FIRST):
            gguf = [file for file in list_repo_files(repository, revision=revision) if file.endswith(".gguf")]
            what = gguf_in_words(gguf[0]) if gguf else "is no checkpoint: it has no config.json on the hub"
            raise CheckpointError(f"{repository} {what}")
        refuse_foreign(first)  # here, before the gigabytes of another kind of model
        Qwen2VLConfig.from_folder(first)
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=_PATTERNS))
    except CheckpointError:
        raise
    except GatedRepoError:
        problem = f"is gated: accept its terms at https://huggingface.co/{repository} and run 'hf auth login'"
    except RepositoryNotFoundError:
        problem = "is not on the Hugging Face hub, or is private ('hf auth login')"
    except RevisionNotFoundError:
        problem = f"has no revision {revision!r} on the Hugging Face hub"
    except HFValidationError:
        problem = "is no valid name on the Hugging Face hub"
    except (LocalEntryNotFoundError, ConnectionError, TransportError):
        there = "an incomplete download" if is_cut_short(_storage(repository)) else "not"
        problem = f"is {there} in the local cache, and the Hugging Face hub (huggingface.co) cannot be reached"
    except OSError as error:
        problem = f"could not be fetched from the Hugging Face hub: {' '.join(str(error).split())}"
    else:
        return ResolvedModel(name, folder, folder.name)
    raise CheckpointError(f"{repository} {problem}. {instead}")


def _storage(repository: str) -> Path:
    """The folder of a repository in the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
