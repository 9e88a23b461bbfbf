"""How to sample, as options of a command."""

from __future__ import annotations

import argparse
from dataclasses import fields

from .sampler import SamplingParams


def add_sampling_arguments(parser: argparse._ActionsContainer) -> None:
    """Add one option for each of :class:`~qwen2vl_trt.runtime.sampler.SamplingParams`."""
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer; default the checkpoint's, or 256")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy; default the checkpoint's")
    parser.add_argument("--top-p", type=float, metavar="P", help="1 is off; default the checkpoint's")
    parser.add_argument("--top-k", type=int, metavar="K", help="0 is off; default the checkpoint's")
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="1 is off; default the checkpoint's")
    parser.add_argument("--seed", type=int, metavar="N", help="of an answer's draws; by default another each time")
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before this text; default the checkpoint's"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """What the options say.

    Raises:
        SamplingError: a value that is not allowed.
    """
    return SamplingParams(**{field.name: getattr(arguments, field.name) for field in fields(SamplingParams)})
