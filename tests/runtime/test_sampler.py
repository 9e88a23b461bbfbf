"""Sampling against Transformers' logits processors, row by row."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen2vl_trt.errors import SamplingError
from qwen2vl_trt.runtime import sampler
from qwen2vl_trt.runtime.sampler import Rows, Sampler, check_prompt, uniforms, weigh
from qwen2vl_trt.runtime.sampling_params import Sampling, SamplingParams
from tests.support.device_tensors import META, DeviceTensor, Synchronisations, pin

VOCAB = 300


def transformers_distribution(logits, prompt, params):
    """What ``generate`` draws from: ``[V]`` logits of one row to probabilities."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors(torch.tensor([prompt]), logits[None].clone())[0].softmax(-1)


def random_params(generator, **fixed):
    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    return Sampling(
        **{
            "temperature": pick(0.1, 0.7, 1.0, 2.5),
            "top_k": pick(0, 5, 50, VOCAB - 1, VOCAB, 10 * VOCAB),
            "top_p": pick(1.0, 0.95, 0.5, 1e-4),
            "min_p": pick(0.0, 0.0, 0.02, 0.4),
            "repetition_penalty": pick(1.0, 1.3, 0.8),
            "seed": 0,
        }
        | fixed
    )


def started(params, prompts=None, vocab=VOCAB):
    """A sampler whose slots have these settings."""
    found = Sampler(len(params), vocab)
    for slot, param in enumerate(params):
        found.start(slot, param, prompts[slot] if prompts else [1])
    return found


def sample(own, logits, greedy=None):
    return own(logits, list(range(len(logits))), greedy).tolist()


def distribution(logits, params, prompts=None, own=None):
    """Probabilities ``[B, V]`` that rows are drawn by."""
    own = own or started(params, prompts, logits.shape[-1])
    plan, table = own.stage(list(range(len(params))))
    weights = weigh(own.penalise(logits, plan, Rows(table)), plan, Rows(table))
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("seed", range(30))
def test_distribution_of_every_row_equals_transformers(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = 1 + seed % 7
    logits = torch.randn(rows, VOCAB, generator=generator) * 4
    prompts = torch.randint(VOCAB, (rows, 40), generator=generator).tolist()
    params = [random_params(generator) for _ in range(rows)]
    ours = distribution(logits, params, prompts)
    for row in range(rows):
        expected = transformers_distribution(logits[row], prompts[row], params[row])
        assert torch.equal(ours[row] > 0, expected > 0), params[row]
        torch.testing.assert_close(ours[row], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 100.0])
@pytest.mark.parametrize("top_k", [0, 2000])
def test_top_p_of_a_large_vocabulary_equals_transformers(temperature, top_k):
    """From nuclei of a few tokens to nuclei far larger than what is looked at first, in one batch."""
    torch.manual_seed(0)
    logits = torch.randn(4, 20_000) * 3
    params = [Sampling(temperature=temperature, top_k=top_k, top_p=p) for p in (0.9, 0.1, 1.0, 0.999)]
    ours = distribution(logits, params)
    for row, param in enumerate(params):
        expected = transformers_distribution(logits[row], [0], param)
        # Transformers adds 20,000 terms up in single precision: where its sum comes close to 1 - top_p, the last
        # tokens that it keeps are a matter of rounding.
        assert int(((ours[row] > 0) != (expected > 0)).sum()) <= 2
        torch.testing.assert_close(ours[row], expected, rtol=1e-3, atol=1e-6)
    sizes = (ours > 0).sum(-1).tolist()
    assert sizes[1] < sizes[0] < sizes[3] <= sizes[2]
    if temperature == 100 and not top_k:
        assert sizes[0] > 10_000


def test_rows_that_need_more_candidates_draw_what_they_would_have_drawn(monkeypatch):
    torch.manual_seed(1)
    logits = torch.randn(6, VOCAB)
    params = [Sampling(temperature=t, top_p=p, seed=5) for t in (0.0, 0.1, 3.0) for p in (0.5, 0.99)]
    drawn = []
    for candidates in (VOCAB, 3):
        monkeypatch.setattr(sampler, "_CANDIDATES", candidates)
        own = started(params)
        drawn.append([sample(own, logits) for _ in range(40)])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("vocab", [VOCAB, 3000])  # with fewer tokens than candidates, and with more
