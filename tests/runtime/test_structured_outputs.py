"""Answers that follow a schema, an expression, a choice or a grammar, beside free ones."""

import json
import re
from collections import Counter

import jsonschema
import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from qwen2vl_trt import Pipeline, Request, SamplingError, SamplingParams, StructuredOutputsParams
from qwen2vl_trt.runtime.sampler import Sampler
from qwen2vl_trt.runtime.sampling_params import Sampling
from qwen2vl_trt.runtime.scheduling.scheduler import Scheduler
from tests.runtime.scheduling.test_scheduler import Order, make_decoder
from tests.support.chat import make_tokenizer
from tests.support.fake_decoder import FakePagedDecoder, drain, expected, sequence
from tests.support.grammars import SPELLED, check_spelled

PROMPT = "What digits are in the image?"
SCHEMAS = [
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y", None, 3]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "number", "minimum": -2, "maximum": 7.5}, "minItems": 1, "maxItems": 3},
    {"type": "string", "pattern": "^[A-Z]{2,4}-[0-9]{1,3}$"},
    {
        "type": "object",
        "properties": {
            "boxes": {
                "type": "array",
                "maxItems": 2,
                "items": {"$ref": "#/$defs/box"},
            },
            "note": {"type": "string", "maxLength": 8},
        },
        "required": ["boxes"],
        "additionalProperties": False,
        "$defs": {
            "box": {
                "type": "object",
                "properties": {"at": {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4}},
                "required": ["at"],
                "additionalProperties": False,
            }
        },
    },
    {"anyOf": [{"type": "boolean"}, {"const": {"k": [1, 2]}}]},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "engines"
    return Pipeline.from_pretrained("tiny", backend="torch", precision="fp32", device="cpu", engine_dir=folder)


def ask(pipeline, **given):
    params = SamplingParams(120, temperature=1.0, seed=1, structured_outputs=StructuredOutputsParams(**given))
    return pipeline.generate([Request(PROMPT)], params)[0]


def test_two_hundred_answers_at_a_high_temperature_all_validate(tiny):
    params = [
        SamplingParams(
            400, temperature=1.5, seed=n, structured_outputs=StructuredOutputsParams(json=SCHEMAS[n % len(SCHEMAS)])
        )
        for n in range(200)
    ]
    outputs = tiny.generate([Request(PROMPT)] * 200, params)
    ends = Counter(output.finish_reason for output in outputs)
    assert set(ends) <= {"stop", "length"}
    assert ends["stop"] >= 190
    for number, output in enumerate(outputs):
        if output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), SCHEMAS[number % len(SCHEMAS)])
    assert len({output.text for output in outputs}) > 100


def test_expressions_choices_and_grammars(tiny):
    assert re.fullmatch(r"[0-9]{3}(ab|c)", ask(tiny, regex=r"[0-9]{3}(ab|c)").text)
    choices = ['say "yes"\n', "no\\", "vielleicht \u2028😀"]
    assert ask(tiny, choice=choices[:1]).text == choices[0]
    assert ask(tiny, choice=choices[1:2]).text == choices[1]
    assert ask(tiny, choice=choices[2:]).text == choices[2]
    assert ask(tiny, choice=choices).text in choices
    assert re.fullmatch("ab(c|d)", ask(tiny, grammar='start: "ab" end\nend: "c" | "d"').text)
    assert re.fullmatch("ab(c|d)", ask(tiny, grammar='root ::= "ab" end\nend ::= "c" | "d"').text)
    output = ask(tiny, json_object=True)
    assert output.finish_reason == "length" or isinstance(json.loads(output.text), dict)


@pytest.mark.parametrize(("given", "answers"), SPELLED)
def test_text_that_spells_an_added_token_is_text(given, answers):
    tokenizer = make_tokenizer().backend_tokenizer
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<tool_call>", "</tool_call>")])
    check_spelled(given, answers, tokenizer)


def test_text_that_spells_the_end_does_not_end_the_answer(tiny):
    output = ask(tiny, choice=["<|im_end|>x"])
    assert (output.text, output.finish_reason) == ("<|im_end|>x", "stop")


