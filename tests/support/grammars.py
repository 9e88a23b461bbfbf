"""Answers that a grammar allows, without a model."""

import numpy as np

from qwen2vl_trt.runtime.structured_outputs import GrammarCompiler


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