def test_a_device_that_the_host_does_not_look_at_draws_the_same(vocab, monkeypatch):
    mode = Synchronisations()
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin(mode))
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(6, 12, vocab, generator=generator) * 3
    prompts = [list(range(3, 9))] * 12
    params = [random_params(generator, seed=row, presence_penalty=row / 10) for row in range(11)]
    params.append(Sampling(temperature=50.0, top_p=0.95, seed=1))  # needs more than 1,024 candidates
    own = started(params, prompts, vocab)
    expected = [sample(own, step) for step in logits]
    with mode:
        other = Sampler(12, vocab, META)
        for slot, param in enumerate(params):
            other.start(slot, param, prompts[slot])
        steps = [other(DeviceTensor(step), list(range(12))) for step in logits]
        assert len(mode.seen) == len(steps)  # each copy of tokens to the host, which has begun
        assert [step.tolist() for step in steps] == expected


@pytest.mark.parametrize("most", [1, 2, 3])
def test_rows_without_memory_are_drawn_in_halves(most, monkeypatch):
    """As they would have been together, and noted once."""
    generator = torch.Generator().manual_seed(most)
    params = [random_params(generator, seed=row, frequency_penalty=row / 10) for row in range(5)]
    logits = torch.randn(8, 5, VOCAB, generator=generator) * 3
    own, other = started(params), started(params)
    allowed = np.random.default_rng(0).integers(-(2**31), 2**31, (5, 10), np.int32)
    expected = [own(step, range(5), None, allowed).tolist() for step in logits]

    def scarce(scores, plan, rows):
        if len(scores) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return weigh(scores, plan, rows)

    monkeypatch.setattr(sampler, "weigh", scarce)
    assert [other(step, range(5), None, allowed).tolist() for step in logits] == expected
    assert torch.equal(other._counts, own._counts)
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        other(logits[0], range(5))


@pytest.mark.parametrize("most", [0, 1, 2])
def test_log_probabilities_without_memory_are_taken_in_halves(most, monkeypatch):
    logits, params = torch.randn(5, VOCAB), [Sampling(logprobs=number) for number in (0, 1, 2, 3, 4)]
    expected = started(params)(logits, range(5))
    logsumexp = torch.Tensor.logsumexp

    def scarce(self, **options):
        if len(self) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logsumexp(self, **options)

    monkeypatch.setattr(torch.Tensor, "logsumexp", scarce)
    if most == 0:
        with pytest.raises(torch.OutOfMemoryError):
            started(params)(logits, range(5))
        return
    found = started(params)(logits, range(5))
    assert found.tolist() == expected.tolist()
    assert found.logprobs(range(5)) == expected.logprobs(range(5))


def test_ties_at_the_edge_of_top_k_are_kept_as_in_transformers():
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    params = Sampling(temperature=1.0, top_k=2)
    expected = transformers_distribution(logits[0], [0], params)
    torch.testing.assert_close(distribution(logits, [params])[0], expected)
    assert int((expected > 0).sum()) == 4


def test_ties_at_the_edge_of_top_p_are_all_kept():
    """Transformers keeps those that its sort happens to put first."""
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]])
    found = distribution(logits, [Sampling(temperature=1.0, top_p=0.75)])[0]
    assert (found > 0).tolist() == [True, True, True, True, False]


def test_what_ties_at_the_edge_of_top_k_weigh_counts_for_top_p():
    """The first has 47% of the four that top-k keeps, and would have 73% of the first two."""
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    found = distribution(logits, [Sampling(temperature=1.0, top_k=2, top_p=0.6)])[0]
    assert (found > 0).tolist() == [True, True, True, True, False]


def test_top_p_that_rounded_probabilities_never_reach():
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0))
    ours = distribution(logits, [Sampling(temperature=0.9, top_p=1 - 2**-45)])[0]
    torch.testing.assert_close(ours, (logits[0] / 0.9).softmax(-1))


