"""The plumbing of JPEG decoding on a GPU, with a decoder of our own in nvImageCodec's place."""

import io
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl_trt import Pipeline, PipelineOptions
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import MediaError, MissingDependencyError
from qwen2vl_trt.runtime.inputs.images import ImageLimits, load_image
from qwen2vl_trt.runtime.inputs.jpeg_decoder import JpegDecoder
from qwen2vl_trt.runtime.media.embedder import MediaEmbedder
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor
from tests.support import fake_nvimgcodec
from tests.support.fake_nvimgcodec import lowered
from tests.support.fake_vision import FakeEngine
from tests.support.pictures import CONFIG, natural

CPU = torch.device("cpu")


def encoded(kind="JPEG", size=(40, 60), mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(natural(*size).permute(1, 2, 0).numpy()).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def codec(monkeypatch):
    return fake_nvimgcodec.install(monkeypatch)


def test_jpeg_files_go_to_it_in_one_call_and_all_else_to_pillow(codec, tmp_path):
    jpeg, grey, png = encoded(), encoded(mode="L"), encoded("PNG")
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(size=(33, 21)))
    array = np.zeros((8, 9, 3), np.uint8)
    sources = [png, jpeg, path, array, torch.zeros(3, 5, 6), grey, encoded(mode="CMYK")]
    images = JpegDecoder(CPU).load(sources, [f"image {n}" for n in range(7)])
    assert [call[0] for call in codec.calls] == [[jpeg, path.read_bytes(), grey]]
    assert codec.created == (-1, ":fancy_upsampling=1")
    for number, (source, image) in enumerate(zip(sources, images, strict=True)):
        assert image.dtype == (torch.float32 if number == 4 else torch.uint8)
        assert torch.equal(image, (lowered if number in (1, 2, 5) else load_image)(source))


def test_an_image_is_turned_as_its_exif_says(codec):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(exif=exif)
    assert JpegDecoder(CPU).load([turned], ["image"])[0].shape == (3, 60, 40)


def test_what_it_gives_up_is_left_to_pillow(codec):
    jpeg, other = encoded(), encoded(size=(12, 14))
    codec.gives_up = (jpeg,)
    images = JpegDecoder(CPU).load([jpeg, other], ["image 1", "image 2"])
    assert torch.equal(images[0], load_image(jpeg))
    assert torch.equal(images[1], lowered(other))


def test_no_file_no_call(codec):
    JpegDecoder(CPU).load([np.zeros((8, 9, 3), np.uint8)], ["image"])
    assert not codec.calls


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "missing", "address", "bomb"])
def test_errors_are_those_of_pillow(codec, damage, tmp_path):
    """A damaged file never reaches a decoder that might make something up for what is lost."""
    source = {
        "cut": encoded()[:-40],
        "header": b"\xff\xd8\xff" + bytes(50) + b"\xff\xd9",
        "empty": b"",
        "missing": tmp_path / "none.jpg",
        "address": "https://example.org/a.jpg",
        "bomb": encoded(),
    }[damage]
    limits = ImageLimits(pixels=1000 if damage == "bomb" else 10_000)
    with pytest.raises(MediaError) as expected:
        load_image(source, name="image 3", limits=limits)
    with pytest.raises(MediaError) as found:
        JpegDecoder(CPU).load([source], ["image 3"], limits)
    assert str(found.value) == str(expected.value)
    assert not codec.calls


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[gpu-decode\]'"):
        JpegDecoder(CPU)


def test_it_needs_a_gpu():
    with pytest.raises(MediaError, match=r'decode="gpu" .* needs a GPU.*cpu'):
        Preprocessor(CONFIG, decode="gpu")


def test_the_preprocessor_decodes_with_it(codec):
    jpeg, png = encoded(), encoded("PNG")
    preprocessor = Preprocessor(CONFIG)
    expected = preprocessor.preprocess([lowered(jpeg), png]).pixel_values
    preprocessor._decoder = JpegDecoder(CPU)
    assert torch.equal(preprocessor.preprocess([jpeg, png]).pixel_values, expected)
    assert len(codec.calls) == 1


def test_the_pipelines_media_are_decoded_with_it(codec):
    preprocessor = Preprocessor(CONFIG)
    preprocessor._decoder = JpegDecoder(CPU)
    media = MediaEmbedder(preprocessor, FakeEngine(), BuildProfile(min_hw_dims=4, max_hw_dims=1024), CONFIG)
    assert torch.equal(media.preprocessor.load_image(encoded(), "image 1").frames[0], lowered(encoded()))


def test_the_pipeline_passes_the_option_on(engine_dirs):
    with pytest.raises(MediaError, match=r'decode="gpu" .* needs a GPU'):
        Pipeline.from_engine_dir(engine_dirs["torch"], "cpu", PipelineOptions(decode="gpu"))


def test_one_thread_at_a_time_decodes(codec):
    decoder, at_once, most = JpegDecoder(CPU), [], []
    decode = codec.decode_one

    def slow(file, params):
        at_once.append(file)
        most.append(len(at_once))
        time.sleep(0.002)
        at_once.pop()
        return decode(file, params)

    codec.decode_one = slow
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: decoder.load([encoded()], ["image"]), range(12)))
    assert len(most) == 12
    assert max(most) == 1
