"""A decoder whose images are embedded elsewhere, over a stand-in for Ray Serve's handle."""

from types import SimpleNamespace

import numpy
import pytest

pytest.importorskip("mmh3", reason="ray[serve] is not installed")
from ray.exceptions import ActorDiedError

from qwen2vl_trt import Pipeline, Request, SamplingParams
from qwen2vl_trt.errors import ExecutionError
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.serving.encoder import Encoder, RemoteVision
from tests.support.engine_folders import build


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    return build("tiny", tmp_path_factory.mktemp("encoder") / "engines", "torch")


class Encoders:
    """A handle; the first ``lost`` calls end their encoder."""

    def __init__(self, engine_dir, lost=0):
        self.encoder, self.lost, self.calls = Encoder(engine_dir, "cpu"), lost, 0
        self.embed = SimpleNamespace(remote=self.remote)

    def remote(self, *pixels_and_layout):
        def result():
            self.calls += 1
            if self.calls <= self.lost:
                raise ActorDiedError
            return self.encoder.embed(*pixels_and_layout)

        return SimpleNamespace(result=result)


def requests():
    noise = numpy.random.default_rng(0)
    images = [noise.integers(0, 256, (28 * n, 56, 3), numpy.uint8) for n in (1, 2, 5)]
    return [Request("What?", images[:1]), Request("How many?", images[1:]), Request("Hi")]


@pytest.mark.parametrize("lost", [0, 3])
def test_answers_are_the_same(engine_dir, lost):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = [output.text for output in Pipeline.from_engine_dir(engine_dir, "cpu").generate(requests(), params)]
    engines, encoders = open_engines(engine_dir, "cpu"), Encoders(engine_dir, lost)
    vision = RemoteVision(encoders, encoders.encoder._runner.padded, engines.device)
    pipeline = Pipeline(engines, vision=vision)
    assert [output.text for output in pipeline.generate(requests(), params)] == expected
    assert encoders.calls > lost
    assert "vision" not in vars(engines)  # not loaded


def test_images_that_end_every_encoder_are_given_up(engine_dir):
    engines, encoders = open_engines(engine_dir, "cpu"), Encoders(engine_dir, 99)
    pipeline = Pipeline(engines, vision=RemoteVision(encoders, False, engines.device))
    outputs = pipeline.generate([*requests()[:1], Request("Hi")], SamplingParams(max_tokens=2))
    assert isinstance(outputs[0].error, ExecutionError)
    assert outputs[1].error is None