def test_penalties_equal_transformers_and_the_formula_over_many_steps():
    """Greedy; in between the sequences lose their slots, and go on in others with what they have drawn."""
    torch.manual_seed(3)
    steps = (torch.randn(VOCAB) * 2 + torch.randn(40, 1, VOCAB)).repeat(1, 6, 1)  # with tokens that come again
    prompt = [1, 2, 3, 3]
    params = [
        Sampling(repetition_penalty=5.0),
        Sampling(presence_penalty=2.0),
        Sampling(frequency_penalty=1.5),
        Sampling(repetition_penalty=1.5, presence_penalty=-0.5, frequency_penalty=0.5),
        Sampling(frequency_penalty=-0.5),
        Sampling(),
    ]
    own = started(params, [prompt] * 6)
    answers = [[] for _ in params]
    slots = list(range(6))
    for number, logits in enumerate(steps):
        if number == 17:
            slots = slots[::-1]
            for slot, param, answer in zip(slots, params, answers, strict=True):
                own.start(slot, param, prompt, answer)
        tokens = own(logits, slots).tolist()
        for row, (param, answer) in enumerate(zip(params, answers, strict=True)):
            scores = logits[row : row + 1].clone()
            if param.repetition_penalty != 1:
                penalty = RepetitionPenaltyLogitsProcessor(param.repetition_penalty)
                scores = penalty(torch.tensor([prompt + answer]), scores)
            counts = torch.bincount(torch.tensor(answer, dtype=torch.long), minlength=VOCAB)
            scores = scores - param.frequency_penalty * counts - param.presence_penalty * (counts > 0)
            assert tokens[row] == int(scores.argmax())
            answer.append(tokens[row])
    assert len({tuple(answer) for answer in answers}) == 6


def test_seen_tokens_grow():
    """Past each power of two, in one row and not in the other."""
    torch.manual_seed(0)
    steps = torch.randn(70, 2, VOCAB)
    prompts = [[5], list(range(100, 230))]
    params = [Sampling(repetition_penalty=3.0)] * 2
    own, alone = started(params, prompts), started(params[:1], prompts)
    for logits in steps:
        assert sample(own, logits)[0] == sample(alone, logits[:1])[0]


def test_greedy_is_argmax_and_leaves_logits_alone():
    torch.manual_seed(0)
    logits = torch.randn(5, VOCAB)
    before = logits.clone()
    assert sample(started([Sampling()] * 5), logits) == logits.argmax(-1).tolist()
    mixed = [
        Sampling(temperature=t, repetition_penalty=p, frequency_penalty=f)
        for t, p, f in [(0, 1, 0), (1, 1, 1), (0, 2, 1), (1, 2, 0), (0, 1, 0)]
    ]
    tokens = sample(started(mixed), logits)
    assert [tokens[0], tokens[4]] == [int(logits[0].argmax()), int(logits[4].argmax())]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("drawn", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {}])
def test_a_greedy_row_beside_drawn_ones_is_argmax_where_logits_tie(drawn):
    logits = torch.zeros(3, VOCAB)
    logits[:, 7] = logits[:, 9] = 1
    logits[1, 9] = 1 + 2**-23  # the exponentials of both are 1 in single precision
    own = started([Sampling(), Sampling(), Sampling(temperature=0.5, seed=1, **drawn)])
    for _ in range(20):
        assert sample(own, logits)[:2] == [7, 9]


def test_likeliest_tokens_that_the_engine_found_are_taken_where_nothing_changes_the_logits():
    logits = torch.zeros(2, VOCAB)
    found = torch.tensor([7, 9])  # not what argmax gives, to see which one is taken

    def tokens(**second):
        return sample(started([Sampling(), Sampling(**second)]), logits, found)

    assert tokens() == [7, 9]
    assert tokens(repetition_penalty=2.0) == [0, 0]
    assert tokens(temperature=1e-4)[0] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("engine_found", [True, False])
def test_a_row_of_no_finite_numbers_has_no_token_and_leaves_its_neighbours_alone(bad, engine_found):
    logits = torch.zeros(4, 1500)  # more than top-p looks at first
    logits[:, 40] = 50
    logits[1] = logits[2] = bad
    found = logits.argmax(-1) if engine_found else None
    greedy = started([Sampling()] * 4, vocab=1500)
    assert sample(greedy, logits, found) == [40, None, None, 40]
    params = [{}, {}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1}]
    drawn = started([Sampling(**each) for each in params], vocab=1500)
    tokens = drawn(logits, range(4), found)
    assert tokens.tolist() == [40, None, None, 40]
    assert tokens.tokens[0] == 40
    assert 0 <= int(tokens.tokens.min()) <= int(tokens.tokens.max()) < 1500  # a decoder can look all of them up
    logits[1] = 0
    logits[1, 3] = bad
    assert greedy(logits[:2], [0, 1]).tolist()[1] == (None if bad != -math.inf else 0)


def deviation(tokens, probabilities):
    """Of each token's count from the expected one, in standard deviations."""
    expected = probabilities.double() * len(tokens)
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probabilities)).double()
    return ((counts - expected).abs() / (expected * (1 - probabilities)).sqrt().clamp(min=1e-9)).max()


