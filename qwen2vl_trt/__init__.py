"""Qwen2.5-VL, written once: configuration, checkpoint, vision tower, decoder, positions, prompts."""

from .telemetry import opt_out

__version__ = "0.1.0"

# At import, which no other module does anything at: ONNX Runtime and others look when they are imported themselves, and
# every package of the project imports this one before them (tests/test_telemetry.py).
opt_out()
