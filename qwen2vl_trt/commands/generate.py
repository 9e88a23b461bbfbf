"""Answer a prompt about images and videos."""

from __future__ import annotations

import argparse
import dataclasses
import json

from .model import add_model_arguments, open_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    from qwen2vl_trt.runtime.media_arguments import add_media_arguments
    from qwen2vl_trt.runtime.sampling_arguments import add_sampling_arguments

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
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the answer."""
    from qwen2vl_trt.runtime.inputs.files import opened
    from qwen2vl_trt.runtime.media_arguments import media_options
    from qwen2vl_trt.runtime.request import Request
    from qwen2vl_trt.runtime.sampling_arguments import sampling_params

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
    pipeline = open_pipeline(arguments)
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