@pytest.mark.parametrize(
    "chosen", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.2}, {"top_k": 4, "top_p": 0.99, "min_p": 0.01}]
)
def test_draws_follow_the_distribution(chosen):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    params = [Sampling(temperature=0.8, seed=seed, **chosen) for seed in range(5000)]
    expected = transformers_distribution(logits, [1], params[0])
    assert deviation(sample(started(params, vocab=5), logits.expand(5000, 5)), expected) < 4.5
    one = started(params[1:2], vocab=5)  # and along one sequence
    assert deviation([sample(one, logits[None])[0] for _ in range(3000)], expected) < 4.5


def test_random_numbers_are_splitmix64():
    """The first numbers of seed 1234567 in the author's C code, of which the upper 52 bits are taken."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = uniforms(np.full(4, 1234567, np.uint64), np.arange(4, dtype=np.uint64))
    assert found.tolist() == [(number >> 12) / 2**52 for number in published]


def test_random_numbers_of_neighbouring_seeds_and_draws_are_independent():
    own = started([Sampling(temperature=1.0, seed=seed) for seed in range(200)])
    numbers = np.arange(500, dtype=np.uint64)
    found = np.stack([uniforms(np.full(500, key), numbers) for key in own._keys])  # [seeds, draws]
    assert found.min() >= 0
    assert found.max() < 1
    counts, _ = np.histogram(found, 256, (0, 1))
    expected = found.size / 256
    assert ((counts - expected) ** 2 / expected).sum() < 347  # chi-square of 255 degrees, 1 in 10,000
    for one, other in ((found[1:], found[:-1]), (found[:, 1:], found[:, :-1])):
        pairs, _, _ = np.histogram2d(one.ravel(), other.ravel(), 16, [(0, 1), (0, 1)])
        assert ((pairs - one.size / 256) ** 2 / (one.size / 256)).sum() < 347
    assert len(np.unique(found)) == found.size


@pytest.mark.parametrize("number", [0.0, 1 - 2**-52])
def test_extreme_draws_stay_inside_the_distribution(number, monkeypatch):
    monkeypatch.setattr(sampler, "uniforms", lambda keys, numbers: np.full(len(keys), number))
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, [7, 90]] = 1.0
    assert sample(started([Sampling(temperature=1.0)]), logits) == [7 if number == 0 else 90]
    for scale in torch.rand(50).tolist():  # whatever the total rounds to
        logits[0, 7] = scale
        assert sample(started([Sampling(temperature=1.0)]), logits) == [7 if number == 0 else 90]


@pytest.mark.parametrize("temperature", [1.1e-5, 1e30, 1e300])
def test_extreme_temperatures_overflow_nothing(temperature):
    logits = torch.tensor([[30.0, 29.0, -1e4]])
    probabilities = distribution(logits, [Sampling(temperature=temperature)])[0]
    expected = [1.0, 0.0, 0.0] if temperature < 1 else [1 / 3] * 3
    torch.testing.assert_close(probabilities, torch.tensor(expected))


def run(logits, params, prompts, row=None):
    """Sample over ``[steps, B, V]``; of one row alone, or of all."""
    rows = range(logits.shape[1]) if row is None else [row]
    own = started([params[index] for index in rows], [prompts[index] for index in rows])
    steps = [sample(own, step[list(rows)]) for step in logits]
    return [list(tokens) for tokens in zip(*steps, strict=True)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(2, 6), ties=st.booleans())
def test_neighbours_do_not_matter(seed, rows, ties):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, rows, VOCAB, generator=generator) * 3
    if ties:  # in BF16 many logits are equal
        logits = logits.round()
    prompts = torch.randint(VOCAB, (rows, 5), generator=generator).tolist()
    params = [
        random_params(generator, seed=row, presence_penalty=row % 3 / 2, frequency_penalty=row % 2 / 2)
        for row in range(rows)
    ]
    params[0] = random_params(generator, temperature=0.0)
    together = run(logits, params, prompts)
    for row in range(rows):
        assert run(logits, params, prompts, row) == [together[row]]


def test_seed_decides_the_draws():
    logits = torch.zeros(20, 1, VOCAB)

    def answer(seed):
        return run(logits, [Sampling(temperature=1.0, seed=seed)], [[]])

    assert answer(5) == answer(5)
    assert answer(5) != answer(6)
    assert answer(None) != answer(None)
    assert answer(2**63 - 1) != answer(0)


def test_draws_go_on_where_a_sequence_was_interrupted():
    logits = torch.zeros(20, 1, VOCAB)
    params = Sampling(temperature=1.0, seed=5, frequency_penalty=0.5)
    whole = run(logits, [params], [[1]])[0]
    own = Sampler(3, VOCAB)
    own.start(2, params, [1], whole[:8])
    assert [own(step, [2]).tolist()[0] for step in logits[8:]] == whole[8:]


def random_bias(generator, number):
    ids = torch.randperm(VOCAB, generator=generator)[:number].tolist()
    return {token: float(value) for token, value in zip(ids, torch.randn(number, generator=generator) * 30)}


@pytest.mark.parametrize("seed", range(10))
def test_a_bias_comes_before_the_penalty_as_in_transformers(seed):
    """Rows with biases of several lengths, and none, in slots that had others before."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, VOCAB, generator=generator) * 4
    prompts = torch.randint(VOCAB, (5, 40), generator=generator).tolist()
    own = started([Sampling(logit_bias=random_bias(generator, 9))] * 5)
    biases = [random_bias(generator, number) if number else None for number in (0, 1, 7, 12, 0)]
    params = [random_params(generator, logit_bias=bias) for bias in biases]
    for slot, param in enumerate(params):
        own.start(slot, param, prompts[slot])
    ours = distribution(logits, params, prompts, own)
    for row, bias in enumerate(biases):
        biased = logits[row]
        if bias is not None:
            processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
            biased = processor(torch.tensor([prompts[row]]), logits[row][None])[0]
        expected = transformers_distribution(biased, prompts[row], params[row])
        torch.testing.assert_close(ours[row], expected, rtol=1e-4, atol=1e-7)