@pytest.mark.parametrize("params", [{"temperature": 1.0, "seed": 3}, {}, {"temperature": 0.9, "top_k": 5, "seed": 4}])
def test_free_answers_beside_it_stay_as_they_are_in_any_order(pipeline, params):
    free = SamplingParams(20, ignore_eos=True, **params)
    bound = SamplingParams(20, structured_outputs=StructuredOutputsParams(regex="[0-9]{2,9}"), logprobs=2, **params)
    alone = [pipeline.generate([Request(PROMPT)], each)[0] for each in (free, bound)]
    for settings in ([free, bound, free], [bound, free, bound], [bound, bound, free]):
        for output, each in zip(pipeline.generate([Request(PROMPT)] * 3, settings), settings):
            assert output.token_ids == alone[each is bound].token_ids
    assert re.fullmatch("[0-9]{0,9}", alone[1].text)
    assert [each.token_id for each in alone[1].logprobs] == alone[1].token_ids
    assert alone[1].logprobs[0].top[0][1] >= alone[1].logprobs[0].logprob  # of the raw logits, without the mask


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"json": {"type": "objekt"}}, r"structured_outputs.json cannot be compiled: .*objekt"),
        ({"json": {"$ref": "http://127.0.0.1/schema"}}, r"structured_outputs.json cannot be compiled: .*not fetch"),
        ({"json": {"x-guidance": {"lenient": True}, "not": {}}}, r"structured_outputs.json cannot be compiled: .*not"),
        ({"regex": "a(b"}, r"structured_outputs.regex cannot be compiled: .*unclosed group"),
        ({"regex": "(?=a)b"}, r"structured_outputs.regex cannot be compiled: .*look-around"),
        ({"grammar": "start: missing"}, r'structured_outputs.grammar cannot be compiled: .*unknown name: "missing"'),
        ({"json": {"enum": ["x" * 10, "y"], "type": "a" * 5000}}, r"cannot be compiled: .{0,303}$"),
    ],
)
def test_what_cannot_be_compiled_fails_its_request_alone(pipeline, given, message):
    params = [
        SamplingParams(4, structured_outputs=StructuredOutputsParams(**given)),
        SamplingParams(4, ignore_eos=True),
    ]
    bad, good = pipeline.generate([Request(PROMPT)] * 2, params)
    with pytest.raises(SamplingError, match=message):
        bad.text  # noqa: B018
    assert len(good.token_ids) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "has nothing; give exactly one of json, json_object, regex, choice, grammar"),
        ({"json": "{}", "regex": "a"}, "has json and regex"),
        ({"json": "{"}, "json is no JSON"),
        ({"json": "[]"}, "json is a list"),
        ({"json": {"a": object()}}, "json is no JSON"),
        ({"json": "[" * 60_000}, "more than 32 levels deep"),
        ({"json": '{"a":' * 33 + "1" + "}" * 33}, "more than 32 levels deep"),
        ({"json": " " * 65_537}, "65,537 bytes"),
        ({"regex": "ä" * 40_000}, "regex has 80,000 bytes"),
        ({"choice": ["a" * 40_000, "b" * 40_000]}, "choice has 80,000 bytes"),
        ({"choice": "ab"}, "choice must be a list"),
        ({"choice": []}, "choice must be a list"),
        ({"regex": ""}, "regex must be a text"),
        ({"grammar": 3}, "grammar must be a text"),
        ({"json_object": 1}, "json_object is 1"),
        ({"regex": "\ud800"}, "lone surrogate"),
    ],
)
def test_meaningless_ones_are_named(given, message):
    with pytest.raises(SamplingError, match=message):
        StructuredOutputsParams(**given)


