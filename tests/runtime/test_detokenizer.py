"""Text that grows token by token: no half characters, no stop string, nothing lost."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwen2vl_trt.runtime.detokenizer import AnswerStream, Detokenizer, StopStrings
from qwen2vl_trt.runtime.sampling_params import SamplingParams
from qwen2vl_trt.tiny.tokenizer import train_tokenizer

EOS = "<|im_end|>"


def texts(longest):
    """Any text but that of the special token, which hypothesis knows from this file and which is rightly left out."""
    return st.text(max_size=longest).filter(lambda text: EOS not in text)


CORPUS = [
    "the cat sat on the mat",
    "der Bär läßt die Tür zu",
    "日本語の文字です",
    "🙂🙃👩‍👩‍👧 emoji",
    "Привет, мир",
] * 20


def make_tokenizer(vocab_size):
    """A byte-level tokenizer as Qwen's; trained ones have tokens that end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


BYTES = make_tokenizer(256)
TRAINED = make_tokenizer(420)


TABLE = {c: b for b, c in bytes_to_unicode().items()}


def test_trained_tokenizer_has_tokens_that_end_inside_a_character():
    assert any(TRAINED.decode([token]).endswith("\ufffd") for token in range(256, len(TRAINED) - 1))


def pieces_of(tokenizer, tokens):
    detokenizer = Detokenizer(tokenizer.backend_tokenizer)
    pieces = [detokenizer.push(token) for token in tokens]
    return pieces, detokenizer.flush()


@settings(max_examples=30, deadline=None)
@given(stray=st.binary(min_size=1, max_size=3), times=st.integers(20, 80), text=texts(4))
def test_a_long_run_that_makes_no_character_is_given_up(stray, times, text):
    """It would be decoded again with every token."""
    of_bytes = {TABLE[byte]: token for token, byte in ((BYTES.convert_tokens_to_ids(c), c) for c in TABLE)}
    tokens = [of_bytes[byte] for byte in stray * times + text.encode()]
    detokenizer = Detokenizer(BYTES.backend_tokenizer)
    found = "".join(detokenizer.push(token) for token in tokens)
    assert len(detokenizer._incomplete) <= 40
    assert found + detokenizer.flush() == BYTES.decode(tokens)


@settings(max_examples=150, deadline=None)
@given(texts(40), st.sampled_from([BYTES, TRAINED]))
def test_pieces_add_up_to_the_text(text, tokenizer):
    pieces, rest = pieces_of(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) + rest == text
    if "\ufffd" not in text:
        assert rest == ""
        assert not any("\ufffd" in piece for piece in pieces)


TINY = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer())


@settings(max_examples=400, deadline=None)
@given(st.data(), st.sampled_from([BYTES, TRAINED, TINY]))
def test_any_tokens_decode_as_at_once(data, tokenizer):
    """Broken bytes, special tokens, and ids of the padding behind the vocabulary."""
    special = sorted(tokenizer.added_tokens_decoder)
    ids = st.integers(0, len(tokenizer) + 5) | st.integers(0, 255) | st.sampled_from(special)
    tokens = data.draw(st.lists(ids, max_size=30))
    pieces, rest = pieces_of(tokenizer, tokens)
    assert "".join(pieces) + rest == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_character_comes_out_whole_and_at_once():
    tokens = BYTES.encode("a🙂b")
    assert len(tokens) == 6
    assert pieces_of(BYTES, tokens) == (["a", "", "", "", "🙂", "b"], "")


def test_an_unfinished_character_comes_out_at_the_end():
    assert pieces_of(BYTES, BYTES.encode("a🙂")[:-1]) == (["a", "", "", ""], "\ufffd")


def test_work_per_token_does_not_grow():
    """``DecodeStream`` keeps what it has got since the last whole character, and special tokens among it."""
    detokenizer, got = Detokenizer(TRAINED.backend_tokenizer), []

    class Recorded:
        stream = detokenizer._stream

        def step(self, tokenizer, token):
            got.append(token)
            return self.stream.step(tokenizer, token)

    detokenizer._stream = Recorded()
    text = TRAINED.encode("the cat sat 日本語 " * 30)
    for token in [*text, *[TRAINED.eos_token_id] * 100]:
        detokenizer.push(token)
        assert len(detokenizer._incomplete) <= 4
    assert got == text


