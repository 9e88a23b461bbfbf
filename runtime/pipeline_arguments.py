"""The options of a pipeline as options of a command."""

from __future__ import annotations

import argparse

from .options import PipelineOptions


def add_decode_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--decode``, see :class:`~qwen2vl_trt.runtime.options.PipelineOptions`."""
    parser.add_argument(
        "--decode", choices=("cpu", "gpu"), default="cpu", help="where JPEG files are decoded; default %(default)s"
    )


def add_pipeline_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options that :func:`pipeline_options` reads, but ``--decode``, for commands that read image files."""
    parser.add_argument("--min-pixels", type=int, metavar="N", help="enlarge smaller images; default the checkpoint's")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="shrink larger images; default the checkpoint's")
    parser.add_argument(
        "--allow-special-tokens",
        action="store_true",
        help="read <|im_end|> and the like in a text as control tokens; by default they are plain text. Added tokens"
        " that the tokenizer does not call special (<tool_call>, <|fim_prefix|>) are tokens either way",
    )
    parser.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        help="none leaves the checkpoint's defaults of sampling out: greedy where no option says otherwise;"
        " default %(default)s",
    )
    parser.add_argument(
        "--no-cap-pixels-per-frame",
        dest="cap_pixels_per_frame",
        action="store_false",
        help="frames of a video may be as large as images where the checkpoint has no limits for them;"
        " default 128 to 768 tokens a frame",
    )
    parser.add_argument(
        "--strict-size", action="store_true", help="refuse what does not fit the engines instead of resizing it"
    )
    parser.add_argument(
        "--image-pixel-limit",
        type=int,
        metavar="N",
        default=PipelineOptions.image_pixel_limit,
        help="most pixels of an image file, looked at before it is decoded; default %(default)s",
    )


def pipeline_options(arguments: argparse.Namespace) -> PipelineOptions:
    """What the options say.

    Raises:
        LimitError: a value that is not allowed.
    """
    return PipelineOptions(
        min_pixels=arguments.min_pixels,
        max_pixels=arguments.max_pixels,
        allow_special_tokens=arguments.allow_special_tokens,
        generation_config=arguments.generation_config,
        cap_pixels_per_frame=arguments.cap_pixels_per_frame,
        strict_size=arguments.strict_size,
        image_pixel_limit=arguments.image_pixel_limit,
        decode=arguments.decode,
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
