"""Write features of any number of images: vision tokens, or the decoder's states."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from qwen2vl_trt.engines.command import path_name, positive_number
from qwen2vl_trt.engines.interrupts import deferred_interrupt
from qwen2vl_trt.errors import FeaturesError, MediaError
from qwen2vl_trt.messages import file_path

from .model import add_model_arguments, open_pipeline

if TYPE_CHECKING:
    from qwen2vl_trt.runtime.features.extraction import Extraction
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
    parser.add_argument("--source", choices=("vision", "decoder"), default="vision", help="default %(default)s")
    parser.add_argument("--prompt", metavar="TEXT", help="of --source decoder: what the decoder reads with each image")
    parser.add_argument(
        "--layer", type=int, metavar="N", help="output of layer N, from 1 (torch backend); default last"
    )
    parser.add_argument("--pool", choices=("mean", "none"), default="none", help="over an image's tokens; default none")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where an earlier run stopped, if one did")
    again.add_argument("--overwrite", action="store_true", help="remove an earlier run's features first")
    parser.add_argument(
        "--shard-size", type=positive_number, default=1024, metavar="N", help="most images a shard; default %(default)s"
    )
    parser.add_argument(
        "--batch-tokens",
        type=positive_number,
        metavar="N",
        help="most image tokens an engine call; default no limit but the engine's",
    )
    parser.add_argument(
        "--workers",
        type=positive_number,
        default=os.cpu_count() or 1,
        metavar="N",
        help="threads that decode; default one a core",
    )
    add_model_arguments(parser)


def run(arguments: argparse.Namespace, open_pipeline: Callable[[argparse.Namespace], Pipeline] = open_pipeline) -> None:
    """Extract features as the options say.

    Ends with 0 even if some images could not be used (a warning counts them). Ctrl-C and SIGTERM first save what is
    done.

    Raises:
        FeaturesError: the output is in the way or cannot be written, the options do not fit, or no image could be
            used.
        MediaError: no images.
    """
    from qwen2vl_trt.runtime.features.output import Output
    from qwen2vl_trt.runtime.inputs.image_listing import counted

    if (arguments.source == "decoder") != (arguments.prompt is not None):
        raise FeaturesError("--source decoder needs a --prompt, and --prompt is for --source decoder")
    output = Output(arguments.output)
    if_exists: Any = "resume" if arguments.resume else "overwrite" if arguments.overwrite else "refuse"
    output.check(if_exists)  # before the minutes that a build may take
    passed_over: Counter[str] = Counter()
    images, count = _images(arguments, passed_over)
    pipeline = open_pipeline(arguments)
    from qwen2vl_trt.runtime.features.decode_ahead import Batching
    from qwen2vl_trt.runtime.features.extraction import extract_features
    from qwen2vl_trt.runtime.features.sources import DecoderFeatures, VisionFeatures

    checkpoint, profile = pipeline.engines.checkpoint, pipeline.profile
    source = (
        VisionFeatures(pipeline, arguments.layer)
        if arguments.source == "vision"
        else DecoderFeatures(pipeline, arguments.prompt, arguments.layer)
    )
    unit = checkpoint.config.vision.merge_unit
    tokens = arguments.batch_tokens or profile.max_batch_size * profile.max_hw_dims // unit
    batching = Batching(profile.max_batch_size, tokens, arguments.workers)
    with output.open(_settings(arguments, pipeline), if_exists, arguments.shard_size) as store:
        try:
            with deferred_interrupt() as told, _progress(count) as show:
                done = extract_features(source, images, store, batching, arguments.pool, told.is_set, show)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{store.saved:,} images are saved; run again with --resume to go on") from None
        output.finish(store)
    if done.failed and not store.saved:
        raise FeaturesError(f"none of the {done.failed:,} images could be used; the first: {done.first_failure}")
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
    if done.failed:
        print(
            f"warning: images that could not be used and were skipped: {done.failed:,}, see {output.errors}",
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
    from qwen2vl_trt.runtime.features.store import common_settings
    from qwen2vl_trt.runtime.inputs.image_listing import input_root

    return common_settings(pipeline.engines.manifest, pipeline.options, pipeline.settings) | {
        "input": str(input_root(arguments.input).resolve()) if arguments.input else None,
        "source": arguments.source,
        "prompt": arguments.prompt,
        "layer": arguments.layer,
        "pool": arguments.pool,
    }


@contextmanager
def _progress(count: Callable[[], int]) -> Iterator[Callable[[Extraction], None]]:
    from rich.progress import TextColumn

    from qwen2vl_trt.engines.progress import progress_bar

    with progress_bar(TextColumn("{task.fields[rate]}")) as progress:
        task = progress.add_task("images", total=None, rate="")

        def find_total() -> None:
            with suppress(MediaError):  # the run itself meets it, and says so
                progress.update(task, total=count())

        if not progress.disable:
            threading.Thread(target=find_total, daemon=True).start()
        yield lambda run: progress.update(
            task, completed=run.skipped + run.extracted + run.failed, rate=f"{run.images_per_second:.1f} images/s"
        )
