"""Where JPEG files are decoded, as an option of a command."""

from __future__ import annotations

import argparse


def add_decode_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--decode``, see :class:`~runtime.pipeline.Pipeline`."""
    parser.add_argument(
        "--decode", choices=("cpu", "gpu"), default="cpu", help="where JPEG files are decoded; default %(default)s"
    )


def check_decode(decode: str, device: str | None) -> None:
    """See before the minutes of a build whether JPEG files can be decoded as ``--decode`` says.

    Args:
        decode: the option's value.
        device: what ``--device`` says; None is a GPU if there is one.

    Raises:
        MediaError: ``gpu``, and the device is none.
        MissingDependencyError: nvImageCodec is not installed.
    """
    if decode == "gpu":
        import torch

        from .inputs.jpeg_decoder import check_gpu_decoding

        check_gpu_decoding(device or ("cuda" if torch.cuda.is_available() else "cpu"))
