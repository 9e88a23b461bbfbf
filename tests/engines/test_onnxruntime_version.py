"""ONNX Runtime 1.25 and 1.27 read a prompt in chunks of 32 and answer 52059 where 92059 is right."""

import onnxruntime
import pytest

from qwen2vl_trt.engines.backends import BACKENDS, find_backend
from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.runtime.backends.runners import open_engines

ERROR = r"needs onnxruntime 1\.28 or later; {} is installed: pip install .*older releases answer wrongly"


@pytest.fixture(params=["1.24.4", "1.25.1", "1.27.0"])
def too_old(request, monkeypatch) -> str:
    monkeypatch.setattr(onnxruntime, "__version__", request.param)
    return ERROR.format(request.param)


def test_older_ones_are_refused_when_a_session_opens(untied_model, too_old):
    engines = open_engines(untied_model.engines, "cpu")
    with pytest.raises(EngineError, match=too_old) as refused:
        engines.decoder.step  # noqa: B018 (it is opened here)
    assert "\n" not in str(refused.value)


def test_older_ones_are_refused_before_a_build(too_old):
    with pytest.raises(EngineError, match=too_old):
        find_backend("onnxruntime", None)


@pytest.mark.parametrize("version", ["1.28.0", "1.31.1", "1.28.0.dev20260601", "2.0"])
def test_newer_ones_are_taken(monkeypatch, version):
    monkeypatch.setattr(onnxruntime, "__version__", version)
    BACKENDS["onnxruntime"].load()
