"""Stop tokens, biases and log-probabilities through whole pipelines, against Transformers and against themselves."""

import pytest
import torch

from qwen2vl_trt import Request, SamplingError, SamplingParams
from qwen2vl_trt.runtime.sampling_params import Sampling
from qwen2vl_trt.runtime.scheduling.scheduler import Scheduler
from qwen2vl_trt.runtime.service import Service
from tests.runtime.scheduling.test_scheduler import make_decoder
from tests.support.fake_decoder import FakePagedDecoder, drain, expected, sequence

PROMPT = "What digits are in the image?"


def inputs(reference):
    _, processor = reference
    messages = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return processor(text=[text], return_tensors="pt")


def test_logprobs_equal_transformers(pipeline, reference):
    """Whatever else is asked for: they are of the raw logits."""
    given = inputs(reference)
    length = given["input_ids"].shape[1]
    found = reference[0].generate(
        **given,
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.3,
        return_dict_in_generate=True,
        output_logits=True,
    )
    output = pipeline.generate([Request(PROMPT)], SamplingParams(12, repetition_penalty=1.3, logprobs=3))[0]
    assert output.token_ids == found.sequences[0, length:].tolist()
    logprobs = torch.cat(found.logits).log_softmax(-1)
    assert [each.token_id for each in output.logprobs] == output.token_ids
    for each, row in zip(output.logprobs, logprobs, strict=True):
        best = row.topk(3)
        assert each.logprob == pytest.approx(float(row[each.token_id]), abs=1e-4)
        assert [value for _, value in each.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_bias_equals_transformers(pipeline, reference):
    given = inputs(reference)
    length = given["input_ids"].shape[1]
    plain = pipeline.generate([Request(PROMPT)], SamplingParams(8, ignore_eos=True))[0].token_ids
    bias = {plain[0]: -100.0, plain[2]: -3.0, 40: 2.5}
    found = reference[0].generate(
        **given,
        max_new_tokens=8,
        min_new_tokens=8,
        eos_token_id=None,
        do_sample=False,
        sequence_bias=[[[token], value] for token, value in bias.items()],
    )
    params = SamplingParams(8, ignore_eos=True, logit_bias=bias)
    output, beside = pipeline.generate([Request(PROMPT)] * 2, [params, SamplingParams(8, ignore_eos=True)])
    assert output.token_ids == found[0, length:].tolist()
    assert plain[0] not in output.token_ids
    assert beside.token_ids == plain
    assert beside.logprobs is None


def test_events_have_the_logprobs_of_their_token(pipeline):
    settings = [SamplingParams(6, ignore_eos=True, logprobs=0), SamplingParams(6, ignore_eos=True)]
    events = [[], []]
    outputs = pipeline.generate([Request(PROMPT)] * 2, settings, lambda event: events[event.index].append(event))
    assert [event.logprobs for event in events[0]] == outputs[0].logprobs
    assert all(each.top == () for each in outputs[0].logprobs)
    assert [event.logprobs for event in events[1]] == [None] * 6
    with Service(pipeline) as service:
        answer = service.submit(Request(PROMPT), settings[0])
        assert [event.logprobs for event in answer] == answer.output.logprobs


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_token_ends_the_answer_and_is_no_text(pipeline, ignore_eos):
    whole = pipeline.generate([Request(PROMPT)], SamplingParams(20, ignore_eos=True))[0].token_ids
    number = next(n for n, token in enumerate(whole) if n >= 3 and token not in whole[:n])
    before = pipeline.generate([Request(PROMPT)], SamplingParams(number, ignore_eos=True))[0]
    params = SamplingParams(20, ignore_eos=ignore_eos, stop_token_ids=[whole[number]])
    output = pipeline.generate([Request(PROMPT)], params)[0]
    assert output.token_ids == whole[: number + 1]
    assert output.finish_reason == "stop"
    assert output.text == before.text


def test_tokens_outside_the_vocabulary_fail_their_request_alone(pipeline):
    size = pipeline.engines.checkpoint.config.text.vocab_size
    good = SamplingParams(3, logit_bias={size - 1: 1.0}, stop_token_ids=(size - 1,))
    bad = [SamplingParams(3, logit_bias={size: 1.0}), SamplingParams(3, stop_token_ids=(0, size))]
    outputs = pipeline.generate([Request(PROMPT)] * 3, [good, *bad])
    assert outputs[0].finish_reason is not None
    for output, name in zip(outputs[1:], ("logit_bias", "stop_token_ids")):
        with pytest.raises(SamplingError, match=f"{name} has token {size}; the model's vocabulary has 0 to"):
            output.text  # noqa: B018


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", ["packed", "rows", "pages"])
def test_one_step_ahead_changes_nothing(kind, ahead):
    """The fake decoder gives its one likely token a logit of 1, so that a bias of 2 wins."""
    scheduler = Scheduler(make_decoder(kind, 3), 100, ahead=ahead)
    plain = sequence([1, 2, 3], max_tokens=5)
    biased = sequence([1, 2, 3], params=Sampling(5, logit_bias={9: 2.0}, logprobs=1))
    answer = expected([4, 5], 5)
    stopped = sequence([4, 5], params=Sampling(5, stop_token_ids=(answer[2],), logprobs=0))
    for each in (plain, biased, stopped):
        scheduler.add(each)
    drain(scheduler)
    assert plain.output.token_ids == expected([1, 2, 3], 5)
    assert plain.output.logprobs is None
    assert biased.output.token_ids == [9] * 5
    row = torch.zeros(32)
    row[0] = 1  # the likely one's
    likely, other = row.log_softmax(-1)[:2].tolist()
    held = [1, 2, 3]
    for each in biased.output.logprobs:
        best = sum(held) % 32
        assert each.top[0] == (best, pytest.approx(likely))
        assert each.logprob == pytest.approx(likely if best == 9 else other)
        held.append(9)
    stop = answer.index(answer[2]) + 1
    assert stopped.output.token_ids == answer[:stop]
    assert stopped.output.finish_reason == "stop"
    assert len(stopped.output.logprobs) == stop


@pytest.mark.parametrize("ahead", [False, True])
def test_a_preempted_answer_keeps_its_settings(ahead):
    decoder = FakePagedDecoder(2, 4)
    scheduler = Scheduler(decoder, 2048, ahead=ahead)
    params = Sampling(max_tokens=300, logit_bias={9: 2.0}, logprobs=0)
    old, young = sequence([1] * 500, params=Sampling(max_tokens=200)), sequence([2] * 200, params=params)
    young.output.arrival = old.output.arrival + 1
    scheduler.add(old)
    scheduler.add(young)
    drain(scheduler, 2000)
    assert scheduler._counters.preemptions
    assert old.output.token_ids == expected([1] * 500, 200)
    assert young.output.token_ids == [9] * 300
    assert [each.token_id for each in young.output.logprobs] == [9] * 300
