"""Stands in for TensorRT-LLM: its documented signatures, and answers by this project's torch decoder on the CPU.

Parameters and their order are those of ``tests/unittest/api_stability`` of TensorRT-LLM 1.2 and later; a parameter
that is no part of it raises, as it does there. It shows that the calls fit the signatures and what becomes of the
answers. It says nothing about TensorRT-LLM's own numbers or speed.
"""

from . import llmapi
from .llmapi import LLM, SamplingParams

__all__ = ["LLM", "SamplingParams", "llmapi"]
__version__ = "1.3.0"
