"""The Triton kernel that samples, run on the CPU by its interpreter and compiled for GPUs that are not there.

It is held to PyTorch's operators in the sampler and to sums in FP64. Where there is a GPU, tests/gpu/test_sampler.py
runs it compiled.
"""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_trt.runtime import sampler as sampler_module
from qwen2vl_trt.runtime import triton_sampler
from qwen2vl_trt.runtime.sampler import _ROW, Rows, Sampler
from qwen2vl_trt.runtime.sampling_params import Sampling
from qwen2vl_trt.runtime.triton_sampler import checked_kernel, sample
from tests.support.device_tensors import META, DeviceTensor, Synchronisations, pin
from tests.support.exact_sampling import Exact
from tests.support.thorough import often
from tests.support.triton_kernels import CAPABILITIES, compiled, installed, interpreted

CPU = torch.device("cpu")
PUBLISHED = 151_936


def kernel(block):
    """The interpreter takes milliseconds for a block, however large."""
    return partial(sample, block=block)


def samplers(params, vocab, block=256, prompts=None):
    """One with PyTorch's operators and one with the kernel, of the same sequences."""
    found = Sampler(len(params), vocab), Sampler(len(params), vocab, kernel=kernel(block))
    for own in found:
        for slot, param in enumerate(params):
            own.start(slot, param, prompts[slot] if prompts else [0])
    return found


def check(logits, params, block=256, allowed=None, steps=1):
    """Each row's draw is the exact one, and PyTorch's, but for rounding; returns how many rows were held to that."""
    vocab, rows, held = logits.shape[-1], range(len(params)), 0
    for _ in range(steps):
        theirs, ours = samplers(params, vocab, block)
        plan, table = theirs.stage(rows)
        mask = None if allowed is None else torch.from_numpy(allowed)
        scores = theirs._masked(theirs.penalise(logits, plan, Rows(table)), mask)
        expected = theirs.run(logits, plan, table, mask)[0].tolist()
        tokens, totals, _ = ours.run(logits, *ours.stage(rows), mask)
        uniform = Rows(table)["uniform"][:, 0].tolist()
        for row, param in enumerate(params):
            exact = Exact(scores[row], param)
            if exact.certain(uniform[row]):
                held += 1
                assert tokens[row] == exact.token(uniform[row]) == expected[row], param
                assert float(totals[row]) / 2**44 == pytest.approx(exact.total, rel=exact.rounding), param
            else:
                assert int(tokens[row]) in exact.near(uniform[row]), param
    return held


