"""The commands of an installed package: ``qwen2vl-trt``, ``qwen2vl-trt-build`` and ``python -m qwen2vl_trt``."""

from typing import NoReturn

from qwen2vl_trt.engines.interrupts import begin


def main() -> NoReturn:
    """``run.py``."""
    begin()  # before the rest is imported
    from qwen2vl_trt import commands
    from qwen2vl_trt.engines.command import run_command

    run_command(lambda: commands.main(prog="qwen2vl-trt"))


def build() -> NoReturn:
    """``build_engines.py``."""
    begin()
    from qwen2vl_trt import commands
    from qwen2vl_trt.engines.command import run_command

    run_command(lambda: commands.build_main(prog="qwen2vl-trt-build"))


if __name__ == "__main__":
    main()
