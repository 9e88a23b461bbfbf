"""Sampling against Transformers' logits processors, row by row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen2vl_trt.errors import SamplingError
from qwen2vl_trt.runtime import sampler
from qwen2vl_trt.runtime.sampler import SequenceSampling, distribution, penalise, sample
from qwen2vl_trt.runtime.sampling_params import Sampling, SamplingParams

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
    return processors(torch.tensor([prompt]), logits[None].clone())[0].softmax(-1)


def random_params(generator, **fixed):
    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    return Sampling(
        **{
            "temperature": pick(0.1, 0.7, 1.0, 2.5),
            "top_k": pick(0, 1, 5, 50, VOCAB - 1, VOCAB, 10 * VOCAB),
            "top_p": pick(1.0, 0.95, 0.5, 1e-4),
            "repetition_penalty": pick(1.0, 1.3, 0.8),
            "seed": 0,
        }
        | fixed
    )


@pytest.mark.parametrize("seed", range(30))
def test_distribution_of_every_row_equals_transformers(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = 1 + seed % 7
    logits = torch.randn(rows, VOCAB, generator=generator) * 4
    prompts = torch.randint(VOCAB, (rows, 40), generator=generator).tolist()
    params = [random_params(generator) for _ in range(rows)]
    sequences = [SequenceSampling(param, prompt, VOCAB) for param, prompt in zip(params, prompts, strict=True)]
    ours = distribution(penalise(logits, sequences), params)
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
    ours, enough = sampler._distribution(logits, params, 1024)
    exact = distribution(logits, params)
    assert torch.equal(ours[enough], exact[enough])
    assert bool(enough.all()) == (temperature < 1)  # what is looked at first is all, or is known to be too little
    ours = exact
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
    settings_ = [Sampling(temperature=t, top_p=p, seed=5) for t in (0.0, 0.1, 3.0) for p in (0.5, 0.99)]
    drawn = []
    for candidates in (VOCAB, 3):
        monkeypatch.setattr(sampler, "_CANDIDATES", candidates)
        sequences = [SequenceSampling(setting, [], VOCAB) for setting in settings_]
        drawn.append([sample(logits, sequences) for _ in range(40)])
    assert drawn[0] == drawn[1]


def test_ties_at_the_edge_of_top_k_are_kept_as_in_transformers():
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    params = Sampling(temperature=1.0, top_k=2)
    expected = transformers_distribution(logits[0], [0], params)
    torch.testing.assert_close(distribution(logits, [params])[0], expected)
    assert int((expected > 0).sum()) == 4


def test_greedy_with_repetition_penalty_equals_transformers_over_many_steps():
    torch.manual_seed(3)
    steps = torch.randn(30, VOCAB)
    prompt = [1, 2, 3, 3]
    sequence = SequenceSampling(Sampling(repetition_penalty=5.0), prompt, VOCAB)
    processor = RepetitionPenaltyLogitsProcessor(5.0)
    ids = list(prompt)
    for logits in steps:
        expected = int(processor(torch.tensor([ids]), logits[None].clone()).argmax())
        assert sample(logits[None], [sequence]) == [expected]
        ids.append(expected)
    assert ids[len(prompt) :] != steps.argmax(-1).tolist()


def test_greedy_is_argmax_and_leaves_logits_alone():
    torch.manual_seed(0)
    logits = torch.randn(5, VOCAB)
    before = logits.clone()
    sequences = [SequenceSampling(Sampling(), [1], VOCAB) for _ in range(5)]
    assert sample(logits, sequences) == logits.argmax(-1).tolist()
    mixed = [
        SequenceSampling(Sampling(temperature=t, repetition_penalty=p), [1], VOCAB)
        for t, p in [(0, 1), (1, 1), (0, 2), (1, 2), (0, 1)]
    ]
    tokens = sample(logits, mixed)
    assert [tokens[0], tokens[4]] == [int(logits[0].argmax()), int(logits[4].argmax())]
    assert torch.equal(logits, before)


def test_likeliest_tokens_that_the_engine_found_are_taken_where_nothing_changes_the_logits():
    logits = torch.zeros(2, VOCAB)
    found = torch.tensor([7, 9])  # not what argmax gives, to see which one is taken

    def tokens(**second):
        sequences = [SequenceSampling(Sampling(**params), [1], VOCAB) for params in ({}, second)]
        return sample(logits, sequences, found)

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
    greedy = [SequenceSampling(Sampling(), [1], 1500) for _ in range(4)]
    assert sample(logits, greedy, found) == [40, None, None, 40]
    params = [{}, {}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1}]
    mixed = [SequenceSampling(Sampling(**each), [1], 1500) for each in params]
    assert sample(logits, mixed, found) == [40, None, None, 40]
    logits[1] = 0
    logits[1, 3] = bad
    assert sample(logits[:2], greedy[:2])[1] == (None if bad != -math.inf else 0)


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    params = [Sampling(temperature=0.8, seed=seed) for seed in range(5000)]
    expected = distribution(logits[None], params[:1])[0].double()
    tokens = sample(logits.expand(5000, 5), [SequenceSampling(param, [], 5) for param in params])
    counts = torch.bincount(torch.tensor(tokens), minlength=5).double()
    deviation = (counts - 5000 * expected).abs() / (5000 * expected * (1 - expected)).sqrt()
    assert deviation.max() < 4.5

    one = SequenceSampling(Sampling(temperature=0.8, seed=1), [], 5)  # and along one sequence
    tokens = [sample(logits[None], [one])[0] for _ in range(3000)]
    counts = torch.bincount(torch.tensor(tokens), minlength=5).double()
    assert ((counts - 3000 * expected).abs() / (3000 * expected * (1 - expected)).sqrt()).max() < 4.5


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_extreme_draws_stay_inside_the_distribution(number, monkeypatch):
    monkeypatch.setattr(SequenceSampling, "draw", lambda self: number)
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, [7, 90]] = 1.0
    sequence = SequenceSampling(Sampling(temperature=1.0), [], VOCAB)
    assert sample(logits, [sequence]) == [7 if number == 0 else 90]


@pytest.mark.parametrize("temperature", [1.1e-5, 1e30])
def test_extreme_temperatures_overflow_nothing(temperature):
    logits = torch.tensor([[30.0, 29.0, -1e4]])
    probabilities = distribution(logits, [Sampling(temperature=temperature)])[0]
    expected = [1.0, 0.0, 0.0] if temperature < 1 else [1 / 3] * 3
    torch.testing.assert_close(probabilities, torch.tensor(expected))


def run(logits, params, prompts, row=None):
    """Sample over ``[steps, B, V]``; of one row alone, or of all."""
    rows = range(logits.shape[1]) if row is None else [row]
    sequences = [SequenceSampling(params[index], prompts[index], VOCAB) for index in rows]
    steps = [sample(step[list(rows)], sequences) for step in logits]
    return [list(tokens) for tokens in zip(*steps, strict=True)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(2, 6))
def test_neighbours_do_not_matter(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, rows, VOCAB, generator=generator) * 3
    prompts = torch.randint(VOCAB, (rows, 5), generator=generator).tolist()
    params = [random_params(generator, seed=row) for row in range(rows)]
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


def test_prompt_outside_the_vocabulary():
    with pytest.raises(ValueError, match="prompt token 300 is outside the vocabulary of 300"):
        SequenceSampling(Sampling(repetition_penalty=2), [1, VOCAB], VOCAB)


def test_rows_and_sequences_must_match():
    with pytest.raises(ValueError, match="2 rows of logits for 1 sequences"):
        sample(torch.zeros(2, VOCAB), [SequenceSampling(Sampling(), [], VOCAB)])


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
    ],
)
def test_meaningless_settings_are_named(name, value, allowed):
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} is {value!r}")
    assert allowed in message
    assert "\n" not in message
