"""How to sample, as options of a command."""

from __future__ import annotations

import argparse
from dataclasses import fields

from .sampler import SamplingParams


def add_sampling_arguments(parser: argparse._ActionsContainer) -> None:
    """Add one option for each of :class:`~runtime.sampler.SamplingParams`."""
    defaults = SamplingParams()
    parser.add_argument("--max-tokens", type=int, default=defaults.max_tokens, help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help="0 is greedy, the default")
    parser.add_argument("--top-p", type=float, default=defaults.top_p, help="default %(default)s, off")
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help="default %(default)s, off")
    parser.add_argument("--repetition-penalty", type=float, default=defaults.repetition_penalty, help="default 1, off")
    parser.add_argument("--seed", type=int, help="of an answer's draws; by default another each time")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    parser.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """What the options say.

    Raises:
        SamplingError: a value that is not allowed.
    """
    return SamplingParams(**{field.name: getattr(arguments, field.name) for field in fields(SamplingParams)})
