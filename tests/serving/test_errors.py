"""Errors of the library as a client sees them."""

from io import BytesIO

import pytest
from PIL import Image

from qwen2vl_trt import errors
from qwen2vl_trt.runtime.inputs.images import load_image
from qwen2vl_trt.serving.errors import APIError, from_library


@pytest.mark.parametrize(
    ("kind", "status", "type"),
    [
        (errors.MediaError, 400, "invalid_request_error"),
        (errors.PromptError, 400, "invalid_request_error"),
        (errors.SamplingError, 400, "invalid_request_error"),
        (errors.LimitError, 400, "invalid_request_error"),
        (errors.UnavailableError, 503, "server_error"),
        (errors.DeadlineError, 504, "server_error"),
        (errors.ExecutionError, 500, "server_error"),
        (errors.EngineError, 500, "server_error"),
        (errors.MissingDependencyError, 500, "server_error"),
    ],
)
def test_status_of_each_kind(kind, status, type):
    error = from_library(kind("image 1: wrong"))
    assert (error.status, error.type) == (status, type)
    assert ("Retry-After" in error.headers) == (status == 503)


@pytest.mark.parametrize("kind", [errors.ExecutionError, errors.UnavailableError, errors.EngineError])
def test_what_the_server_died_of_is_not_told(kind):
    assert "CUDA" not in from_library(kind("CUDA error at /srv/engine/vision.engine")).message


def test_words_of_a_library_are_cut():
    file = BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    with pytest.raises(errors.MediaError) as caught:
        load_image(file.getvalue()[:60], name="image 1")
    assert str(caught.value) != from_library(caught.value).message == "image 1: truncated or corrupt"


def test_an_unknown_image_is_named():
    with pytest.raises(errors.MediaError) as caught:
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n", name="image 1")
    assert from_library(caught.value).message == str(caught.value)


@pytest.mark.parametrize(
    ("status", "type"), [(401, "authentication_error"), (404, "not_found_error"), (413, "invalid_request_error")]
)
def test_body(status, type):
    error = APIError(status, "n: too many", param="n")
    assert error.as_json() == {"error": {"message": "n: too many", "type": type, "param": "n", "code": None}}
