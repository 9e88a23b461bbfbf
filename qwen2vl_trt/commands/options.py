"""Options that commands share: how each is spelt, and what an object of the library it becomes.

Nothing here imports PyTorch: ``--help`` and wrong options end in a tenth of a second.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import qwen2vl_trt
from qwen2vl_trt.engines.backends import BACKENDS
from qwen2vl_trt.engines.options import ATTENTION_MASKS, EITHER_MASK, HARDWARE_COMPATIBILITY, VISION_BACKENDS
from qwen2vl_trt.engines.precision import FP16_REFUSED, QUANT_METHODS
from qwen2vl_trt.engines.profile import BuildProfile, flag
from qwen2vl_trt.errors import MediaError, reason, shortened
from qwen2vl_trt.media_options import ImageOptions, VideoOptions
from qwen2vl_trt.runtime.options import PipelineOptions
from qwen2vl_trt.runtime.sampling_params import SamplingParams
from qwen2vl_trt.runtime.structured_outputs import StructuredOutputsParams

from .process import USAGE

_LIMITS = {
    "min_hw_dims": "fewest patches h*w of one image",
    "max_hw_dims": "most patches h*w of one image",
    "max_batch_size": "most images or frames a vision call",
    "max_num_seqs": "most requests under way: rows of the decoder's batch and of the key-value cache",
    "max_input_len": "most tokens of a prompt, image tokens included",
    "max_seq_len": "most tokens of a prompt and its answer",
}
_MEDIA = {
    "resized_height": "of every image and frame, with --resized-width, instead of a size that follows from the area",
    "resized_width": "likewise",
    "fps": "frames to keep of each second of a video",
    "nframes": "frames to keep of a video, instead of a rate",
    "min_frames": "fewest frames to keep",
    "max_frames": "most frames to keep",
    "total_pixels": "largest area of all frames of a video together",
    "video_start": "keep nothing before this second of a video",
    "video_end": "keep nothing after it",
}
_SECONDS = ("fps", "video_start", "video_end")


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the options in one line, without a page of usage before it; has ``--version``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument("--version", action="version", version=f"qwen2vl-trt {qwen2vl_trt.__version__}")

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {shortened(message)} (options: {self.prog} --help)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """As argparse does, but for the errors of a full disk, which it drops."""
        if message:
            file.write(message)


def whole_number(text: str) -> int:
    """The type of an option that takes 0, 1, 2 and so on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def positive_number(text: str) -> int:
    """The type of an option that takes 1, 2, 3 and so on."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def text_of_file(name: str) -> str:
    """The type of an option that names a file of text: what it holds."""
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, a null byte
        raise argparse.ArgumentTypeError(f"{name}: {reason(error)}") from None


def path_name(text: str) -> Path:
    """The type of an option that names a file or a folder, one that is there or one to make."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty ('.' is the current folder)")
    found = Path(text)
    try:
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        if found.is_symlink():
            raise argparse.ArgumentTypeError(f"{text} is a link to {found.readlink()}, which is not there") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise argparse.ArgumentTypeError(f"{text}: {getattr(error, 'strerror', None) or error}") from None
    return found


def folder_name(text: str) -> Path:
    """The type of an option that names a folder, one that is there or one to make."""
    found = path_name(text)
    if found.exists() and not found.is_dir():
        kind = "a file" if found.is_file() else "a pipe or a device"
        raise argparse.ArgumentTypeError(f"{text} is {kind}; a folder is needed")
    return found


def precision_name(text: str) -> str:
    """The type of ``--precision``; whether a backend has it is seen when that is known."""
    names = dict.fromkeys(precision.name for backend in BACKENDS.values() for precision in backend.precisions)
    if text not in names:
        known = f"{text!r} is none; known: {', '.join(names)}"
        raise argparse.ArgumentTypeError(FP16_REFUSED if text == "fp16" else known)
    return text


