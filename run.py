#!/usr/bin/env python3
"""Ask a Qwen2.5-VL about images and videos, extract features, evaluate the tiny model, inspect engines, or plan."""

from __future__ import annotations

from qwen2vl_trt.engines.interrupts import begin

if __name__ == "__main__":
    begin()  # before the rest is imported

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2vl_trt.engines.command import Parser, folder_name, run_command, whole_number

if TYPE_CHECKING:
    from qwen2vl_trt.runtime.pipeline import Pipeline

COMMANDS = """commands:
  run.py [generate] --prompt TEXT [--image FILE ...] [--video FILE ...]   answer on stdout
  run.py features --input DIR|GLOB --output DIR                           features of any number of images
  run.py batch --input DIR|GLOB|URI --output DIR --task TASK              images or rows of tables, on many workers
  run.py eval                                                             accuracy of the tiny model
  run.py compare --engine-dir DIR                                         accuracy against Transformers
  run.py bench [vision|decoder|pipeline]                                  throughput, latency, memory
  run.py inspect DIR                                                      what an engine folder holds
  run.py plan --model NAME --gpu NAME --images-per-second N ...           how many GPUs a load needs

`run.py COMMAND --help` lists a command's options."""


def main() -> None:
    arguments = sys.argv[1:]
    commands = {
        "generate": generate,
        "features": features,
        "batch": batch,
        "eval": evaluate,
        "compare": compare,
        "bench": bench,
        "inspect": inspect,
        "plan": plan,
    }
    if not arguments or arguments[0].startswith("-"):
        generate(arguments)
    elif arguments[0] in commands:
        commands[arguments[0]](arguments[1:])
    else:
        Parser(prog="run.py").error(f"unknown command {arguments[0]!r}; there are {', '.join(commands)}")


def generate(argv: list[str]) -> None:
    from qwen2vl_trt.runtime.inputs.files import opened
    from qwen2vl_trt.runtime.media_arguments import add_media_arguments, media_options
    from qwen2vl_trt.runtime.request import Request
    from qwen2vl_trt.runtime.sampling_arguments import add_sampling_arguments, sampling_params

    parser = _parser("generate", "Answer a prompt about images and videos.")
    parser.add_argument("--prompt", required=True, help="<image> and <video> mark places; without, media come first")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="repeat for several")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="repeat for several")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="print answer, token_ids, finish_reason, sizes of the media and timings"
    )
    form.add_argument("--stream", action="store_true", help="print the answer as it comes")
    add_media_arguments(parser)
    add_sampling_arguments(parser)
    arguments = parser.parse_args(argv)
    params = sampling_params(arguments)
    image_options, video_options = media_options(arguments)
    request = Request(
        arguments.prompt,
        arguments.image,
        arguments.video,
        image_options=image_options,
        video_options=video_options,
    )
    for kind, article, files in (("image", "an", arguments.image), ("video", "a", arguments.video)):
        for number, file in enumerate(files, start=1):
            with opened(file, f"{kind} {number} ({file})", f"{article} {kind}"):
                pass  # a name mistyped is known here, not after the minutes of a build
    pipeline = _pipeline(arguments)
    if arguments.stream:
        for event in pipeline.stream(request, params):
            print(event.text, end="", flush=True)
        print()
        return
    output = pipeline.generate([request], params)[0]
    if arguments.json:
        answer = {
            "answer": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
            "images": [size.as_json() for size in output.images],
            "videos": [size.as_json() for size in output.videos],
            "timings": dataclasses.asdict(output.timings),
        }
        print(json.dumps(answer))
    else:
        print(output.text)


def features(argv: list[str]) -> None:
    from qwen2vl_trt.runtime.features.command import add_features_arguments, run_features

    parser = _parser("features", "Write features of any number of images: vision tokens, or the decoder's states.")
    add_features_arguments(parser)
    run_features(parser.parse_args(argv), _pipeline)


def batch(argv: list[str]) -> None:
    from qwen2vl_trt.fleet.command import add_batch_arguments, run_batch

    parser = _parser("batch", "Features of images or answers about them, on many workers: Parquet out.")
    add_batch_arguments(parser)
    run_batch(parser.parse_args(argv), _engine_folder)


def evaluate(argv: list[str]) -> None:
    parser = _parser("eval", "Measure the tiny model on held-out digits.", files=False)
    parser.add_argument("--cases", type=whole_number, default=1000, metavar="N", help="a task; default %(default)s")
    parser.add_argument("--seed", type=whole_number, default=0, help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    from qwen2vl_trt.tiny.report import print_accuracy

    print_accuracy(_pipeline(arguments), arguments.cases, arguments.seed, arguments.json)


def compare(argv: list[str]) -> None:
    from qwen2vl_trt.accuracy.command import compare

    compare(argv)


def bench(argv: list[str]) -> None:
    from qwen2vl_trt.benchmarks.command import main

    main(argv)


def inspect(argv: list[str]) -> None:
    parser = Parser(
        prog="run.py inspect",
        description="Print what an engine folder holds: limits, inputs, outputs, precision, profiles, sizes, versions.",
        epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=folder_name, metavar="DIR")
    parser.add_argument("--layers", action="store_true", help="list every layer that computes, with its type")
    parser.add_argument("--verify", action="store_true", help="read every byte that was built: damage of the disk too")
    arguments = parser.parse_args(argv)
    from qwen2vl_trt.engines.inspect import inspect_folder
    from qwen2vl_trt.engines.inspect_table import print_report
    from qwen2vl_trt.engines.tables import stdout_console
    from qwen2vl_trt.runtime.preprocessing.settings import PreprocessorSettings

    max_pixels = PreprocessorSettings.from_folder(arguments.folder).image.max_pixels
    report = inspect_folder(arguments.folder, arguments.verify, max_pixels)
    print_report(report, stdout_console(), arguments.layers)


def plan(argv: list[str]) -> None:
    from qwen2vl_trt.planning.command import run_plan

    run_plan(argv, COMMANDS)


def _parser(command: str, description: str, files: bool = True) -> Parser:
    """With the options of a pipeline; ``files``: the command reads image files."""
    from qwen2vl_trt.engines.arguments import add_build_arguments
    from qwen2vl_trt.runtime.pipeline_arguments import add_decode_argument, add_pipeline_arguments

    parser = Parser(
        prog=f"run.py {command}",
        description=description,
        epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_build_arguments(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1; by default a GPU where the backend can use one")
    add_pipeline_arguments(parser)
    if files:
        add_decode_argument(parser)
    else:
        parser.set_defaults(decode="cpu")
    return parser


def _engine_folder(arguments: argparse.Namespace) -> Path:
    """The engines that the options name, built where missing."""
    from qwen2vl_trt.runtime.engine_folder import engine_folder
    from qwen2vl_trt.runtime.pipeline_arguments import pipeline_options
    from qwen2vl_trt.tiny.calibration import training_data

    return engine_folder(arguments, training_data, pipeline_options(arguments))


def _pipeline(arguments: argparse.Namespace) -> Pipeline:
    from qwen2vl_trt.runtime.pipeline import Pipeline
    from qwen2vl_trt.runtime.pipeline_arguments import check_decode, pipeline_options

    check_decode(arguments.decode, arguments.device)
    options = pipeline_options(arguments)
    return Pipeline.from_engine_dir(_engine_folder(arguments), arguments.device, options)


if __name__ == "__main__":
    run_command(main)
