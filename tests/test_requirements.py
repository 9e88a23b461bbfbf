"""What pyproject.toml requires has lower bounds, and constraints-lowest.txt installs just those."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from qwen2vl_trt.engines.backends import BACKENDS

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEWER = {"torch", "torchvision", "ruff", "mypy", "types-pyyaml"}
"""Lower bounds that are not installed: PyTorch's has no build for the CPU alone; the last three look at sources."""


def requirements(*extras: str) -> dict[str, Requirement]:
    """By name, those of the project itself and of some extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): one for one in found if one.name != PROJECT["name"]}


def lowest(requirement: Requirement) -> Version:
    (bound,) = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
    return bound


def constraints(name: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pinned = [Requirement(line.partition(";")[0]) for line in lines]
    return {canonicalize_name(one.name): Version(str(one.specifier).removeprefix("==")) for one in pinned}


def test_every_requirement_has_a_lower_bound():
    assert all(lowest(one) for one in requirements(*PROJECT["optional-dependencies"]).values())


def test_the_lowest_of_each_is_installed():
    pinned = constraints("constraints-lowest.txt")
    wanted = requirements("train", "bench", "compare", "quantize", "ray", "heic", "test")
    others = {
        name: (pinned[name], lowest(one))
        for name, one in wanted.items()
        if name not in NEWER and pinned[name].release[: len(lowest(one).release)] != lowest(one).release
    }
    assert not others


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt"])
def test_constraints_are_allowed(name):
    pinned = constraints(name)
    wanted = requirements("train", "bench", "compare", "quantize", "ray", "heic", "test")
    assert all(one.specifier.contains(pinned[name], prereleases=True) for name, one in wanted.items())


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-gpu"])
def test_onnx_runtime_is_required_as_sessions_check_it(name):
    assert lowest(requirements("gpu")[name]).release == BACKENDS["onnxruntime"].oldest


def test_pytorch_is_no_newer_than_what_was_tried():
    """Its private operators are used, and a release may change them."""
    bound = next(Version(one.version) for one in requirements()["torch"].specifier if one.operator == "<")
    tried = constraints("constraints.txt")["torch"]
    assert bound.release == (tried.major, tried.minor + 1)
