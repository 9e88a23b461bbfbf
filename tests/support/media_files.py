"""Image and video files to read."""

import struct
from fractions import Fraction

import numpy as np
from PIL import Image


def save_images(folder, count, sizes=((56, 84), (112, 140), (60, 100))):
    """PNG files of noise, 0000.png and so on, of these (height, width) in turn; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png", compress_level=0)
    return folder


def save_video(path, frames, rate=10, rotation=None, codec="mpeg4", times=None, codec_options=None, **options):
    """Frames ``[H, W, 3]`` at ``rate`` a second; ``options`` are the container's. Returns the path.

    With ``times`` each frame has its own, in whole milliseconds, and ``rate`` is only what the header says.
    """
    import av

    with av.open(path, "w", **options) as container:
        stream = container.add_stream(codec, rate=rate, options=codec_options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def edited(data, start, length):
    """An MP4 file of :func:`save_video` whose edit list shows ``length`` seconds from ``start`` on alone."""
    data = bytearray(data)
    (scale,) = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)
    (movie_scale,) = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)
    entry = data.index(b"elst") + 12
    _, media_time = struct.unpack_from(">Ii", data, entry)
    struct.pack_into(">Ii", data, entry, round(length * movie_scale), media_time + round(start * scale))
    return bytes(data)


def without_rate(data):
    """A WebM file without ``DefaultDuration``, as browsers write it."""
    begin = data.index(b"\x23\xe3\x83")
    size = data[begin + 3] & 0x7F
    return data[:begin] + bytes([0xEC, 0x80 | (size + 2)]) + bytes(size + 2) + data[begin + 4 + size :]


def digit_pictures(labels=(3, 7, 1, 4), size=84):
    """One held-out handwritten digit each, drawn plainly: ``[size, size, 3]``."""
    from qwen2vl_trt.tiny.digits import load_split
    from qwen2vl_trt.tiny.scenes import PLAIN, draw_digit

    rng = np.random.default_rng(0)
    _, held_out = load_split()
    pictures = []
    for label in labels:
        ink = np.zeros((size, size), np.float32)
        ink[14:-14, 14:-14] = draw_digit(rng, held_out, label, size - 28, PLAIN)
        pictures.append(np.repeat((255 * (1 - ink)).astype(np.uint8)[..., None], 3, axis=2))
    return pictures
