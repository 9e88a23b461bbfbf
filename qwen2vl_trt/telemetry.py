"""Libraries that report their use over the network, told not to before they are imported."""

from __future__ import annotations

import os

_OPT_OUTS = {
    # From 1.29 on Linux: path of the program, CPU and a machine's number, and a database in the home folder.
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TRTLLM_NO_USAGE_STATS": "1",
}


def opt_out() -> None:
    """Set the environment variables that turn reports off; what the user has set stays."""
    for name, value in _OPT_OUTS.items():
        os.environ.setdefault(name, value)
