"""Figures beside a peer's in the same run. Each module is a command: ``python -m benchmarks.vision``."""
