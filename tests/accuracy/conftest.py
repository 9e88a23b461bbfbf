"""Engines of the tiny model, and the command run in this process."""

from pathlib import Path

import pytest

from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildConfig, BuildProfile
from qwen2vl_trt.hub import resolve_model

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Engine folders of the tiny model by backend and precision; do not write into them."""
    folder = tmp_path_factory.mktemp("tiny")
    profile = BuildProfile.from_dict(BuildConfig.from_yaml(ROOT / "configs" / "tiny.yaml").limits)
    built = {}
    for kind in (("onnxruntime", "fp32"), ("torch", "fp32"), ("torch", "bf16")):
        built[kind] = folder / "-".join(kind)
        build_engines(resolve_model("tiny"), *find_backend(*kind), profile, built[kind])
    return built


@pytest.fixture
def reports(monkeypatch):
    """The reports that the command printed as tables."""
    from qwen2vl_trt.commands import compare

    made, original = [], compare._report
    monkeypatch.setattr(compare, "_report", lambda *given: made.append(original(*given)) or made[-1])
    return made


@pytest.fixture
def compare(capsys):
    """Runs the command: its exit code and what it printed on stdout."""
    from qwen2vl_trt.commands import call

    def run(*arguments):
        try:
            call("compare", [str(argument) for argument in arguments])
            code = 0
        except SystemExit as exit:
            code = exit.code
        return code, capsys.readouterr().out

    return run
