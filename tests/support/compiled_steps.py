"""What tests of compiled functions share: whether they can be compiled here, and how often they were."""

import pytest
import torch
from torch._dynamo.utils import counters


def need_a_compiler():
    """Skip where Inductor has no C++ compiler for the CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        pytest.skip(f"torch.compile has no C++ compiler here: {error}")
    if torch._dynamo.config.disable:
        pytest.skip("TORCH_COMPILE_DISABLE is set")


def compilations():
    """How many graphs this process has compiled."""
    return counters["stats"]["unique_graphs"]


def graph_breaks():
    return dict(counters["graph_break"])
