"""The commands of an installed package: ``qwen2vl-trt``, ``qwen2vl-trt-build`` and ``python -m qwen2vl_trt``."""

from typing import NoReturn

from qwen2vl_trt.engines.interrupts import begin


def main() -> NoReturn:
    """``run.py``."""
    _run("main", "qwen2vl-trt")


def build() -> NoReturn:
    """``build_engines.py``."""
    _run("build_main", "qwen2vl-trt-build")


def _run(function: str, prog: str) -> NoReturn:
    begin()  # before the rest is imported
    from qwen2vl_trt import commands
    from qwen2vl_trt.commands.process import run_command

    run_command(lambda: getattr(commands, function)(prog=prog))


if __name__ == "__main__":
    main()
