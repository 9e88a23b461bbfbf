"""The Triton kernel that samples, compiled: PyTorch's draws, in few operators, in a CUDA graph."""

import math

import pytest
import torch

from qwen2vl_trt.runtime.preprocessing.triton_writer import triton_is_installed
from qwen2vl_trt.runtime.sampler import Rows, Sampler
from qwen2vl_trt.runtime.sampling_params import Sampling
from qwen2vl_trt.runtime.triton_sampler import checked_kernel, sample
from tests.gpu.test_preprocessor import events_of
from tests.support.exact_sampling import Exact

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
    pytest.mark.skipif(not triton_is_installed(), reason="Triton is not installed here"),
]

VOCAB = 151_936
PARAMS = [
    Sampling(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.05, seed=0),
    Sampling(temperature=1.0, top_p=0.95, presence_penalty=0.5, frequency_penalty=0.5, seed=1),
    Sampling(temperature=3.0, top_p=0.999, seed=2),
    Sampling(temperature=1.0, top_k=5000, logit_bias={7: 3.0}, seed=3),
    Sampling(temperature=1.0, min_p=0.1, seed=4),
    Sampling(repetition_penalty=1.2),
    Sampling(),
] * 9


def started(kernel, device="cuda"):
    own = Sampler(len(PARAMS), VOCAB, device, kernel)
    for slot, params in enumerate(PARAMS):
        own.start(slot, params, range(40))
    return own


def steps(number, ties):
    logits = torch.randn(number, len(PARAMS), VOCAB, generator=torch.Generator().manual_seed(number)) * 4
    logits[:, 3] = math.nan
    return (logits.bfloat16().float() if ties else logits).cuda()


def test_the_kernel_is_taken(caplog):
    assert checked_kernel(VOCAB, torch.device("cuda")) is sample
    assert not caplog.records


@pytest.mark.parametrize("ties", [False, True])
def test_draws_are_the_exact_ones_but_for_rounding(ties):
    own, other = started(sample), started(None)
    held = 0
    for logits in steps(4, ties):
        plan, table = own.stage(range(len(PARAMS)))
        scores = own.penalise(logits, plan, Rows(table)).cpu()
        uniforms = Rows(table)["uniform"][:, 0].tolist()
        tokens, totals, _ = own.run(logits, plan, table)
        expected = other.run(logits, *other.stage(range(len(PARAMS))))[0].tolist()
        assert [row for row, total in enumerate(totals.tolist()) if not math.isfinite(total[0])] == [3]
        for row, (params, number, token) in enumerate(zip(PARAMS, uniforms, tokens.tolist())):
            if row == 3:
                continue
            exact = Exact(scores[row], params)
            if exact.certain(number):
                held += 1
                assert token == exact.token(number) == expected[row], params
            else:
                assert token in exact.near(number), params
        other._seen.copy_(own._seen)  # where rounding led elsewhere
        other._counts.copy_(own._counts)
    assert held > len(PARAMS)


def test_operators():
    own, logits = started(sample), steps(1, False)[0]
    own(logits, range(len(PARAMS))).tolist()
    kernels = [name for name in events_of(lambda: own(logits, range(len(PARAMS))).tolist()) if "Memcpy" not in name]
    assert len(kernels) <= 12, kernels


def test_a_graph_captures_it():
    own, other, logits = started(sample), started(sample), steps(3, True)
    rows = range(len(PARAMS))
    plan, table = own.stage(rows)
    held, counts = logits[0].clone(), own._counts.clone()
    own.run(held, plan, table)  # compiles
    own._counts.copy_(counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = own.run(held, plan, table)[0]
    for step in logits:
        now, settings = other.stage(rows)
        assert now == plan
        expected = other.run(step, now, settings)[0].tolist()
        held.copy_(step)
        table.copy_(settings)
        graph.replay()
        assert tokens.tolist() == expected
