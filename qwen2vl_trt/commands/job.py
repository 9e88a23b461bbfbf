"""What ``features`` and ``batch`` have in common: options of features and of the output, and progress."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from qwen2vl_trt.errors import MediaError

from .options import positive_number

if TYPE_CHECKING:
    from qwen2vl_trt.runtime.features.output_folder import IfExists


def add_feature_arguments(parser: Any) -> None:
    """Add --source, --layer and --pool to a parser or a group of one."""
    parser.add_argument("--source", choices=("vision", "decoder"), default="vision", help="default %(default)s")
    parser.add_argument(
        "--layer", type=int, metavar="N", help="output of layer N, from 1 (torch backend); default last"
    )
    parser.add_argument("--pool", choices=("mean", "none"), default="none", help="over an image's tokens; default none")


def add_output_arguments(parser: argparse.ArgumentParser, what: str, shard: str) -> None:
    """Add the options that :func:`if_exists` reads, and ``--shard-size``."""
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where an earlier run stopped, if one did")
    again.add_argument("--overwrite", action="store_true", help=f"remove an earlier run's {what} first")
    parser.add_argument(
        "--shard-size", type=positive_number, default=1024, metavar="N", help=f"most {shard}; default %(default)s"
    )


def if_exists(arguments: argparse.Namespace) -> IfExists:
    """What to do where an earlier run has written."""
    return "resume" if arguments.resume else "overwrite" if arguments.overwrite else "refuse"


@contextmanager
def saying_what_is_saved(count: Callable[[], int], what: str) -> Iterator[None]:
    """Let an interrupt say how much is saved."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{count():,} {what} are saved; run again with --resume to go on") from None


@contextmanager
def progress(what: str, total: Callable[[], int], done: int = 0) -> Iterator[Callable[[int, float], None]]:
    """A bar on a terminal, to be told how many are done and how many a second; the total is found on a thread."""
    from rich.progress import TextColumn

    from qwen2vl_trt.engines.progress import progress_bar

    with progress_bar(TextColumn("{task.fields[rate]}")) as bar:
        task = bar.add_task(what, total=None, completed=done, rate="")

        def find_total() -> None:
            with suppress(MediaError):  # the run itself meets it, and says so
                bar.update(task, total=total())

        if not bar.disable:
            threading.Thread(target=find_total, daemon=True).start()
        yield lambda count, rate: bar.update(task, completed=count, rate=f"{rate:.1f} {what}/s")
