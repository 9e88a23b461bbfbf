import pytest

from qwen2vl_trt.engines.backends import BACKENDS
from qwen2vl_trt.errors import FileError
from qwen2vl_trt.plots import GREY, check_plot, color_of


def test_a_backend_has_one_colour():
    colors = [color_of(f"{name} bf16") for name in (*BACKENDS, "Transformers")]
    assert len(set(colors)) == len(colors)
    assert GREY not in colors
    assert color_of("Transformers fp32, batched") == color_of("Transformers bf16")
    assert color_of("artifacts/tiny-torch-fp32") == GREY


def test_a_picture_has_a_known_suffix(tmp_path):
    check_plot(tmp_path / "p.png", "--plot", "bench")
    with pytest.raises(FileError, match=r"is no name of a picture; let it end in \.png"):
        check_plot(tmp_path / "p", "--plot", "bench")
