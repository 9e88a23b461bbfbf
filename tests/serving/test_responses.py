"""The bytes that tokens stand for."""

from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwen2vl_trt.serving.responses import _byte_letters


def test_letters_of_bytes_are_transformers():
    assert _byte_letters() == {letter: byte for byte, letter in bytes_to_unicode().items()}