def test_what_is_allowed():
    assert StructuredOutputsParams(json='{"a":' * 32 + "1" + "}" * 32).kind == "json"
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "object"}))
    assert hash(params) == hash(SamplingParams(structured_outputs=StructuredOutputsParams(json='{"type":"object"}')))
    with pytest.raises(SamplingError, match="ignore_eos goes on after the end"):
        SamplingParams(ignore_eos=True, structured_outputs=StructuredOutputsParams(json_object=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocabulary", [31, 32, 33, 70])
def test_a_mask_leaves_what_it_allows(temperature, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(3, vocabulary, generator=generator)
    bits = torch.rand(3, vocabulary, generator=generator) < 0.2
    bits[:, -1] = True
    bits[1] = True
    words = np.zeros((3, -(-vocabulary // 32) * 32), bool)
    words[:, :vocabulary] = bits.numpy()
    allowed = np.packbits(words, axis=1, bitorder="little").view(np.int32)
    own = Sampler(3, vocabulary)
    for slot in range(3):
        own.start(slot, Sampling(temperature=temperature, seed=slot), [1])
    seen = [own(logits, range(3), logits.argmax(-1), allowed).tolist() for _ in range(60)]
    assert all(bits[row, token] for tokens in seen for row, token in enumerate(tokens))
    if temperature:
        assert len({tokens[1] for tokens in seen}) > 5
    else:
        assert seen[0] == logits.masked_fill(~bits, -torch.inf).argmax(-1).tolist()


class Countdown:
    """Allows tokens 5, 6, 7 and so on; fails where it is to, and keeps what happened."""

    def __init__(self, log=None, fails_at=None):
        self.next, self.log, self.fails_at = 5, log if log is not None else [], fails_at

    def fill(self, row):
        if self.next == self.fails_at:
            raise SamplingError("too complex")
        self.log.append("mask")
        row[:] = 0
        row[0] = np.uint32(1 << self.next).astype(np.int32)

    def push(self, token):
        assert token == self.next
        self.next += 1


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", ["packed", "rows", "pages"])
def test_masks_are_made_while_the_engine_runs(kind, ahead, monkeypatch):
    """One step ahead, the next step is launched before the tokens are read that its masks need."""
    decoder = make_decoder(kind, 3)
    order = Order(decoder, monkeypatch)
    scheduler = Scheduler(decoder, 100, ahead=ahead)
    bound = sequence([4, 5], params=Sampling(4))
    bound.matcher = Countdown(order.log)
    scheduler.add(bound)
    drain(scheduler)
    assert bound.output.token_ids == [5, 6, 7, 8]
    step = ["launch", "read", "mask"] if ahead else ["launch", "mask", "read"]
    assert order.log == (["launch", "mask", *step * 3, "read"] if ahead else step * 4)


@pytest.mark.parametrize("ahead", [False, True])
def test_an_end_is_known_before_the_next_mask(ahead):
    scheduler = Scheduler(make_decoder("packed", 2), 100, ahead=ahead)
    bound, other = sequence([4, 5], params=Sampling(9), eos=[7]), sequence([1, 2], max_tokens=9)
    bound.matcher = Countdown(fails_at=8)  # nobody asks it again
    scheduler.add(bound)
    scheduler.add(other)
    drain(scheduler)
    assert bound.output.token_ids == [5, 6, 7]
    assert bound.output.finish_reason == "stop"
    assert other.output.token_ids == expected([1, 2], 9)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", ["packed", "rows", "pages"])
def test_a_matcher_that_fails_ends_its_answer_alone(kind, ahead):
    scheduler = Scheduler(make_decoder(kind, 3), 100, ahead=ahead)
    bad, good, free = (sequence([4, 5 + n], params=Sampling(6)) for n in range(3))
    bad.matcher, good.matcher = Countdown(fails_at=7), Countdown()
    for each in (bad, good, free):
        scheduler.add(each)
    drain(scheduler)
    with pytest.raises(SamplingError, match="too complex"):
        bad.output.text  # noqa: B018
    assert good.output.token_ids == [5, 6, 7, 8, 9, 10]
    assert free.output.token_ids == expected([4, 7], 6)
    after = sequence([9, 9], max_tokens=4)
    scheduler.add(after)
    drain(scheduler)
    assert after.output.token_ids == expected([9, 9], 4)


class Cycle(Countdown):
    """The same round and round."""

    def push(self, token):
        super().push(token)
        self.next %= 32


@pytest.mark.parametrize("ahead", [False, True])
def test_a_preempted_answer_goes_on_in_its_grammar(ahead):
    scheduler = Scheduler(FakePagedDecoder(2, 4), 2048, ahead=ahead)
    old, young = sequence([1] * 500, params=Sampling(max_tokens=200)), sequence([2] * 200, params=Sampling(300))
    young.output.arrival = old.output.arrival + 1
    young.matcher = Cycle()
    scheduler.add(old)
    scheduler.add(young)
    drain(scheduler, 2000)
    assert scheduler._counters.preemptions
    assert old.output.token_ids == expected([1] * 500, 200)
    assert young.output.token_ids == [(5 + number) % 32 for number in range(300)]
