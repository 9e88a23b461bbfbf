"""Every form of image, and every bad one."""

import base64
import contextlib
import io
import re
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.runtime.inputs import images
from qwen2vl_trt.runtime.inputs.images import ImageLimits, decoding_bytes, load_image, split_batch


def picture(height=24, width=36, channels=3, seed=0):
    """Smooth colours, so that JPEG keeps them nearly; every corner differs, so that a wrong turn shows."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / width, 255 * y / height, 255 * (x + y) / (height + width), 255 * (1 - x / width)]
    return np.stack(planes[:channels], -1).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def expect(pixels, image):
    """``pixels`` are those of a PIL image in RGB."""
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, image.height, image.width)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))


class TestSources:
    """One picture, every way to hand it over."""

    def test_path_bytes_pil_numpy_and_tensor_agree(self, tmp_path):
        image = Image.fromarray(picture())
        path = tmp_path / "a.png"
        image.save(path)
        array = np.asarray(image)
        tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
        for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), image, array, tensor):
            expect(load_image(source), image)

    def test_views_of_memory_are_not_copied(self):
        array = picture()
        assert load_image(array).data_ptr() == array.ctypes.data
        tensor = torch.zeros(3, 8, 8, dtype=torch.uint8)
        assert load_image(tensor).data_ptr() == tensor.data_ptr()

    def test_reversed_and_readonly_arrays(self):
        array = picture()
        mirrored = array[:, ::-1]
        array.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns of memory that is not writable
            expect(load_image(array), Image.fromarray(array))
        expect(load_image(mirrored), Image.fromarray(np.ascontiguousarray(mirrored)))

    def test_greyscale_arrays(self):
        grey = picture(channels=1)
        image = Image.fromarray(grey[..., 0]).convert("RGB")
        for source in (grey, grey[..., 0], torch.from_numpy(grey[..., 0]), torch.from_numpy(grey).permute(2, 0, 1)):
            expect(load_image(source), image)

    def test_float_tensor_stays_float(self):
        image = torch.rand(3, 5, 7)
        assert torch.equal(load_image(image), image)
        assert load_image(image.double()).dtype == torch.float32

    def test_floats_up_to_255(self):
        """As qwen-vl-utils returns them."""
        image = torch.randint(0, 256, (3, 5, 7)).float()
        image[0, 0, 0] = 2  # the least maximum that is taken so
        assert torch.equal(load_image(image), image / 255)
        assert torch.equal(load_image(load_image(image)), image / 255)
        assert load_image(image[:, :1, :1].clamp(max=2)).max() == 2 / 255
        assert load_image(torch.ones(3, 2, 2)).min() == 1  # white: up to 1 they are 0..1

    def test_float_transparency_is_over_white(self):
        image = torch.rand(4, 5, 7)
        expected = image[:3] * image[3] + (1 - image[3])
        assert torch.allclose(load_image(image), expected)

    def test_gradients_do_not_follow(self):
        assert not load_image(torch.rand(3, 4, 4, requires_grad=True)).requires_grad


class TestFiles:
    """Real files, written by Pillow."""

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    def test_exif_orientation(self, orientation, kind, tmp_path):
        image = Image.fromarray(picture())
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"a.{kind.lower()}"
        image.save(path, kind, exif=exif)
        with Image.open(path) as stored:
            upright = ImageOps.exif_transpose(stored).convert("RGB")
        expect(load_image(path), upright)
        with Image.open(path) as stored:
            expect(load_image(stored), upright)
        assert (upright.height > upright.width) == (orientation >= 5)

    def test_broken_exif_is_ignored(self):
        image = Image.fromarray(picture())
        data = encoded(image, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xff\xff\xff\xff\xff")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about the EXIF
            expect(load_image(data), image)

    @pytest.mark.parametrize(("alpha", "colour"), [(0, (255, 255, 255)), (255, (200, 0, 100)), (128, (227, 127, 177))])
    def test_transparency_is_over_white(self, alpha, colour):
        image = Image.new("RGBA", (4, 3), (200, 0, 100, alpha))
        array = np.asarray(image)
        for source in (image, encoded(image), array, torch.from_numpy(array.copy()).permute(2, 0, 1)):
            assert load_image(source)[:, 1, 1].tolist() == list(colour)

    def test_transparency_to_the_nearest_of_every_value(self):
        colour, alpha = np.mgrid[0:256, 0:256]
        exact = (colour * alpha + 255 * (255 - alpha)) / 255
        rgba = np.stack([colour, colour[::-1], colour, alpha], -1).astype(np.uint8)
        tensor = torch.from_numpy(rgba).permute(2, 0, 1)
        for source in (rgba, tensor, tensor.contiguous(), encoded(Image.fromarray(rgba))):
            pixels = load_image(source)
            assert np.array_equal(pixels[0].numpy(), np.floor(exact + 0.5))
            assert torch.equal(pixels[0], pixels[2])
        batch = torch.stack([tensor, tensor.flip(1)])[None]
        assert torch.equal(split_batch(batch)[0][0], pixels)
        assert torch.equal(split_batch(batch)[0][1], pixels.flip(1))

    @pytest.mark.parametrize("block", [1, 7, 100, 1 << 18])
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "I;16"])
    def test_conversion_in_blocks_changes_nothing(self, mode, block, monkeypatch):
        """Blocks of any size, of an image of several rows and of one that is wider than a block."""
        monkeypatch.setattr(images, "_BLOCK", block)
        for height, width in ((9, 13), (1, 120)):
            image = Image.fromarray(picture(height, width, 4))
            if mode == "I;16":
                image = Image.fromarray(np.arange(height * width, dtype=np.uint16).reshape(height, width) * 500)
                expected = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
            else:
                image = image.convert(mode) if mode in ("RGBA", "LA", "PA") else image.convert("RGB").convert(mode)
                rgba = np.asarray(image.convert("RGBA")).astype(int)
                colour, alpha = rgba[..., :3], rgba[..., 3:]
                over = (2 * (colour * alpha + 255 * (255 - alpha)) + 255) // 510
                expected = Image.fromarray(over.astype(np.uint8)) if alpha.min() < 255 else image.convert("RGB")
            expect(load_image(image), expected)

    def test_transparency_as_pillow_composites(self):
        image = Image.fromarray(picture(channels=4))
        white = Image.new("RGBA", image.size, "white")
        expected = np.asarray(Image.alpha_composite(white, image).convert("RGB")).astype(int)
        assert abs(load_image(image).permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1

    def test_palette(self):
        image = Image.fromarray(picture()).quantize(16)
        expect(load_image(encoded(image)), image.convert("RGB"))

    def test_palette_with_transparency(self):
        image = Image.new("P", (4, 2), 1)
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.putpixel((0, 0), 0)
        pixels = load_image(encoded(image, transparency=0))
        assert pixels[:, 0, 0].tolist() == [255, 255, 255]
        assert pixels[:, 0, 1].tolist() == [10, 20, 30]

    def test_grey_with_alpha_and_colour_key(self):
        pixels = load_image(encoded(Image.new("LA", (2, 2), (40, 0))))
        assert pixels[:, 0, 0].tolist() == [255, 255, 255]
        pixels = load_image(encoded(Image.new("RGB", (2, 2), (9, 8, 7)), transparency=(9, 8, 7)))
        assert pixels[:, 0, 0].tolist() == [255, 255, 255]

    @pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr"])
    def test_other_modes(self, mode):
        image = Image.fromarray(picture()).convert(mode)
        expect(load_image(image), image.convert("RGB"))
        data = encoded(image, "TIFF", compression="tiff_deflate")  # Pillow 12 cannot read its own YCbCr uncompressed
        with Image.open(io.BytesIO(data)) as stored:
            expect(load_image(data), stored.convert("RGB"))

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
    def test_sixteen_bits_are_scaled_not_clipped(self, kind):
        values = np.linspace(0, 65535, 24 * 36).reshape(24, 36).round().astype(np.uint16)
        pixels = load_image(encoded(Image.fromarray(values), kind))
        expected = np.round(values / 257).astype(np.uint8)
        assert np.array_equal(pixels[0].numpy(), expected)
        assert torch.equal(pixels[0], pixels[2])
        assert pixels.max() == 255
        assert len(pixels.unique()) == 256

    def test_sixteen_bits_turned_by_exif(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
        pixels = load_image(encoded(Image.fromarray(values), exif=exif))
        assert pixels[0].tolist() == [[3, 0], [4, 1], [5, 2]]

    def test_first_frame_of_an_animation(self):
        frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
        data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert load_image(data)[:, 0, 0].tolist() == [255, 0, 0]


class TestBadInput:
    """Each is one line that names the thing."""

    def refused(self, source, *words, name=None):
        with pytest.raises(MediaError) as caught:
            load_image(source, name=name)
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert word in message, message
        return message

    def test_no_such_file(self, tmp_path):
        path = tmp_path / "none.png"
        assert self.refused(path, "no such file") == f"{path}: no such file"
        self.refused(path, "image 3", "none.png", name="image 3")

    def test_empty_name(self):
        self.refused("", "image 1 (): an empty name", name="image 1")

    def test_directory(self, tmp_path):
        self.refused(tmp_path, str(tmp_path), "directory")

    @pytest.mark.parametrize("path", ["a\0b", "x." * 2500, "a.png/b.png" * 400])
    def test_impossible_path(self, path):
        self.refused(path, "cannot be read")

    @pytest.mark.parametrize("scheme", ["http", "https", "HTTPS", "ftp", "s3", "gs", "hf"])
    def test_address(self, scheme):
        self.refused(f"{scheme}://example.org/a.png", f"{scheme}://example.org/a.png", "not fetched; download it")
        self.refused(Path(f"{scheme}://example.org/a.png"), "not fetched")
        self.refused(f"{scheme}://example.org/{'a' * 10_000}", "not fetched")

    @pytest.mark.parametrize("size", [(40, 50), (1200, 1300)])
    def test_base64_as_a_name(self, size):
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        data = encoded(Image.fromarray(noise))
        for text in (base64.b64encode(data).decode(), base64.encodebytes(data).decode()):
            message = self.refused(text, "image 1", "it looks like the base64 of an image", "data: URL", name="image 1")
            assert len(message) < 1000
        self.refused(f"data:image/png;base64,{base64.b64encode(data).decode()}", "a data: URL, not a path")

    def test_zero_bytes(self, tmp_path):
        path = tmp_path / "empty.png"
        path.write_bytes(b"")
        self.refused(path, "empty.png", "empty (0 bytes)")
        self.refused(b"", "image 2", "empty (0 bytes)", name="image 2")

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"%PDF-1.7\n", "a PDF document; render"),
            (b"8BPS\0\1", "Photoshop"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
            (b'<?xml version="1.0"?>\n<svg xmlns="x">', "an SVG drawing; render it to PNG"),
            (b"\xef\xbb\xbf <SVG>", "an SVG drawing"),
            (b"<!DOCTYPE html><html>", "a download that failed"),
            (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "a video, not an image; give it as one"),
            (b"\x1aE\xdf\xa3", "a video"),
            (b"\0\0\1\0\1\0", "an icon"),
            (b"\xff\x0a\xff", "JPEG XL"),
            (b"SIMPLE  =                    T", "FITS"),
            (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ],
    )
    def test_other_formats_are_called_by_their_names(self, content, says):
        assert says in self.refused(content + bytes(200), "image 3", name="image 3")

    @pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "SGI", "EPS", "XBM", "MSP", "DDS", "SPIDER"])
    def test_pillows_other_readers_are_not_tried(self, kind):
        mode = {"XBM": "1", "MSP": "1", "SPIDER": "F"}.get(kind, "RGB")
        data = encoded(Image.fromarray(picture()).convert(mode), kind)
        Image.open(io.BytesIO(data)).close()
        self.refused(data)

    def test_no_image(self, tmp_path):
        path = tmp_path / "notes.png"
        path.write_text("not an image at all")
        self.refused(path, "notes.png", "not an image")
        self.refused(b"\x89PNG\r\n\x1a\n", "not an image")

    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    @pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
    def test_truncated(self, kind, share):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        data = encoded(Image.fromarray(noise), kind)
        load_image(data)
        self.refused(data[: int(len(data) * share)], "image 1", "truncated or corrupt", name="image 1")

    def test_truncated_image_opened_by_the_caller(self):
        data = encoded(Image.fromarray(picture(256, 256)), "JPEG", quality=95)
        self.refused(Image.open(io.BytesIO(data[: len(data) // 2])), "truncated or corrupt")

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_damaged_files_give_pixels_or_media_errors(self, data):
        kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]))
        content = bytearray(encoded(Image.fromarray(picture(9, 7)), kind))
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        with warnings.catch_warnings(), contextlib.suppress(MediaError):  # anything else fails the test
            warnings.simplefilter("ignore")
            assert load_image(bytes(content)).shape[0] == 3

    def test_pixels_are_limited_before_they_are_decoded(self, monkeypatch):
        data, limits = encoded(Image.fromarray(picture(40, 50))), ImageLimits(pixels=1999)
        monkeypatch.setattr(images, "load_pixels", None)
        for source in (data, Image.open(io.BytesIO(data))):
            with pytest.raises(
                MediaError,
                match=r"^image 2: 50x40 is 2,000 pixels; at most 1,999 are decoded \(--image-pixel-limit\)",
            ):
                load_image(source, name="image 2", limits=limits)
        monkeypatch.undo()
        assert load_image(data, limits=ImageLimits(pixels=2000)).shape == (3, 40, 50)
        assert load_image(np.asarray(Image.open(io.BytesIO(data))), limits=limits).shape == (3, 40, 50)

    def test_a_claim_in_a_header_is_enough(self):
        header = bytearray(encoded(Image.new("RGB", (1, 1))))
        header[16:24] = (60000).to_bytes(4, "big") * 2
        header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
        self.refused(bytes(header), "60000x60000 is 3,600,000,000 pixels; at most 100,000,000")

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "JPEG2000", "MPO"])
    def test_pillows_own_limit_plays_no_part(self, kind, monkeypatch):
        """Not even a warning; and it is what it was."""
        data = encoded(Image.fromarray(picture(40, 50)), kind)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_image(data).shape == (3, 40, 50)
        assert Image.MAX_IMAGE_PIXELS == 100

    def test_bytes_are_limited(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(encoded(Image.fromarray(picture())))
        size = path.stat().st_size
        for source in (path, path.read_bytes()):
            load_image(source, limits=ImageLimits(nbytes=size))
            with pytest.raises(MediaError, match=rf"more than {size - 1:,} bytes"):
                load_image(source, limits=ImageLimits(nbytes=size - 1))

    def test_no_pixels(self):
        self.refused(Image.new("RGB", (0, 5)), "0x5 has no pixels")
        self.refused(np.zeros((4, 0, 3), np.uint8), "0x4 has no pixels")
        self.refused(torch.zeros(3, 0, 4, dtype=torch.uint8), "4x0 has no pixels")

    @pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int64, bool])
    def test_numpy_dtype(self, dtype):
        self.refused(np.zeros((4, 4, 3), dtype), np.dtype(dtype).name)

    @pytest.mark.parametrize("shape", [(4,), (3, 8, 8), (8, 8, 2), (8, 8, 5)])
    def test_numpy_shape(self, shape):
        self.refused(np.zeros(shape, np.uint8), "numpy shape", str(list(shape)))

    def test_a_batch_is_no_image(self):
        self.refused(np.zeros((2, 8, 8, 3), np.uint8), "[2, 8, 8, 3]", "more than one image")
        self.refused(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "[1, 3, 8, 8]", "more than one image")

    @pytest.mark.parametrize("shape", [(4,), (8, 8, 3), (2, 8, 8)])
    def test_tensor_shape(self, shape):
        self.refused(torch.zeros(shape, dtype=torch.uint8), "tensor shape", str(list(shape)))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8])
    def test_tensor_dtype(self, dtype):
        self.refused(torch.zeros(3, 4, 4, dtype=dtype), str(dtype))

    @pytest.mark.parametrize("value", [-0.01, 1.01, 1.99, 255.5, float("nan"), float("inf")])
    def test_float_range(self, value):
        image = torch.rand(3, 4, 4)
        image[1, 2, 3] = value
        self.refused(image, "0..1")

    def test_unknown_range(self):
        self.refused(Image.fromarray(np.ones((4, 4), np.float32)), "mode 'F'")
        self.refused(Image.fromarray(np.ones((4, 4), np.int32)), "mode 'I'")

    def test_other_types(self):
        self.refused(None, "NoneType")
        self.refused([1, 2], "list", "image 7", name="image 7")


class TestSplitBatch:
    """The batch form ``[B, n_cameras, 3, H, W]``."""

    def test_views_in_order(self):
        batch = torch.randint(0, 256, (2, 3, 3, 8, 10), dtype=torch.uint8)
        samples = split_batch(batch)
        assert [len(sample) for sample in samples] == [3, 3]
        for sample, split in zip(batch, samples, strict=True):
            for expected, image in zip(sample, split, strict=True):
                assert torch.equal(image, expected)
                assert image.data_ptr() == expected.data_ptr()

    @pytest.mark.parametrize("shape", [(2, 3, 8, 8), (0, 2, 3, 8, 8), (2, 0, 3, 8, 8), (1, 1, 2, 8, 8)])
    def test_bad_shapes(self, shape):
        with pytest.raises(MediaError, match=re.escape(str(list(shape)))):
            split_batch(torch.zeros(shape, dtype=torch.uint8))

    def test_bad_values(self):
        with pytest.raises(MediaError, match=r"0\.\.1"):
            split_batch(torch.full((1, 1, 3, 4, 4), 256.0))


class TestDecodingBytes:
    """What loading will take, known from the header."""

    @pytest.mark.parametrize(
        ("kind", "mode", "options", "each"),
        [
            ("JPEG", "RGB", {}, 7),
            ("JPEG", "L", {}, 4),
            ("JPEG", "RGB", {"progressive": True}, 10),
            ("PNG", "RGBA", {}, 7),
            ("PNG", "P", {}, 4),
            ("PNG", "I;16", {}, 5),
            ("WEBP", "RGB", {}, 16),
        ],
    )
    def test_files(self, kind, mode, options, each, tmp_path):
        data = encoded(Image.new(mode, (40, 30)), kind, **options)
        path = tmp_path / "file"
        path.write_bytes(data)
        assert decoding_bytes(data) == decoding_bytes(path) == 40 * 30 * each + len(data)

    def test_what_is_in_memory(self):
        array = picture()
        assert decoding_bytes(array) == decoding_bytes(torch.from_numpy(array)) == array.nbytes
        assert decoding_bytes(Image.fromarray(array)) == array.nbytes

    def test_an_image_that_is_not_read_yet(self):
        data = encoded(Image.new("RGB", (40, 30)), "PNG")
        image = Image.open(io.BytesIO(data))
        assert decoding_bytes(image) == decoding_bytes(data) - len(data)
        image.load()
        assert decoding_bytes(image) == 40 * 30 * 3

    def test_what_is_wrong_is_told_by_loading(self):
        for wrong in (b"", b"none", "none.png", None, 5):
            assert decoding_bytes(wrong) == 0
