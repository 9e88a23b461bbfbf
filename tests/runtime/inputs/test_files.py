"""Regular files alone are opened, nothing is waited for, and each refusal says why."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from qwen2vl_trt import Pipeline, Request, Service
from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.inputs.files import opened, read_whole
from qwen2vl_trt.runtime.inputs.images import ImageLimits, decoding_bytes, file_bytes, load_image
from qwen2vl_trt.runtime.inputs.video import load_video

PATIENCE = 60

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices have no paths there")


@pytest.fixture(params=["pipe", "device", "endless", "socket", "directory", "terminal"])
def special(request, tmp_path):
    """A path that is no regular file, and what is said of it."""
    path = tmp_path / "a.png"
    if request.param == "pipe":
        os.mkfifo(path)
        yield path, "a pipe, as <(command) makes one, not an image; save what it gives as a file"
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            yield path, "a socket"
    elif request.param == "directory":
        path.mkdir()
        yield path, "a directory, not an image"
    elif request.param == "terminal":
        controller, terminal = os.openpty()
        yield Path(os.ttyname(terminal)), "a device, not an image"
        os.close(controller)
        os.close(terminal)
    else:
        yield Path("/dev/null" if request.param == "device" else "/dev/zero"), "a device, not an image"


def test_what_is_no_regular_file_is_refused(special):
    path, says = special
    for read in (load_image, file_bytes):
        with pytest.raises(MediaError) as caught:
            read(path, name="image 2")
        assert str(caught.value).startswith(f"image 2 ({path}): {says}")
    assert decoding_bytes(path) == 0


def test_no_descriptor_is_left(special):
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(MediaError), opened(special[0], "image"):
            pass
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_a_pipe_holds_up_no_service(engine_dirs, tmp_path):
    """As image, as video and as a frame of one: their requests fail, others are answered, and closing returns."""
    pipe = tmp_path / "a.png"
    os.mkfifo(pipe)
    service = Service(Pipeline(open_engines(engine_dirs["torch"], "cpu")))
    requests = [
        Request("What?", [pipe]),
        Request("What?", videos=[str(pipe)]),
        Request("What?", videos=[[pipe, pipe]]),
        Request("What?", ["/dev/zero"]),
    ]
    for answer in [service.submit(request) for request in requests]:
        with pytest.raises(MediaError, match=r"a pipe|a device"):
            answer.result(PATIENCE).text  # noqa: B018
    closing = threading.Thread(target=service.close, daemon=True)
    closing.start()
    closing.join(PATIENCE)
    assert not closing.is_alive()


def test_process_substitution_says_why_not():
    code = (
        "import sys; from qwen2vl_trt.runtime.inputs.images import load_image; load_image(sys.argv[1], name='image 1')"
    )
    command = ["bash", "-c", f'"{sys.executable}" -c "{code}" <(cat docs/digits.png)']
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert "MediaError: image 1 (/dev/fd/" in done.stderr
    assert "a pipe, as <(command) makes one" in done.stderr


def test_a_file_as_standard_input_is_one(tmp_path):
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    code = "from qwen2vl_trt.runtime.inputs.images import load_image; print(*load_image('/dev/stdin').shape)"
    with (tmp_path / "a.png").open("rb") as file:
        done = subprocess.run(
            [sys.executable, "-c", code], stdin=file, capture_output=True, text=True, timeout=PATIENCE, check=True
        )
    assert done.stdout == "3 4 5\n"


def test_links(tmp_path):
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    (tmp_path / "good.png").symlink_to("a.png")
    (tmp_path / "broken.png").symlink_to("gone.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    assert load_image(tmp_path / "good.png").shape == (3, 4, 5)
    with pytest.raises(MediaError, match=r"broken\.png: a link to gone\.png, which is not there$"):
        load_image(tmp_path / "broken.png")
    with pytest.raises(MediaError, match=r"circle\.png: cannot be read: Too many levels"):
        load_image(tmp_path / "circle.png")


def test_file_urls_are_paths_wherever_a_path_is(tmp_path):
    Image.new("RGB", (5, 4)).save(tmp_path / "a b.png")
    url = (tmp_path / "a b.png").as_uri()
    assert load_image(url).shape == (3, 4, 5)
    assert file_bytes(url) == (tmp_path / "a b.png").read_bytes()
    assert decoding_bytes(url) == decoding_bytes(tmp_path / "a b.png")
    with pytest.raises(MediaError, match="a still image"):
        load_video(url)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_file_that_says_it_is_empty_is_read():
    assert b"Name:" in file_bytes("/proc/self/status")
    with pytest.raises(MediaError, match="not an image"):
        load_image("/proc/self/status")


def test_no_more_memory_is_taken_than_the_file_has(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    asked = []
    with opened(path, "image 1") as file:
        reader = SimpleNamespace(fileno=file.fileno, read=lambda size: (asked.append(size), file.read(size))[1])
        assert read_whole(reader, "image 1") == bytes(100)
    assert asked == [101]


def test_a_file_that_grows_is_read_up_to_the_limit(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    with opened(path, "image 1") as file, path.open("ab") as more:
        more.write(bytes(100))
        more.flush()
        with pytest.raises(MediaError, match="image 1: more than 150 bytes, the most that are read of an image file"):
            read_whole(file, "image 1", 150)
    assert len(file_bytes(path, limits=ImageLimits(nbytes=200))) == 200


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(MediaError, match="cannot be read: I/O error"), opened(__file__, "image 1"):
        raise OSError(5, "I/O error")