def test_greedy_rows_take_the_biased_argmax_and_leave_the_others_alone():
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1).tolist()
    own = started([Sampling(), Sampling(logit_bias={7: 100}), Sampling(logit_bias={best[2]: -100}), Sampling()])
    found = sample(own, logits, logits.argmax(-1))
    assert found == [best[0], 7, int(logits[2].topk(2).indices[1]), best[3]]
    own.start(1, Sampling(), [1])
    assert sample(own, logits)[1] == best[1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_logprobs_are_those_of_the_raw_logits(device, monkeypatch):
    mode = Synchronisations()
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin(mode))
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(5, VOCAB, generator=generator) * 4
    asked = [None, 0, 3, 20, None]
    params = [
        Sampling(logprobs=asked[row], temperature=row / 2, seed=row, repetition_penalty=1.5, logit_bias={5: 9.0})
        for row in range(5)
    ]
    with mode:
        own = Sampler(5, VOCAB, META if device == "meta" else "cpu")
        for slot, param in enumerate(params):
            own.start(slot, param, [1, 2])
        found = own(DeviceTensor(logits) if device == "meta" else logits, range(5))
        assert len(mode.seen) == (1 if device == "meta" else 0)  # the one copy to the host
        tokens = found.tolist()
        logprobs = found.logprobs(asked)
    expected = logits.log_softmax(-1)
    for row, number in enumerate(asked):
        if number is None:
            assert logprobs[row] is None
            continue
        best = expected[row].topk(number)
        assert logprobs[row].token_id == tokens[row]
        assert logprobs[row].logprob == pytest.approx(float(expected[row, tokens[row]]), abs=1e-5)
        assert [token for token, _ in logprobs[row].top] == best.indices.tolist()
        assert [value for _, value in logprobs[row].top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_do_not_change_the_draws():
    logits = torch.randn(20, 1, VOCAB, generator=torch.Generator().manual_seed(6))
    drawn = [run(logits, [Sampling(temperature=1.0, seed=5, logprobs=number)], [[1]]) for number in (None, 0, 5000)]
    assert drawn[0] == drawn[1] == drawn[2]


def test_prompt_outside_the_vocabulary():
    for params in (Sampling(repetition_penalty=2), Sampling(presence_penalty=1)):
        with pytest.raises(ValueError, match="prompt token 300 is outside the vocabulary of 300"):
            check_prompt(params, [1, VOCAB], VOCAB)
        with pytest.raises(ValueError, match="prompt token -1 is outside the vocabulary of 300"):
            Sampler(1, VOCAB).start(0, params, [-1, 1])
    check_prompt(Sampling(), [1, VOCAB], VOCAB)


def test_rows_and_slots_must_match():
    with pytest.raises(ValueError, match="2 rows of logits for 1 slots"):
        Sampler(1, VOCAB)(torch.zeros(2, VOCAB), [0])


class Operators(TorchDispatchMode):
    """Those that read or write elements; views do not."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.seen.append(str(function))
        return function(*args, **kwargs or {})


REPEATED = {"repetition_penalty": 1.05}  # as the published checkpoints
PENALISED = REPEATED | {"presence_penalty": 0.5, "frequency_penalty": 0.5}
FILTERED = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05}


@pytest.mark.parametrize(
    ("chosen", "number"),
    [
        ({}, 2),
        (REPEATED, 8),
        (PENALISED, 13),
        ({"temperature": 0.7}, 6),
        ({"temperature": 0.7, "top_k": 20}, 11),
        ({"temperature": 0.7, "top_p": 0.8}, 15),
        (FILTERED, 20),
        (FILTERED | PENALISED, 31),
        ({"logit_bias": {3: 1.0}}, 5),
        ({"logprobs": 0}, 6),
        ({"logprobs": 5}, 8),
    ],
)
def test_operators_do_not_grow_with_the_rows(chosen, number):
    """A GPU has one more, and two copies."""
    counts = []
    for rows in (2, 64):
        own = started([Sampling(seed=row, **chosen) for row in range(rows)], [range(40)] * rows, 1500)
        logits = torch.randn(rows, 1500)
        with Operators() as operators:
            operators.seen = []
            own(logits, range(rows)).tolist()
        counts.append(operators.seen)
    assert counts[0] == counts[1]
    assert len(counts[0]) == number


def test_the_default_is_greedy():
    params = SamplingParams().with_defaults()
    assert params == Sampling(256, 0.0, 1.0, 0, 1.0, None, (), False, max_tokens_given=False)
    assert params.greedy
    assert not params.penalised


def test_what_a_request_says_wins_over_the_defaults():
    defaults = SamplingParams(7, temperature=0.8, top_p=0.9, top_k=5, repetition_penalty=1.05, stop="END")
    assert SamplingParams().with_defaults(defaults) == Sampling(
        7, 0.8, 0.9, 5, 1.05, None, ("END",), max_tokens_given=False
    )
    own = SamplingParams(9, temperature=0, top_p=1, top_k=0, repetition_penalty=1, seed=3, stop=(), ignore_eos=True)
    assert own.with_defaults(defaults) == Sampling(9, 0, 1, 0, 1, 3, (), True)
    assert SamplingParams(top_k=2).with_defaults(defaults).top_p == 0.9


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (1e-6, True), (1e-5, True), (1.1e-5, False)])
def test_the_lowest_temperatures_are_greedy(temperature, greedy):
    assert Sampling(temperature=temperature).greedy is greedy
    assert Sampling(temperature=0.1, top_k=1).greedy


@pytest.mark.parametrize("stop", ["END", ["END"], ("END",)])
def test_stop_takes_one_string_or_many(stop):
    assert SamplingParams(stop=stop).stop == ("END",)
    assert hash(SamplingParams(stop=stop)) == hash(SamplingParams(stop=("END",)))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *[("max_tokens", value, "at least 1") for value in (0, -1, 1.5, math.nan, True)],
        *[("temperature", value, "at least 0") for value in (math.nan, math.inf, -math.inf, -0.1, "1", True)],
        *[("top_p", value, "above 0 and up to 1") for value in (0, -0.1, 1.0001, math.nan, math.inf, "1")],
        *[("top_k", value, "at least 0") for value in (-1, 1.5, math.nan, True)],
        *[
            ("repetition_penalty", value, "from 0.0001 to 10000")
            for value in (0, -1, 1e-300, 1e300, math.nan, math.inf)
        ],
        *[("seed", value, "None or a whole number") for value in (-1, 2**63, 1.5, "1", True)],
        *[("stop", value, "not empty") for value in ("", [""], ["a", ""], [1], 3, b"x", "\ud800", ["a", "b\udfff"])],
        *[("ignore_eos", value, "True or False") for value in (1, None, "yes")],
        *[("stop_token_ids", value, "token ids") for value in (5, [-1], ["a"], [True], [1.0], "ab")],
        *[
            ("logit_bias", value, "from -100 to 100")
            for value in ([1], {"1": 1}, {1: 101}, {1: -100.5}, {1: math.nan}, {-1: 1}, {1: "a"}, {True: 1})
        ],
        *[("logprobs", value, "at least 0") for value in (-1, 1.5, True, "1")],
        *[("structured_outputs", value, "StructuredOutputsParams(json=...)") for value in ({}, "json", True)],
    ],
)
def test_meaningless_settings_are_named(name, value, allowed):
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} is {value!r}")
    assert allowed in message
    assert "\n" not in message
