"""``THOROUGH=1``: the repetitions and sizes of a long run, for a change that may fail only once in many."""

import os

THOROUGH = os.environ.get("THOROUGH", "0") != "0"


def often(usually: int, thoroughly: int) -> int:
    """How often something is tried."""
    return thoroughly if THOROUGH else usually
