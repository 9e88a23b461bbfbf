"""Answers that a grammar allows, without a model."""

import numpy as np

from qwen2vl_trt import StructuredOutputsParams
from qwen2vl_trt.runtime.structured_outputs import GrammarCompiler

SPELLED = [
    ({"choice": ["a <tool_call> b"]}, {"a <tool_call> b"}),
    ({"choice": ["<tool_call>", "</tool_call>a"]}, {"<tool_call>", "</tool_call>a"}),
    ({"choice": ["<|im_end|>x"]}, {"<|im_end|>x"}),
    ({"regex": r"<\|im_start\|>[ab]<tool_call>"}, {"<|im_start|>a<tool_call>", "<|im_start|>b<tool_call>"}),
    ({"json": {"enum": ["<|endoftext|><tool_call>"]}}, {'"<|endoftext|><tool_call>"'}),
    ({"grammar": 'start: "<tool_call>" a\na: "<|im_end|>"'}, {"<tool_call><|im_end|>"}),
    ({"choice": ["e\u0301 <tool_call>"]}, {"e\u0301 <tool_call>"}),  # not as NFC writes it
]
"""Structured outputs whose text spells added tokens, and the answers."""


def check_spelled(given, expected, tokenizer):
    """Answers are the text, of ordinary tokens."""
    added = tokenizer.get_added_tokens_decoder()
    answers = [*drawn(StructuredOutputsParams(**given), tokenizer, 8)]
    assert {tokenizer.decode(tokens) for tokens in answers} == expected
    assert not any(token in added for tokens in answers for token in tokens)


def drawn(params, tokenizer, count, most=400):
    """The tokens of so many answers, drawn evenly from those that their grammar allows; all of them end."""
    size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id("<|im_end|>")
    compiler = GrammarCompiler(tokenizer, size, [end])
    allowed = np.zeros(-(-size // 32), np.int32)
    for seed in range(count):
        rng, matcher, answer = np.random.default_rng(seed), compiler.matcher(params), []
        while True:
            matcher.fill(allowed)
            tokens = np.flatnonzero(np.unpackbits(allowed.view(np.uint8), bitorder="little"))
            token = end if end in tokens and rng.random() < 0.5 else int(rng.choice(tokens))
            if token == end:
                break
            answer.append(token)
            assert len(answer) < most
            matcher.push(token)
        yield answer
