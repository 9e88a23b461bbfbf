"""Qwen2.5-VL, written once: configuration, checkpoint, vision tower, decoder, positions, prompts."""

__version__ = "0.1.0"