def add_build_arguments(parser: argparse.ArgumentParser, device: bool = True) -> None:
    """Add what :meth:`qwen2vl_trt.building.plan.BuildRequest.from_arguments` reads; ``device``: the engines are run."""
    group = parser.add_argument_group("model and engines")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="tiny (default), Qwen2.5-VL-{3B,7B,32B,72B}, a hub id Org/Name, or a checkpoint folder",
    )
    usual = (
        "by default the fastest here: on a GPU tensorrt where it is installed, else torch;"
        " on a CPU torch where it multiplies faster in bf16, else onnxruntime"
    )
    group.add_argument("--backend", choices=BACKENDS, help=usual)
    usual = "by default that of a quantised checkpoint, else the backend's first (torch: fp32 on a CPU without bf16)"
    precisions = (f"{each.name} {', '.join(one.name for one in each.precisions)}" for each in BACKENDS.values())
    group.add_argument("--precision", type=precision_name, metavar="NAME", help=f"{usual}: {'; '.join(precisions)}")
    if device:
        group.add_argument("--device", help="cpu, cuda, cuda:1; by default a GPU where the backend can use one")
    group.add_argument(
        "--engine-dir", type=folder_name, metavar="DIR", help="default artifacts/MODEL-BACKEND-PRECISION"
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument(
        "--lora",
        type=folder_name,
        metavar="DIR",
        help="LoRA adapter in PEFT's layout, merged into the model as it is built",
    )
    group.add_argument("--force", action="store_true", help="build, and replace the engines that are in the folder")
    group = parser.add_argument_group("limits of the engines")
    group.add_argument(
        "--config", type=path_name, metavar="YAML", help="model and limits from a file like configs/*.yaml"
    )
    for name in BuildProfile.names():
        group.add_argument(flag(name), type=int, metavar="N", help=_LIMITS[name])
    group = parser.add_argument_group(
        "quantisation (of a model that is not quantised, with --precision fp8, int8, int4 or nvfp4)"
    )
    group.add_argument(
        "--calibration-data",
        type=folder_name,
        metavar="DIR",
        help="fp8, int4: images, and prompts.jsonl; tiny has its training images",
    )
    group.add_argument(
        "--calibration-size", type=int, metavar="N", help="most of them to take (default: fp8 512, int4 128)"
    )
    group.add_argument(
        "--quant-method",
        choices=QUANT_METHODS,
        help="int4: AWQ's scaling by Model Optimizer (default), or round to nearest, without calibration data",
    )
    group = parser.add_argument_group("TensorRT")
    group.add_argument("--builder-optimization-level", type=int, metavar="N", help="0 (fast build) to 5")
    group.add_argument("--strip-weights", action="store_true", default=None, help="plans without weights (tensorrt)")
    group.add_argument("--weight-streaming", action="store_true", default=None, help="weights may stay on the host")
    group.add_argument("--hardware-compatibility", choices=HARDWARE_COMPATIBILITY, help="of the plans (tensorrt)")
    group.add_argument(
        "--compute-capabilities", nargs="+", metavar="CC", help="GPUs to build for: 8.9 12.0 (tensorrt-rtx)"
    )
    group.add_argument(
        "--attention-mask",
        choices=(*ATTENTION_MASKS, EITHER_MASK),
        help=f"default {ATTENTION_MASKS[0]}; see docs/design/tensorrt.md",
    )
    group = parser.add_argument_group("TensorRT-LLM")
    group.add_argument("--tp-size", type=int, metavar="N", help="GPUs that share each layer (default 1)")
    group.add_argument(
        "--max-num-tokens", type=int, metavar="N", help="most tokens a step (default 8192, or --max-input-len)"
    )
    group.add_argument("--vision-backend", choices=VISION_BACKENDS, help="of the vision engine (default torch)")


def add_decode_argument(parser: argparse._ActionsContainer) -> None:
    """Add ``--decode``, see :class:`~qwen2vl_trt.runtime.options.PipelineOptions`."""
    parser.add_argument(
        "--decode", choices=("cpu", "gpu"), default="cpu", help="where JPEG files are decoded; default %(default)s"
    )


def add_pipeline_arguments(
    parser: argparse.ArgumentParser, files: bool = True, videos: bool = False, media: bool = False
) -> None:
    """Add the options that :func:`pipeline_options` reads.

    Args:
        files: the command reads image files, and takes ``--decode``.
        videos: it has videos.
        media: and those that :func:`media_options` reads.
    """
    group = parser.add_argument_group("images and videos")
    group.add_argument("--min-pixels", type=int, metavar="N", help="enlarge smaller images; default the checkpoint's")
    group.add_argument("--max-pixels", type=int, metavar="N", help="shrink larger images; default the checkpoint's")
    if media:
        for name, text in _MEDIA.items():
            kind, metavar = (float, "S") if name in _SECONDS else (int, "N")
            group.add_argument(flag(name), type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--strict-size", action="store_true", help="refuse what does not fit the engines instead of resizing it"
    )
    if videos:
        group.add_argument(
            "--no-cap-pixels-per-frame",
            dest="cap_pixels_per_frame",
            action="store_false",
            help="frames of a video may be as large as images where the checkpoint has no limits for them;"
            " default 128 to 768 tokens a frame",
        )
        group.add_argument(
            "--video-pixel-limit",
            type=int,
            metavar="N",
            default=PipelineOptions.video_pixel_limit,
            help="most pixels of a video's frames that are kept, together; larger frames are shrunk; default"
            " %(default)s",
        )
        group.add_argument(
            "--video-decode-seconds",
            type=float,
            metavar="S",
            default=PipelineOptions.video_decode_seconds,
            help="most seconds of reading and decoding a video; default %(default)g",
        )
    group.add_argument(
        "--image-pixel-limit",
        type=int,
        metavar="N",
        default=PipelineOptions.image_pixel_limit,
        help="most pixels of an image file, looked at before it is decoded; default %(default)s",
    )
    if files:
        add_decode_argument(group)
    else:
        parser.set_defaults(decode="cpu")
    group = parser.add_argument_group("text")
    group.add_argument(
        "--allow-special-tokens",
        action="store_true",
        help="read <|im_end|> and the like in a text as control tokens; by default they are plain text. Added tokens"
        " that the tokenizer does not call special (<tool_call>, <|fim_prefix|>) are tokens either way",
    )
    group.add_argument(
        "--chat-template",
        type=text_of_file,
        metavar="FILE",
        help="Jinja in place of the checkpoint's chat template; examples/tools.jinja is Qwen2.5-VL's with tools",
    )
    group.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        help="none leaves the checkpoint's defaults of sampling out: greedy where no option says otherwise;"
        " default %(default)s",
    )


