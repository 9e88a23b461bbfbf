"""Text token by token on the published tokenizer, against Transformers' decoding of all at once."""

import random

from qwen2vl_trt.runtime.detokenizer import Detokenizer


def test_any_tokens_decode_as_at_once(processor):
    tokenizer = processor.tokenizer
    special = sorted(tokenizer.added_tokens_decoder)
    # All, those of one byte, special ones among them, and the padding behind the vocabulary.
    pools = [range(151_936), range(256), [*special, *range(256)], range(special[0], 151_936)]
    choose = random.Random(0)
    for number in range(2000):
        tokens = choose.choices(pools[number % len(pools)], k=choose.randint(0, 14))
        detokenizer = Detokenizer(tokenizer.backend_tokenizer)
        pieces = [detokenizer.push(token) for token in tokens]
        assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(tokens, skip_special_tokens=True)
