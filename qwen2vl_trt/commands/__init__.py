"""The commands, a module each: ``add_arguments(parser)``, ``run(arguments)``, a docstring that ``--help`` prints.

A module that has an ``EPILOG`` has it printed below the options. Modules are imported when their command is named, and
import PyTorch in ``run`` alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import Any

from qwen2vl_trt.errors import require

COMMANDS = {
    "generate": "answer a prompt about images and videos",
    "serve": "a server with OpenAI's API, and a page",
    "features": "features of any number of images",
    "batch": "features of images, or answers about rows of tables, on many workers",
    "eval": "accuracy of the tiny model on held-out digits",
    "compare": "accuracy of engines against Transformers",
    "bench": "throughput, latency and memory of engines",
    "bench comparisons": "a fixed list of comparisons with Transformers, random weights",
    "bench scheduler": "what the scheduler itself costs, without a model",
    "bench build": "time and memory of a build",
    "bench export": "time and memory of an export",
    "inspect": "what an engine folder holds",
    "plan": "how many GPUs a load needs, on paper",
    "verify": "what holds on this machine, within some minutes: a report to send",
}


def main(argv: list[str] | None = None, prog: str = "run.py") -> None:
    """Run one of :data:`COMMANDS`; ``generate`` where options are given without a command's name.

    Args:
        argv: its name and its options; by default those of the process.
        prog: the name of the program in help and errors.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "_ARGCOMPLETE" in os.environ:
        _complete(prog)
    elif not argv or argv[0] in ("help", "-h", "--help"):
        print(_overview(prog))
    elif argv == ["--version"]:
        make_parser(prog).parse_args(argv)
    elif argv[0].startswith("-"):
        call("generate", argv, prog)
    elif name := _command(argv):
        call(name, argv[len(name.split()) :], prog)
    else:
        make_parser(prog).error(f"unknown command {argv[0]!r}; there are {', '.join(COMMANDS)}")


def build_main(argv: list[str] | None = None, prog: str = "build_engines.py") -> None:
    """Build engines."""
    parser = make_parser(prog, module := import_module(f"{__name__}.build"))
    if "_ARGCOMPLETE" in os.environ:
        _autocomplete(parser)
    _run(module, parser, sys.argv[1:] if argv is None else argv)


def call(name: str, argv: list[str], prog: str = "run.py") -> None:
    """Read a command's options and run it.

    Its arguments have ``command_line`` besides: all words, for reports that say how they were made.
    """
    module = import_module(f"{__name__}.{name.replace(' ', '_')}")
    _run(module, make_parser(f"{prog} {name}", module), argv)


def make_parser(prog: str, module: Any = None) -> argparse.ArgumentParser:
    """The parser of a command's module; without one it knows ``--version`` alone."""
    from .options import Parser

    if module is None:
        return Parser(prog=prog)
    parser = Parser(
        prog=prog,
        description=module.__doc__,
        epilog=getattr(module, "EPILOG", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return parser


def _run(module: Any, parser: argparse.ArgumentParser, argv: list[str]) -> None:
    arguments = parser.parse_args(argv)
    arguments.command_line = [*parser.prog.split(), *argv]
    module.run(arguments)


def _command(words: list[str]) -> str | None:
    """The command that a line begins with, the one of two words where both are given."""
    return next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None) if words else None


def _complete(prog: str) -> None:
    """Answer the shell, which asks through argcomplete what may come next."""
    start = int(os.environ["_ARGCOMPLETE"])
    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    words = line[: line.rfind(" ") + 1].split()[start:]  # without the one that is being typed
    name = _command(words) or ""
    parser = make_parser(prog, import_module(f"{__name__}.{(name or 'generate').replace(' ', '_')}"))
    if not words:
        parser.add_argument("command", nargs="?", choices=[known for known in COMMANDS if " " not in known])
    os.environ["_ARGCOMPLETE"] = str(start + len(name.split()))
    _autocomplete(parser)


def _autocomplete(parser: argparse.ArgumentParser) -> None:
    require("completion", "completion", {"argcomplete": "argcomplete"})
    import argcomplete

    argcomplete.autocomplete(parser)


def _overview(prog: str) -> str:
    build = "build_engines.py" if prog == "run.py" else f"{prog}-build"
    commands = "\n".join(f"  {name:<17} {what}" for name, what in COMMANDS.items())
    return f"""usage: {prog} COMMAND [options]

{commands}

`{prog} COMMAND --help` lists a command's options. Options without a command are those of generate:
  {prog} --model tiny --image picture.png --prompt "What digits are in the image?"
`{build}` builds engines ahead of time; the commands above build what is missing."""
