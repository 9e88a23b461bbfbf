"""Write features of any number of images: vision tokens, or the decoder's states."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from qwen2vl_trt.engines.interrupts import deferred_interrupt
from qwen2vl_trt.errors import FeaturesError, MediaError
from qwen2vl_trt.messages import file_path

from .job import add_feature_arguments, add_output_arguments, if_exists, progress, saying_what_is_saved
from .model import open_pipeline
from .options import add_build_arguments, add_pipeline_arguments, path_name, positive_number

if TYPE_CHECKING:
    from qwen2vl_trt.runtime.inputs.image_listing import ImageFile
    from qwen2vl_trt.runtime.pipeline import Pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--input",
        type=file_path,
        metavar="DIR|GLOB",
        help="all images of a folder and those below, or of a glob with **",
    )
    given.add_argument("--image", action="append", metavar="FILE", help="one image; repeat for several")
    parser.add_argument(
        "--output",
        type=path_name,
        required=True,
        metavar="DIR|FILE",
        help="a folder, or a .safetensors file for small sets",
    )
    add_output_arguments(parser, "features", "images a shard")
    group = parser.add_argument_group("features")
    add_feature_arguments(group)
    group.add_argument("--prompt", metavar="TEXT", help="of --source decoder: what the decoder reads with each image")
    group = parser.add_argument_group("work")
    group.add_argument(
        "--batch-tokens",
        type=positive_number,
        metavar="N",
        help="most image tokens an engine call; default no limit but the engine's",
    )
    group.add_argument(
        "--workers",
        type=positive_number,
        default=os.cpu_count() or 1,
        metavar="N",
        help="threads that decode; default one a core",
    )
    add_pipeline_arguments(parser)
    add_build_arguments(parser)


def run(arguments: argparse.Namespace, open_pipeline: Callable[[argparse.Namespace], Pipeline] = open_pipeline) -> None:
    """Extract features as the options say.

    Ends with 0 even if some images could not be used (a warning counts them). Ctrl-C and SIGTERM first save what is
    done.

    Raises:
        FeaturesError: the output is in the way or cannot be written, the options do not fit, or no image could be
            used.
        MediaError: no images.
    """
    if (arguments.source == "decoder") != (arguments.prompt is not None):
        raise FeaturesError("--source decoder needs a --prompt, and --prompt is for --source decoder")
    from qwen2vl_trt.runtime.features.store import FeatureOutput
    from qwen2vl_trt.runtime.inputs.image_listing import counted

    output, again = FeatureOutput(arguments.output), if_exists(arguments)
    output.check(again)  # before the minutes that a build may take
    passed_over: Counter[str] = Counter()
    images, count = _images(arguments, passed_over)
    pipeline = open_pipeline(arguments)
    from qwen2vl_trt.runtime.features.extraction import Batching, extract_features
    from qwen2vl_trt.runtime.features.sources import DecoderFeatures, VisionFeatures
    from qwen2vl_trt.runtime.features.store import open_store

    source = (
        VisionFeatures(pipeline, arguments.layer)
        if arguments.source == "vision"
        else DecoderFeatures(pipeline, arguments.prompt, arguments.layer)
    )
    batching = Batching.of(pipeline, arguments.source, arguments.batch_tokens, arguments.workers)
    with open_store(output.folder, _settings(arguments, pipeline), again, arguments.shard_size) as store:
        with (
            saying_what_is_saved(lambda: store.saved, "images"),
            deferred_interrupt() as told,
            progress("images", count) as show,
        ):
            done = extract_features(
                source,
                images,
                store,
                batching,
                arguments.pool,
                told.is_set,
                lambda run: show(run.skipped + run.extracted + store.failed, run.images_per_second),
            )
        output.finish(store)
    if store.failed and not store.saved:
        raise FeaturesError(f"none of the {store.failed:,} images could be used; the first: {store.first_failure}")
    skipped = f", {done.skipped:,} were there" if done.skipped else ""
    made = "1 image" if done.extracted == 1 else f"{done.extracted:,} images"
    busy, waited = done.engine / done.seconds, done.waited / done.seconds
    print(
        f"{output.path}: {made}{skipped}, {done.images_per_second:.1f} images/s"
        f" (engine busy {busy:.0%} of the time, waiting for images {waited:.0%})",
        file=sys.stderr,
    )
    if passed_over:
        print(f"passed over: {counted(passed_over)}", file=sys.stderr)
    if done.resized:
        print(
            f"warning: images that were resized to fit the engine ({pipeline.profile.min_hw_dims:,} to"
            f" {pipeline.profile.max_hw_dims:,} patches): {done.resized:,}; --strict-size refuses them",
            file=sys.stderr,
        )
    if store.failed:
        print(
            f"warning: images that could not be used and were skipped: {store.failed:,}, see {output.errors}",
            file=sys.stderr,
        )


def _images(arguments: argparse.Namespace, passed_over: Counter[str]) -> tuple[Iterator[ImageFile], Callable[[], int]]:
    """The images, which count what is passed over as they are listed, and what counts them, which may take as long."""
    from qwen2vl_trt.runtime.inputs.image_listing import counted, given_images, list_images

    if arguments.image:
        given = given_images(arguments.image)
        return iter(given), lambda: len(given)
    there: Counter[str] = Counter()
    if next(list_images(arguments.input, there), None) is None:  # before the minutes that a build may take
        raise MediaError(f"{arguments.input}: no image there" + (f", but {counted(there)}" if there else ""))
    return list_images(arguments.input, passed_over), lambda: sum(1 for _ in list_images(arguments.input))


def _settings(arguments: argparse.Namespace, pipeline: Pipeline) -> dict[str, Any]:
    """What the features depend on; a resumed run must have the same. JSON values only."""
    from qwen2vl_trt.runtime.features.output_folder import common_settings
    from qwen2vl_trt.runtime.inputs.image_listing import input_root

    return common_settings(pipeline.engines.manifest, pipeline.options, pipeline.settings) | {
        "input": str(input_root(arguments.input).resolve()) if arguments.input else None,
        "source": arguments.source,
        "prompt": arguments.prompt,
        "layer": arguments.layer,
        "pool": arguments.pool,
    }
