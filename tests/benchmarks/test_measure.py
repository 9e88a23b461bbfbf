"""What the head of a report says."""

import torch

from benchmarks.measure import machine
from qwen2vl_trt import __version__


def test_versions_where_a_package_is_not_installed():
    """This project may be run from its folder, and then is not."""
    found = machine("numpy", "no-such-package")
    assert found["torch"] == torch.__version__
    assert found["qwen2vl-trt"] == __version__
    assert "numpy" in found
    assert "no-such-package" not in found