@st.composite
def rows_of_logits(draw):
    vocab = draw(st.sampled_from([1, 2, 7, 31, 33, 255, 256, 300, 1000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = draw(st.integers(1, 4))
    logits = torch.randn(rows, vocab, generator=generator) * draw(st.sampled_from([0.01, 1.0, 4.0, 30.0]))
    if draw(st.booleans()):  # in BF16 many logits are equal
        logits = logits.round()
    if draw(st.booleans()):
        logits[torch.rand(rows, vocab, generator=generator) < 0.3] = -math.inf
        logits[:, draw(st.integers(0, vocab - 1))] = 1.0
    params = [
        Sampling(
            temperature=draw(st.sampled_from([0.0, 1.1e-5, 0.3, 1.0, 2.5, 1e30])),
            top_k=draw(st.sampled_from([0, 1, 2, 5, 50, vocab - 1, vocab, 10 * vocab])),
            top_p=draw(st.sampled_from([1.0, 1 - 2**-45, 0.95, 0.5, 1e-4, 1e-300])),
            min_p=draw(st.sampled_from([0.0, 0.02, 0.4, 1.0])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8])),
            presence_penalty=draw(st.sampled_from([0.0, 0.5])),
            seed=draw(st.integers(0, 1000)),
        )
        for _ in range(rows)
    ]
    params[0] = replace(params[0], repetition_penalty=1.5)  # with no penalty and no draw the kernel has nothing to do
    return logits, params


@interpreted
class TestInterpreted:
    @settings(max_examples=often(60, 1000), deadline=None)
    @given(rows_of_logits(), st.sampled_from([16, 256, 1024]))
    def test_draws_and_totals_are_the_exact_ones(self, drawn, block):
        check(*drawn, block)

    @pytest.mark.parametrize("ties", [False, True])
    def test_published_vocabulary(self, ties):
        generator = torch.Generator().manual_seed(int(ties))
        params = [
            Sampling(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.05, seed=0),
            Sampling(temperature=1.0, top_p=0.95, seed=1),
            Sampling(temperature=1.0, top_k=5000, seed=2),
            Sampling(temperature=3.0, top_p=0.999, seed=3),
            Sampling(),
            Sampling(temperature=1.0, seed=5),
        ]
        logits = torch.randn(len(params), PUBLISHED, generator=generator) * 4
        if ties:
            logits = logits.bfloat16().float()
        assert check(logits, params, block=1 << 16) >= 4

    @pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-52])
    def test_extreme_draws_stay_inside_the_distribution(self, number, monkeypatch):
        monkeypatch.setattr(sampler_module, "uniforms", lambda keys, numbers: np.full(len(keys), number))
        logits = torch.full((8, 300), -math.inf)
        logits[:, [7, 90, 299]] = torch.rand(8, 3)
        theirs, ours = samplers([Sampling(temperature=1.0), *[Sampling(temperature=2.0, top_p=0.9)] * 7], 300)
        assert ours(logits, range(8)).tolist() == theirs(logits, range(8)).tolist()

    def test_scores_that_lie_far_apart(self):
        """A geometric row, where an interval shrinks by few scores a pass, and subnormal numbers."""
        powers = torch.tensor([2.0**n for n in range(-140, 5, 2)] + [-(2.0**n) for n in range(-140, 30, 2)])
        params = [Sampling(temperature=1.0, top_k=k, top_p=p, seed=k) for k in (1, 30, 72, 100) for p in (1.0, 0.9)]
        assert check(powers.expand(len(params), -1).contiguous(), params) >= 4

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_row_of_no_finite_numbers_has_no_token_and_leaves_its_neighbours_alone(self, bad):
        logits = torch.zeros(5, 300)
        logits[:, 40] = 50
        logits[1] = logits[2] = bad
        logits[3, 3] = bad
        params = [Sampling(repetition_penalty=1.1), *[Sampling(temperature=1.0, top_p=0.9, top_k=5, seed=1)] * 4]
        params[2] = Sampling(repetition_penalty=1.1)
        theirs, ours = samplers(params, 300)
        found = ours(logits, range(5))
        assert found.tolist() == theirs(logits, range(5)).tolist()
        assert found.tolist() == [40, None, None, None if bad != -math.inf else 40, 40]
        assert 0 <= int(found.tokens.min()) <= int(found.tokens.max()) < 300  # a decoder can look all of them up

    @pytest.mark.parametrize("seed", range(5))
    def test_answers_of_many_steps(self, seed):
        """With every setting, masks of grammars and log-probabilities, in slots that change; what is noted too."""
        generator = torch.Generator().manual_seed(seed)
        vocab, rows = 70, 5
        prompts = torch.randint(vocab, (rows, 6), generator=generator).tolist()
        params = [
            Sampling(
                temperature=row / 2,
                top_k=[0, 20, 3, 0, 0][row],
                top_p=[1.0, 0.9, 1.0, 0.8, 1.0][row],
                min_p=[0.0, 0.05, 0.0, 0.0, 0.1][row],
                repetition_penalty=[1.5, 1.2, 1.0, 1.0, 0.5][row],
                presence_penalty=[0.0, 0.5, -0.5, 0.0, 0.0][row],
                frequency_penalty=[0.0, 0.25, 0.5, 0.0, 0.0][row],
                logit_bias={3: 4.0, 8: -100.0} if row % 2 else None,
                logprobs=3 if row == 2 else None,
                seed=row,
            )
            for row in range(rows)
        ]
        theirs, ours = samplers(params, vocab, 64, prompts)
        for step in range(12):
            slots = torch.randperm(rows, generator=generator)[: 2 + step % 4].tolist()
            logits = torch.randn(len(slots), vocab, generator=generator) * 4
            before = logits.clone()
            allowed = torch.randint(-(2**31), 2**31, (len(slots), 3), generator=generator).int().numpy()
            allowed = allowed if step % 3 else None
            expected, found = theirs(logits, slots, allowed=allowed), ours(logits, slots, allowed=allowed)
            assert found.tolist() == expected.tolist()
            asked = [params[slot].logprobs for slot in slots]
            assert found.logprobs(asked) == expected.logprobs(asked)
            assert torch.equal(logits, before)
            assert torch.equal(ours._seen, theirs._seen)
            assert torch.equal(ours._counts, theirs._counts)

    def test_penalties_of_more_tokens_than_a_block(self):
        params = [Sampling(repetition_penalty=3.0, temperature=1.0, seed=row) for row in range(2)]
        theirs, ours = samplers(params, 500, 64, [range(0, 500, 3), [5]])
        for logits in torch.randn(20, 2, 500, generator=torch.Generator().manual_seed(0)) * 3:
            assert ours(logits, [0, 1]).tolist() == theirs(logits, [0, 1]).tolist()

    def test_tokens_that_come_again(self):
        params = [
            Sampling(presence_penalty=1.5, frequency_penalty=f, temperature=t) for f in (0.0, 0.5) for t in (0, 1)
        ]
        params = [replace(each, seed=row) for row, each in enumerate(params)]
        theirs, ours = samplers(params, 5)
        for logits in torch.randn(25, 4, 5, generator=torch.Generator().manual_seed(0)):
            assert ours(logits, range(4)).tolist() == theirs(logits, range(4)).tolist()
        assert int(ours._counts.min(-1).values.max()) > 1

    def test_a_kernel_that_agrees_is_taken(self, caplog):
        own = kernel(512)
        assert checked_kernel(300, CPU, own) is own
        assert not caplog.records

    def test_a_kernel_that_draws_other_tokens_is_not(self, caplog):
        def off_by_one(*arguments):
            tokens, totals = sample(*arguments, block=512)
            return (tokens + 1) % 300, totals

        assert checked_kernel(300, CPU, off_by_one) is None
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert record.message.startswith(
            "Triton's kernel draws other tokens here than PyTorch; PyTorch samples instead"
        )


