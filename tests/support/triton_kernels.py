"""Triton's kernels on a machine without a GPU: run by its interpreter, and compiled for GPUs that are not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2vl_trt.runtime.preprocessing.triton_writer import triton_is_installed

installed = pytest.mark.skipif(not triton_is_installed(), reason="Triton is not installed")


def interpreter_runs() -> str:
    """Why not, where it does not."""
    if not triton_is_installed():
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "a GPU is here, and runs the compiled kernels (tests/gpu)"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        return f"the interpreter of Triton {triton.__version__} cannot loop with NumPy 2.4"
    return ""


interpreted = pytest.mark.skipif(bool(interpreter_runs()), reason=interpreter_runs() or "it runs")

CAPABILITIES = (80, 89, 90, 100, 120)  # from Ampere to Blackwell

_COMPILE = """
import itertools, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
cubin, capabilities = Path(sys.argv[1]), map(int, sys.argv[2:])
for (kernel, arguments, constants, warps), capability, aligned in itertools.product(
    kernels(), capabilities, (False, True)
):
    # What a launch tells the compiler of addresses that are multiples of 16, as PyTorch's tensors are.
    attributes = {(n,): [["tt.divisibility", 16]] for n, kind in enumerate(arguments.values()) if kind[0] == "*"}
    source = ASTSource(
        kernel,
        arguments | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs=attributes if aligned else None,
    )
    target = GPUTarget("cuda", capability, 32)
    cubin.write_bytes(triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"])
    command = [disassembler, "-res-usage", cubin]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    print(kernel.__name__, capability, aligned, *[w for w in words if w.partition(":")[0] in {"REG", "STACK", "LOCAL"}])
"""


def compiled(kernels: str, folder: Path) -> dict[str, dict[str, int]]:
    """Registers and bytes of stack and local memory of each kernel on each GPU.

    Args:
        kernels: code of a generator ``kernels()`` of a kernel, its arguments' types, its constants and its warps.
        folder: for what is made. In a process of its own, for in this one Triton interprets.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", kernels + _COMPILE, str(folder / "cubin"), *map(str, CAPABILITIES)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    found = {" ".join(line[:-3]) + f" #{number}": line[-3:] for number, line in enumerate(lines)}
    return {name: {part.split(":")[0]: int(part.split(":")[1]) for part in used} for name, used in found.items()}
