"""After a warm-up the first requests capture no graph and make no context; on a CPU it changes nothing."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from qwen2vl_trt import Pipeline, PipelineOptions, Request, SamplingParams
from qwen2vl_trt.errors import LimitError, MediaError
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.backends.torch_runner import CudaDecoder, CudaVision
from tests.support import fake_tensorrt
from tests.support.engine_folders import PROFILE, build_fake_tensorrt, fake_tensorrt_runtime
from tests.support.recorded_graph import RecordedGraphs

CPU = torch.device("cpu")
SIZES = [(84, 56), (170, 60)]


def requests():
    """More than there are slots, with images of the sizes above, another, and none; answers that differ in length."""
    numbers = np.random.default_rng(0)
    images = [numbers.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in [*SIZES, (60, 60)]]
    found = [Request("What digits are in the image? " * (1 + n), [image]) for n, image in enumerate(images)]
    return [*found, Request("Who are you?"), Request("How many?", images[:2]), Request("Read it.")]


PARAMS = [SamplingParams(max_tokens=3 + 25 * n, ignore_eos=True) for n in range(6)]


def answers(pipeline):
    return [output.token_ids for output in pipeline.generate(requests(), PARAMS)]


class TestOnACpu:
    def test_it_changes_nothing(self, pipeline):
        expected = answers(pipeline)
        before = asdict(pipeline.counters())
        pipeline.warm_up(SIZES)
        after = asdict(pipeline.counters())
        assert after.pop("kept_prefix_tokens") == 0 < before.pop("kept_prefix_tokens")
        assert after.pop("kv_cache_bytes") <= before.pop("kv_cache_bytes")
        assert after == before
        assert answers(pipeline) == expected

    def test_what_is_under_way_is_finished_first(self, pipeline):
        outputs = [pipeline.submit(request, params) for request, params in zip(requests(), PARAMS)]
        pipeline.step()
        pipeline.warm_up()
        found = [output.token_ids for output in outputs]
        assert found == answers(pipeline)

    def test_kept_prefixes_of_another_pipeline(self, engine_dirs):
        """They share the engines, so its rows are written over too."""
        engines = open_engines(engine_dirs["torch"], "cpu")
        one, other = Pipeline(engines), Pipeline(engines)
        expected = answers(one)
        other.warm_up()
        assert answers(one) == expected

    def test_lengths_that_there_are_not(self, pipeline):
        for length in (0, PROFILE.max_seq_len + 1):
            with pytest.raises(
                LimitError, match=rf"max_length is {length}; this engine takes 1 to {PROFILE.max_seq_len}"
            ):
                pipeline.warm_up(max_length=length)

    def test_a_size_outside_the_profile(self, pipeline):
        pipeline.warm_up([(600, 600)])  # resized, as in a request
        strict = Pipeline(pipeline.engines, PipelineOptions(strict_size=True))
        with pytest.raises(LimitError, match="600x600"):
            strict.warm_up([(600, 600)])

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ([(100_000, 100_000)], "100000x100000 is 10,000,000,000 pixels.*--image-pixel-limit"),
            ([(-1, -1)], "-1x-1 has no pixels"),
            ((448, 448), r"give \[\(width, height\), ...\]"),
            ([(44.8, 448)], r"give \[\(width, height\), ...\]"),
            (100_000, r"give \[\(width, height\), ...\]"),
        ],
    )
    def test_sizes_that_no_image_has(self, pipeline, sizes, message):
        with pytest.raises(MediaError, match=message):
            pipeline.warm_up(sizes)


@pytest.fixture
def graphed(engine_dirs):
    """The torch backend's CUDA runners on the CPU, and what records their graphs."""
    engines, capture = open_engines(engine_dirs["torch"], "cpu"), RecordedGraphs()
    engines.__dict__["vision"] = CudaVision(engines.checkpoint, engines.dtype, CPU, compiled=False)
    engines.__dict__["decoder"] = CudaDecoder(
        engines.checkpoint, PROFILE, engines.precision.decoder, CPU, capture=capture, compiled=False
    )
    return Pipeline(engines), capture


class TestTorchGraphs:
    def test_requests_capture_nothing_more(self, graphed, pipelines):
        pipeline, capture = graphed
        pipeline.warm_up(SIZES)
        assert capture.captures == 3 * 3, "1, 2 and 4 slots; 1, 2 and all 3 pages"
        assert capture.replays == 0
        assert answers(pipeline) == answers(pipelines["torch"])
        assert capture.captures == 9
        assert capture.replays > 9

    def test_up_to_a_length(self, graphed):
        pipeline, capture = graphed
        pipeline.warm_up(max_length=129)
        assert capture.captures == 3, "one page"
        pipeline.warm_up(max_length=256)
        assert capture.captures == 3, "once is enough"
        pipeline.warm_up(max_length=257)
        assert capture.captures == 3 * 2


@pytest.fixture(scope="module")
def plans(checkpoint, tmp_path_factory):
    pytest.importorskip("onnxruntime", reason="it computes what the engines would")
    return build_fake_tensorrt(checkpoint, tmp_path_factory.mktemp("warm") / "engines")


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
def test_tensorrt_graphs_and_contexts(plans, pipelines, monkeypatch, module):
    captures = []
    capture = fake_tensorrt.CpuDevice.capture
    monkeypatch.setattr(
        fake_tensorrt.CpuDevice, "capture", lambda self, enqueue: captures.append(1) or capture(self, enqueue)
    )
    with fake_tensorrt_runtime(module):
        engines = open_engines(plans, "cpu")
        pipeline = Pipeline(engines)
        pipeline.warm_up(SIZES)
        vision, decoder = engines.vision._engine.handle, engines.decoder._engine.handle
        assert len(captures) == 3, "1, 2 and 4 slots"
        assert [context._runs for context in vision._contexts] == [len(SIZES)]
        assert {context._profile for context in decoder._contexts} == {0, 1}
        made = len(decoder._contexts)
        assert answers(pipeline) == answers(pipelines["torch"])
        assert (len(captures), len(decoder._contexts), len(vision._contexts)) == (3, made, 1)
