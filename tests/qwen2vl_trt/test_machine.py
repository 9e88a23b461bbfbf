"""What the head of a report says."""

import torch

from qwen2vl_trt import __version__
from qwen2vl_trt.machine import machine

CPU = torch.device("cpu")


def test_versions_where_a_package_is_not_installed():
    """This project may be run from its folder, and then is not."""
    found = machine(CPU, "numpy", "no-such-package")
    assert found["torch"] == torch.__version__
    assert found["qwen2vl-trt"] == __version__
    assert "numpy" in found
    assert "no-such-package" not in found


def test_the_load_that_others_make_is_told(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (6.04, 7.0, 8.0))
    assert machine(CPU)["load"] == 6.0
    monkeypatch.delattr("os.getloadavg")
    assert "load" not in machine(CPU)
