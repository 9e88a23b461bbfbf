"""Vision embeddings of images, written to a safetensors file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from qwen2vl_trt.errors import BuildError, MediaError

from .pipeline import Pipeline


def save_features(pipeline: Pipeline, images: Sequence[str | Path], output: Path) -> None:
    """Embed images and write one tensor ``[tokens, hidden]`` an image, named by its path as given.

    The file appears whole or not at all.

    Raises:
        MediaError: an image cannot be read, or is given twice.
        LimitError: an image is outside the engine's profile.
        BuildError: the file cannot be written.
    """
    names = [str(image) for image in images]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise MediaError(f"{twice} is given twice")
    embeddings = pipeline.embed_images(images)
    temporary = output.with_name(f".{output.name}.part")
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in zip(names, embeddings)}, temporary)
        temporary.replace(output)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise BuildError(f"{output} cannot be written: {' '.join(str(error).split())}") from None