def test_a_kernel_that_does_not_compile_is_not_taken(monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError("Failed to find\nC compiler.")

    monkeypatch.setattr(triton_sampler, "triton_is_installed", lambda: True)
    assert checked_kernel(300, CPU, fail) is None
    assert "Triton cannot sample here (Failed to find C compiler.); PyTorch samples instead" in caplog.text


def test_pytorch_where_triton_is_missing(monkeypatch, caplog):
    monkeypatch.setattr(triton_sampler, "triton_is_installed", lambda: False)
    assert checked_kernel(300, CPU) is None
    assert "Triton is not installed; PyTorch samples instead" in caplog.text


def test_the_check_hangs_on_no_rounding():
    """Of the published vocabulary: a kernel is turned away for what it does wrong alone."""
    uniforms, found = [], []

    def judge(logits, plan, table, seen, counts, allowed):
        rows, plan = Rows(table), plan._replace(bias=False)
        uniforms.append(rows["uniform"][:, 0].tolist())
        found.append(own._masked(own.penalise(logits, plan, rows), allowed))
        return own._sample(logits, plan, rows, allowed)

    class Spy(Sampler):
        def __init__(self, *arguments):
            nonlocal own
            super().__init__(*arguments)
            own = self

    own = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_sampler, "Sampler", Spy)
        triton_sampler._draws(PUBLISHED, CPU, judge)
    assert len(found) == 3
    for step, numbers in zip(found, uniforms):
        for scores, number, params in zip(step, numbers, triton_sampler._CHECKED):
            assert Exact(scores, params).certain(number, times=100), params


class Launches:
    """Stands for the kernel."""

    def __init__(self, seen):
        self.seen = seen

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.seen.append(f"{grid[0]} programs")
            arguments[9].held.zero_()  # tokens

        return launch


@installed
@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize(("logprobs", "bias", "number"), [(None, None, 2), (5, {3: 1.0}, 12)])
def test_operators_of_a_gpu(rows, logprobs, bias, number, monkeypatch):
    """At most 12 with everything on; allocations, views, and the copies to and from the device not counted."""
    from qwen2vl_trt.runtime import sampling_kernel

    mode = Synchronisations()
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin(mode))
    params = Sampling(
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        min_p=0.05,
        repetition_penalty=1.05,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        seed=1,
        logprobs=logprobs,
        logit_bias=bias,
    )
    count = Synchronisations._count

    def counted(self, function, *arguments):
        if not function.is_view and not function._schema.name.startswith(("aten::empty", "aten::_to_copy")):
            seen.append(str(function))
        count(self, function, *arguments)

    with mode:
        own = Sampler(rows, 1500, META, sample)
        for slot in range(rows):
            own.start(slot, params, range(40))
        allowed = np.full((rows, 47), -1, np.int32)
        seen = []
        monkeypatch.setattr(sampling_kernel, "sample", Launches(seen))
        monkeypatch.setattr(Synchronisations, "_count", counted)
        own(DeviceTensor(torch.randn(rows, 1500)), range(rows), allowed=allowed)
    assert f"{rows} programs" in seen
    assert len(seen) == number, seen


@installed
def test_fields_are_those_of_the_table():
    from qwen2vl_trt.runtime import sampling_kernel

    assert sampling_kernel.WORDS.value * 8 == _ROW.itemsize
    for name, (dtype, offset) in _ROW.fields.items():
        assert getattr(sampling_kernel, name.upper()).value * dtype.itemsize == offset


KERNELS = """
from qwen2vl_trt.runtime import sampling_kernel, triton_sampler

def kernels():
    pointers = {"logits": "*fp32", "source": "*fp32", "scores": "*fp32", "table": "*i64", "doubles": "*fp64"}
    pointers |= {"floats": "*fp32", "seen": "*i64", "counts": "*fp32", "allowed": "*i32", "tokens": "*i64"}
    numbers = dict.fromkeys(("capacity", "candidates", "penalised", "counted", "masked"), "i32")
    sizes = {"VOCAB": 151_936, "BLOCK": triton_sampler.BLOCK}
    yield sampling_kernel.sample, pointers | {"totals": "*fp32"} | numbers, sizes, triton_sampler._WARPS
"""


@installed
def test_compiles_from_ampere_to_blackwell_without_spills(tmp_path):
    kernels = compiled(KERNELS, tmp_path)
    assert len(kernels) == 2 * len(CAPABILITIES)
    for kernel, used in kernels.items():
        assert used["STACK"] == used["LOCAL"] == 0, kernel
        assert used["REG"] <= 128, kernel  # of 65,536 of a multiprocessor, for 16 warps