def pipeline_options(arguments: argparse.Namespace) -> PipelineOptions:
    """What the options say.

    Raises:
        LimitError: a value that is not allowed.
    """
    names = {each.name for each in fields(PipelineOptions)} - {"max_num_tokens"}  # an option of TensorRT-LLM's build
    given = {name: value for name, value in vars(arguments).items() if name in names}
    given["lora_modules"] = dict(given.get("lora_modules") or ())
    return PipelineOptions(**given)


def check_decode(decode: str, device: str | None) -> None:
    """See before the minutes of a build whether JPEG files can be decoded as ``--decode`` says; no device: any GPU.

    Raises:
        MediaError: ``gpu``, and the device is none.
        MissingDependencyError: nvImageCodec is not installed.
    """
    if decode == "gpu":
        import torch

        from qwen2vl_trt.runtime.inputs.jpeg_decoder import check_gpu_decoding

        check_gpu_decoding(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def media_options(arguments: argparse.Namespace) -> tuple[ImageOptions, VideoOptions]:
    """What a request says about all its images and videos.

    Raises:
        MediaError: a value out of its range, two that contradict each other, or an option of what is not there.
    """
    given = {name: getattr(arguments, name) for name in _MEDIA}
    of_images = {each.name for each in fields(ImageOptions)}
    for name in (*given, "min_pixels", "max_pixels"):
        kinds = ["image"] * (name in of_images) + ["video"] * (name != "min_pixels")  # which is never of frames
        if getattr(arguments, name) is not None and not any(getattr(arguments, kind) for kind in kinds):
            flags = " or ".join(f"--{kind}" for kind in kinds)
            raise MediaError(f"{flag(name)} has nothing to act on; add {flags}, or leave it out")
    return (
        ImageOptions(**{name: value for name, value in given.items() if name in of_images}),
        VideoOptions(**given),
    )


def add_sampling_arguments(group: argparse._ActionsContainer) -> None:
    """Add one option for each of :class:`~qwen2vl_trt.runtime.sampling_params.SamplingParams`."""
    group.add_argument("--max-tokens", type=int, metavar="N", help="of an answer; default the checkpoint's, or 256")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy; default the checkpoint's")
    group.add_argument("--top-p", type=float, metavar="P", help="1 is off; default the checkpoint's")
    group.add_argument("--top-k", type=int, metavar="K", help="0 is off; default the checkpoint's")
    group.add_argument("--min-p", type=float, metavar="P", help="0 is off; default the checkpoint's")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="1 is off; default the checkpoint's")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="of the answer's tokens; 0, off, by default")
    group.add_argument(
        "--frequency-penalty", type=float, metavar="X", help="likewise, for each time; 0, off, by default"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of an answer's draws; by default another each time")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before this text; default the checkpoint's"
    )
    group.add_argument(
        "--stop-token-ids", type=whole_number, nargs="+", metavar="ID", help="end the answer after one of these tokens"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")
    group.add_argument(
        "--logit-bias",
        type=_token_bias,
        nargs="+",
        metavar="ID=X",
        help="add X, -100 to 100, to the logits of token ID",
    )
    form = group.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=text_of_file, metavar="FILE", help="the answer is JSON that keeps to it")
    form.add_argument("--json-object", action="store_true", help="the answer is a JSON object")
    form.add_argument("--regex", metavar="TEXT", help="the whole answer matches it (Rust's syntax)")
    form.add_argument("--choice", action="append", metavar="TEXT", help="the answer is one of these; repeat")
    form.add_argument("--grammar", type=text_of_file, metavar="FILE", help="the answer follows it (Lark or GBNF)")


def _token_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no ID=X, a token and what to add to its logit") from None


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """What the options say.

    Raises:
        SamplingError: a value that is not allowed.
    """
    given: dict[str, Any] = {each.name: getattr(arguments, each.name, each.default) for each in fields(SamplingParams)}
    given["logit_bias"] = dict(arguments.logit_bias) if arguments.logit_bias else None
    form: dict[str, Any] = {
        "json": arguments.json_schema,
        "json_object": arguments.json_object,
        "regex": arguments.regex,
        "choice": arguments.choice,
        "grammar": arguments.grammar,
    }
    if any(value not in (None, False) for value in form.values()):
        given["structured_outputs"] = StructuredOutputsParams(**form)
    return SamplingParams(**given)
