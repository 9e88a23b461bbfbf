"""ONNX to engines."""
