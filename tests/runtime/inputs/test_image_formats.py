"""Which formats are read depends on what is installed; photos of phones are, and come out upright."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.runtime.inputs import image_formats
from qwen2vl_trt.runtime.inputs.image_formats import image_suffixes
from qwen2vl_trt.runtime.inputs.image_listing import list_images
from qwen2vl_trt.runtime.inputs.images import load_image
from tests.support.pictures import natural


def photo(height=48, width=80):
    return Image.fromarray(natural(height, width).permute(1, 2, 0).numpy())


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def heic(image, **options):
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=90, **options)
    return buffer.getvalue()


def close_to(pixels, image):
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (3, *expected.shape[:2])
    return abs(pixels.permute(1, 2, 0).numpy() - expected).mean() < 8


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.fixture
def installed():
    """What is found out once is found out anew."""
    yield image_formats
    for known in (image_formats._reads_avif, image_formats._heic_reader, image_formats.image_suffixes):
        known.cache_clear()


@pytest.mark.skipif(not image_formats._reads_avif(), reason="this Pillow reads no AVIF")
@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_avif(orientation):
    data = encoded(photo(), "AVIF", quality=90, exif=turned(orientation))
    upright = {1: photo(), 6: photo().rotate(270, expand=True), 8: photo().rotate(90, expand=True)}[orientation]
    assert close_to(load_image(data), upright)


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_heic(orientation):
    pixels = load_image(heic(photo(), exif=turned(orientation).tobytes()))
    upright = {1: photo(), 6: photo().rotate(270, expand=True), 8: photo().rotate(90, expand=True)}[orientation]
    assert close_to(pixels, upright)
    assert "HEIF" not in Image.OPEN  # nothing is registered for the whole process


def test_heic_with_transparency():
    image = photo().convert("RGBA")
    image.putalpha(0)
    assert load_image(heic(image)).float().mean() > 250


def test_damaged_heic_is_one_line():
    data = heic(photo())
    with pytest.raises(MediaError, match=r"^image: (not an image|truncated or corrupt)"):
        load_image(data[: len(data) // 2])


def test_what_is_not_installed_is_named_and_passed_over(installed, monkeypatch, tmp_path):
    for name in ("a.heic", "b.avif", "c.jpg", "d.tga", "e.eps"):
        (tmp_path / name).touch()
    known = {".heic": "pillow_heif", ".avif": "PIL._avif"}
    found = installed.find_spec
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name in known.values() else found(name))
    for cached in (installed._reads_avif, installed._heic_reader, installed.image_suffixes):
        cached.cache_clear()
    assert [image.key for image in list_images(str(tmp_path))] == ["c.jpg"]
    ftyp = b"\0\0\0\x18ftyp%s\0\0\0\0mif1%s" + bytes(100)
    with pytest.raises(MediaError, match=r"HEIC, which pillow-heif reads: pip install .*\[heic\]'"):
        load_image(ftyp % (b"heic", b"heic"))
    with pytest.raises(MediaError, match=r"AVIF, which Pillow reads from 11\.3 on"):
        load_image(ftyp % (b"mif1", b"avif"))


def test_what_is_installed_is_listed(tmp_path):
    pytest.importorskip("pillow_heif")
    assert {".heic", ".heif", ".jpg", ".webp"} <= image_suffixes()
    (tmp_path / "IMG_1.HEIC").touch()
    assert [image.key for image in list_images(str(tmp_path))] == ["IMG_1.HEIC"]


class TestBombs:
    """A small file that would take much."""

    def test_text_of_a_png(self):
        """Pillow's own limit of text, which no option here raises."""
        from PIL import PngImagePlugin

        info = PngImagePlugin.PngInfo()
        info.add_text("Comment", "x" * (100 << 20), zip=True)
        data = encoded(Image.new("RGB", (4, 4)), "PNG", pnginfo=info)
        assert len(data) < 1 << 20
        with pytest.raises(MediaError, match=r"Decompressed data too large|not an image"):
            load_image(data)

    def test_a_gif_whose_frame_is_larger_than_its_screen(self):
        data = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
        place = data.index(b",\0\0\0\0")
        data[place + 5 : place + 9] = b"\xff\xff\xff\xff"
        with pytest.raises(MediaError, match=r"65535x65535 is 4,294,836,225 pixels"):
            load_image(bytes(data))

    def test_a_tiff_of_one_huge_strip(self):
        data = encoded(Image.new("L", (4, 4)), "TIFF", compression="tiff_lzw", tiffinfo={278: 2**31 - 1})
        assert load_image(data).shape == (3, 4, 4)

    def test_of_an_animation_the_first_frame_is_taken(self):
        frames = [Image.new("RGB", (64, 64), (n, 0, 0)) for n in range(60)]
        for kind in ("WEBP", "GIF", "PNG"):
            data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
            assert load_image(data)[:, 0, 0].tolist() == [0, 0, 0]

    def test_a_profile_that_is_corrupt_changes_nothing(self):
        for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
            data = encoded(Image.new("RGB", (8, 8), "white"), kind, icc_profile=b"no profile at all" * 9)
            assert torch.equal(load_image(data), torch.full((3, 8, 8), 255, dtype=torch.uint8))