def first_stop(text, stops):
    """By brute force: the text up to the stop string that is complete first (the longest, where several are)."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@st.composite
def text_in_chunks(draw):
    text = draw(st.text("abé", max_size=30))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=400, deadline=None)
@given(text_in_chunks(), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_stop_strings_never_leak_however_the_text_is_cut(chunks, stops):
    expected, stopped = first_stop("".join(chunks), stops)
    filter_ = StopStrings(stops)
    emitted = ""
    for chunk in chunks:
        emitted += filter_.push(chunk)
        assert expected.startswith(emitted)
    assert filter_.stopped == stopped
    assert emitted + filter_.flush() == expected


def test_text_is_held_back_only_while_it_may_be_a_stop_string():
    filter_ = StopStrings(["END"])
    assert [filter_.push(piece) for piece in ("aE", "N", "X", "EN", "D", "more")] == ["a", "", "ENX", "", "", ""]
    assert filter_.stopped
    assert filter_.flush() == ""


def test_a_long_stop_string_takes_little_memory():
    tracemalloc.start()
    filter_ = StopStrings(["a" * 9_000 + "b"])
    assert filter_.push("a" * 9_500) + filter_.push("a") == "a" * 501
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 1e6
    assert filter_.push("b") == ""
    assert filter_.stopped


def stream_of(tokens, **settings_):
    eos = TRAINED.eos_token_id
    stream = AnswerStream(TRAINED.backend_tokenizer, SamplingParams(**settings_).with_defaults(), (eos,))
    text = ""
    for token in tokens:
        text += stream.push(token)
        if stream.finish_reason:
            break
    return text, stream


def test_end_of_sequence_ends_the_answer():
    tokens = [*TRAINED.encode("the cat"), TRAINED.eos_token_id, *TRAINED.encode("more")]
    text, stream = stream_of(tokens)
    assert (text, stream.finish_reason) == ("the cat", "stop")
    assert stream.token_ids == tokens[: tokens.index(TRAINED.eos_token_id) + 1]
    with pytest.raises(ValueError, match="has ended"):
        stream.push(1)


def test_end_of_sequence_can_be_ignored():
    tokens = [*TRAINED.encode("the"), TRAINED.eos_token_id, *TRAINED.encode(" cat")]
    text, stream = stream_of(tokens, ignore_eos=True, max_tokens=len(tokens))
    assert (text, stream.finish_reason, stream.token_ids) == ("the cat", "length", tokens)


def test_length_ends_the_answer_and_loses_nothing():
    tokens = BYTES.encode("abc E🙂")
    stream = AnswerStream(BYTES.backend_tokenizer, SamplingParams(max_tokens=8, stop="END").with_defaults(), ())
    text = "".join(stream.push(token) for token in tokens[:8])
    assert (text, stream.finish_reason) == ("abc E\ufffd", "length")
    text, stream = stream_of(TRAINED.encode("the cat EN"), max_tokens=len(TRAINED.encode("the cat EN")), stop="END")
    assert (text, stream.finish_reason) == ("the cat EN", "length")


def test_end_of_sequence_releases_text_held_back():
    text, stream = stream_of([*TRAINED.encode("the cat EN"), TRAINED.eos_token_id], stop="END")
    assert (text, stream.finish_reason) == ("the cat EN", "stop")


def test_stop_string_ends_the_answer():
    tokens = TRAINED.encode("the cat END sat")
    text, stream = stream_of(tokens, stop=["END", "sat"])
    assert (text, stream.finish_reason) == ("the cat ", "stop")
    assert len(stream.token_ids) < len(tokens)


def test_stop_string_on_the_last_token_wins_over_length():
    tokens = TRAINED.encode("the END")
    text, stream = stream_of(tokens, stop="END", max_tokens=len(tokens))
    assert (text, stream.finish_reason) == ("the ", "stop")


@settings(max_examples=150, deadline=None)
@given(
    texts(30),
    st.lists(st.text(min_size=1, max_size=3), max_size=2),
    st.integers(1, 60),
)
def test_answer_is_the_decoded_text_up_to_the_stop(text, stops, max_tokens):
    tokens = TRAINED.encode(text)
    answer, stream = stream_of(tokens, stop=stops, max_tokens=max_tokens)
    whole = TRAINED.decode(tokens[:max_tokens], skip_special_tokens=True)
    expected, stopped = first_stop(whole, stops)
    if stream.finish_reason is None:  # the tokens ran out: what may be a stop string's beginning is still held back
        assert expected.startswith(answer)
        assert not stopped or "\ufffd" in whole
    else:
        assert answer == expected
        assert stream.finish_reason == ("stop" if stopped else "length")


def test_a_reason_from_outside_ends_the_answer_with_its_last_token():
    stream = AnswerStream(BYTES.backend_tokenizer, SamplingParams(max_tokens=8, stop="END").with_defaults(), ())
    x, e, n = BYTES.encode("xEN")
    pieces = [stream.push(x), stream.push(e), stream.push(n, "deadline")]
    assert stream.finish_reason == "deadline"
    assert "".join(pieces) == "xEN"  # what was held back comes out
    own = AnswerStream(BYTES.backend_tokenizer, SamplingParams(max_tokens=1).with_defaults(), ())
    own.push(x, "deadline")
    assert own.finish_reason == "length"
