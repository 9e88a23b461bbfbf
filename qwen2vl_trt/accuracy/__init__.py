"""How far an engine's answers are from the reference's: every stage, every block, every token."""

import qwen2vl_trt  # noqa: F401 (before ONNX Runtime: it turns telemetry off)
