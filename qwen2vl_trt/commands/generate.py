"""Answer a prompt about images and videos."""

from __future__ import annotations

import argparse
import dataclasses
import json

from qwen2vl_trt.errors import PromptError, SamplingError
from qwen2vl_trt.messages import to_tools

from .model import open_pipeline
from .options import (
    add_build_arguments,
    add_pipeline_arguments,
    add_sampling_arguments,
    media_options,
    sampling_params,
    text_of_file,
    whole_number,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    parser.add_argument("--prompt", required=True, help="<image> and <video> mark places; without, media come first")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="repeat for several")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="repeat for several")
    parser.add_argument(
        "--tools", type=text_of_file, metavar="FILE", help="OpenAI's tools, a JSON list; most need --chat-template too"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json",
        action="store_true",
        help="print answer, tool_calls, token_ids, finish_reason, logprobs, sizes, timings",
    )
    form.add_argument("--stream", action="store_true", help="print the answer as it comes")
    group = parser.add_argument_group("answer")
    add_sampling_arguments(group)
    group.add_argument(
        "--logprobs",
        type=whole_number,
        metavar="N",
        help="with --json, log-probabilities of each token, and of the N likeliest in its place",
    )
    add_pipeline_arguments(parser, videos=True, media=True)
    add_build_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the answer."""
    params, (image_options, video_options) = sampling_params(arguments), media_options(arguments)
    if params.logprobs is not None and not arguments.json:
        raise SamplingError("--logprobs are printed with --json alone; add it, or leave --logprobs out")
    try:
        tools = json.loads(arguments.tools or "[]")
    except ValueError as error:
        raise PromptError(f"--tools: no JSON: {error}") from None
    to_tools(tools)
    from qwen2vl_trt.runtime.inputs.files import opened
    from qwen2vl_trt.runtime.request import Request
    from qwen2vl_trt.runtime.tool_calls import parse_tool_calls

    request = Request(
        arguments.prompt,
        arguments.image,
        arguments.video,
        image_options=image_options,
        video_options=video_options,
        tools=tools,
    )
    for kind, article, files in (("image", "an", arguments.image), ("video", "a", arguments.video)):
        for number, file in enumerate(files, start=1):
            with opened(file, f"{kind} {number} ({file})", f"{article} {kind}"):
                pass  # a name mistyped is known here, not after the minutes of a build
    pipeline = open_pipeline(arguments)
    if arguments.stream:
        for event in pipeline.stream(request, params):
            print(event.text, end="", flush=True)
        print()
        return
    output = pipeline.generate([request], params)[0]
    if arguments.json:
        text, calls = parse_tool_calls(output.text) if tools else (output.text, [])
        answer = {
            "answer": text,
            "tool_calls": [dataclasses.asdict(call) for call in calls],
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
            "logprobs": None if output.logprobs is None else [dataclasses.asdict(each) for each in output.logprobs],
            "images": [size.as_json() for size in output.images],
            "videos": [size.as_json() for size in output.videos],
            "timings": dataclasses.asdict(output.timings),
        }
        print(json.dumps(answer))
    else:
        print(output.text)
