"""Vision beside decoding on real streams: equal answers, and one host synchronisation a decode step. Needs a GPU."""

import warnings

import pytest
import torch

from qwen2vl_trt import Pipeline, PipelineOptions, Request, SamplingParams
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.runtime.backends.runners import open_engines
from tests.support.requests import answers, random_params, random_request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

PROFILE = BuildProfile(
    min_hw_dims=4, max_hw_dims=1024, max_batch_size=4, max_num_seqs=4, max_input_len=512, max_seq_len=1024
)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    build_engines(resolve_model("tiny"), *find_backend("torch", "fp32"), PROFILE, folder)
    return open_engines(folder, "cuda")


def test_overlapped_answers_equal_serial_ones(engines):
    for seed in range(5):
        requests = [random_request(20 * seed + number) for number in range(12)]
        params = [random_params(20 * seed + number) for number in range(12)]
        serial = answers(Pipeline(engines, PipelineOptions(overlap=False)).generate(requests, params))
        for _ in range(3):
            assert answers(Pipeline(engines).generate(requests, params)) == serial


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2}])
def test_one_host_synchronisation_a_decode_step(engines, options):
    pipeline = Pipeline(engines)
    params = [SamplingParams(60, seed=seed, ignore_eos=True, **options) for seed in range(4)]
    for setting in params:
        pipeline.submit(Request("What?"), setting)
    for _ in range(10):  # prompts read, graphs captured
        pipeline.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for _ in range(10):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert len(pipeline.step()) == 4
            waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
            assert len(waits) <= 1, waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    while pipeline.busy:
        pipeline.step()
