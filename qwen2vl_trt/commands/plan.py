"""GPUs, tensor parallelism, batch, cache and throughput, on paper: counts over fractions of the GPU's rates."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, fields, replace
from typing import Any

from qwen2vl_trt.engines.profile import usual_profile
from qwen2vl_trt.planning.arithmetic import arithmetic, summary
from qwen2vl_trt.planning.capacity import TP_SIZES, Assumptions, Load, plan
from qwen2vl_trt.planning.counts import LAYER_BYTES
from qwen2vl_trt.planning.tables import find_config, find_gpu

from .options import positive_number, whole_number

_PUBLISHED_MAX_PIXELS = 12_845_056
"""Of the published checkpoints' preprocessor; engines built with the limits in ``configs/`` take less."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="tiny, Qwen2.5-VL-{3B,7B,32B,72B}, or a checkpoint folder"
    )
    parser.add_argument(
        "--gpu", required=True, metavar="NAME", help="as in qwen2vl_trt/planning/gpus.yaml: H200, H100, L40S, ..."
    )
    parser.add_argument(
        "--images-per-second", type=float, required=True, metavar="N", help="the load, one image a request"
    )
    parser.add_argument(
        "--output-tokens",
        type=whole_number,
        required=True,
        metavar="N",
        help="of an answer; 0: vision features, no decoder",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the arithmetic")
    group = parser.add_argument_group("load")
    group.add_argument("--image-size", type=_size, default=(448, 448), metavar="HxW", help="in pixels; default 448x448")
    group.add_argument(
        "--max-pixels",
        type=positive_number,
        metavar="N",
        help="shrink larger images; default the checkpoint's; at most what engines built by configs/ take",
    )
    group.add_argument(
        "--prompt-tokens", type=whole_number, default=32, metavar="N", help="text and template; default %(default)s"
    )
    group = parser.add_argument_group("engines")
    group.add_argument("--precision", choices=LAYER_BYTES, default="bf16", help="default %(default)s")
    group.add_argument("--tp-size", type=int, choices=TP_SIZES, help="default: whichever needs fewest GPUs")
    group.add_argument(
        "--max-seq-len",
        type=positive_number,
        metavar="N",
        help="tokens of a cache slot; default a request's, up to a multiple of 64",
    )
    group.add_argument(
        "--max-num-seqs",
        type=positive_number,
        default=256,
        metavar="N",
        help="most answers decoded together; default %(default)s",
    )
    group = parser.add_argument_group("assumptions")
    for name, what in (
        ("vision", "of the matrix-product rate, vision tower"),
        ("prefill", "of the matrix-product rate, prompts"),
        ("decode", "of the bandwidth, decoding"),
        ("tp", "of twice the speed, for each doubling of tp_size"),
        ("reserve", "of the memory, kept free"),
    ):
        group.add_argument(
            f"--{name}-fraction",
            type=float,
            default=getattr(Assumptions, name),
            metavar="F",
            help=f"{what}; assumed %(default)s",
        )


def run(arguments: argparse.Namespace) -> None:
    """Print how many GPUs a load needs, with the arithmetic.

    Raises:
        PlanError: an unknown GPU or model, or a model that fits in no way.
        CheckpointError: a checkpoint folder without a readable configuration.
        MediaError: an image size that the model does not take.
    """
    from qwen2vl_trt.hub import find_local, published_name
    from qwen2vl_trt.runtime.preprocessing.settings import PixelSettings, PreprocessorSettings
    from qwen2vl_trt.runtime.preprocessing.sizes import SizeRules

    config, gpu, local = find_config(arguments.model), find_gpu(arguments.gpu), find_local(arguments.model)
    published = PreprocessorSettings(image=PixelSettings(max_pixels=_PUBLISHED_MAX_PIXELS))
    settings = PreprocessorSettings.from_folder(local.folder) if local else published
    settings = settings.with_limits(max_pixels=arguments.max_pixels)
    settings = replace(settings, profile=usual_profile(local.name if local else published_name(arguments.model)))
    _, rows, columns = SizeRules(config.vision, settings).image(*arguments.image_size, name="--image-size").grid
    load = Load(
        rows=rows,
        columns=columns,
        text_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        images_per_second=arguments.images_per_second,
        max_seq_len=arguments.max_seq_len,
        max_num_seqs=arguments.max_num_seqs,
    )
    assumptions = Assumptions(
        **{field.name: getattr(arguments, f"{field.name}_fraction") for field in fields(Assumptions)}
    )
    found = plan(config, gpu, load, arguments.precision, arguments.tp_size, assumptions)
    if arguments.json:
        answer: dict[str, Any] = {"model": arguments.model, "precision": arguments.precision, "gpus": found.gpus}
        answer |= {"gpu": asdict(gpu), "load": asdict(load), "assumptions": asdict(assumptions), "plan": asdict(found)}
        print(json.dumps(answer))
        return
    print("\n".join(arithmetic(config, gpu, load, arguments.precision, assumptions, found)))
    print(summary(gpu, load, arguments.precision, found))


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; 448x448 is height by width in pixels")
    return int(found[1]), int(found[2])
