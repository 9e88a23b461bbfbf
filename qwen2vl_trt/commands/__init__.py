"""The commands, a module each: ``add_arguments(parser)``, ``run(arguments)``, a docstring that ``--help`` prints.

A module that has an ``EPILOG`` has it printed below the options. It is imported when its command is named.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import Any

from qwen2vl_trt.engines.command import Parser

COMMANDS = {
    "generate": "answer a prompt about images and videos",
    "features": "features of any number of images",
    "batch": "features of images, or answers about rows of tables, on many workers",
    "eval": "accuracy of the tiny model on held-out digits",
    "compare": "accuracy of engines against Transformers",
    "bench": "throughput, latency and memory of engines",
    "bench comparisons": "a fixed list of comparisons with Transformers, random weights",
    "bench build": "time and memory of a build",
    "bench export": "time and memory of an export",
    "inspect": "what an engine folder holds",
    "plan": "how many GPUs a load needs, on paper",
}


def main(argv: list[str] | None = None, prog: str = "run.py") -> None:
    """Run one of :data:`COMMANDS`; ``generate`` where options are given without a command's name.

    Args:
        argv: its name and its options; by default those of the process.
        prog: the name of the program in help and errors.
    """
    argv = sys.argv[1:] if argv is None else argv
    words = " ".join(argv[:2])
    if not argv or argv[0] in ("help", "-h", "--help"):
        print(_overview(prog))
    elif argv == ["--version"]:
        Parser(prog=prog).parse_args(argv)
    elif words in COMMANDS:
        call(words, argv[2:], prog)
    elif argv[0] in COMMANDS:
        call(argv[0], argv[1:], prog)
    elif argv[0].startswith("-"):
        call("generate", argv, prog)
    else:
        Parser(prog=prog).error(f"unknown command {argv[0]!r}; there are {', '.join(COMMANDS)}")


def build_main(argv: list[str] | None = None, prog: str = "build_engines.py") -> None:
    """Build engines."""
    run_module(import_module(f"{__name__}.build"), prog, sys.argv[1:] if argv is None else argv)


def call(name: str, argv: list[str], prog: str = "run.py") -> None:
    """Read a command's options and run it.

    Its arguments have ``command_line`` besides: all words, for reports that say how they were made.
    """
    module = import_module(f"{__name__}.{name.replace(' ', '_')}")
    run_module(module, f"{prog} {name}", argv)


def run_module(module: Any, prog: str, argv: list[str]) -> None:
    """Read the options of a command's module and run it."""
    parser = Parser(
        prog=prog,
        description=module.__doc__,
        epilog=getattr(module, "EPILOG", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    arguments = parser.parse_args(argv)
    arguments.command_line = [*prog.split(), *argv]
    module.run(arguments)


def _overview(prog: str) -> str:
    build = "build_engines.py" if prog == "run.py" else f"{prog}-build"
    commands = "\n".join(f"  {name:<17} {what}" for name, what in COMMANDS.items())
    return f"""usage: {prog} COMMAND [options]

{commands}

`{prog} COMMAND --help` lists a command's options. Options without a command are those of generate:
  {prog} --model tiny --image picture.png --prompt "What digits are in the image?"
`{build}` builds engines ahead of time; the commands above build what is missing."""
