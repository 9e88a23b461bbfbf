"""Vision embeddings of images, written to a safetensors file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save

from engines.progress import progress_bar
from qwen2vl_trt.errors import FeaturesError, MediaError

from .pipeline import Pipeline


def save_features(pipeline: Pipeline, images: Sequence[str | Path], output: Path) -> None:
    """Embed images and write one tensor ``[tokens, hidden]`` an image, named by its path as given.

    The file appears whole or not at all.

    Raises:
        MediaError: an image cannot be read, or is given twice.
        LimitError: an image is outside the engine's profile.
        FeaturesError: the file cannot be written.
    """
    check_output(output)
    names = [str(image) for image in images]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise MediaError(f"{twice} is given twice; each image's features are stored under its path")
    with progress_bar() as progress:
        task = progress.add_task("images", total=len(images))
        embeddings = pipeline.embed_images(images, lambda done: progress.update(task, completed=done))
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        # Not save_file: it makes a file that only its owner may read.
        temporary.write_bytes(save({name: tensor.contiguous().cpu() for name, tensor in zip(names, embeddings)}))
        temporary.replace(output)
    except OSError as error:
        raise FeaturesError(f"{output} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_output(output: Path) -> None:
    """See before the work whether the file can be written after it.

    Raises:
        FeaturesError: the folder is missing or cannot be written, or the file is a folder.
    """
    if output.is_dir():
        raise FeaturesError(f"{output} is a folder; --output names a file")
    if not output.parent.is_dir():
        raise FeaturesError(f"{output} cannot be written: there is no folder {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise FeaturesError(f"{output} cannot be written: the folder {output.parent} is read-only")
