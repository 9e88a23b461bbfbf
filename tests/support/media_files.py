"""Image and video files to read."""

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


def save_video(path, frames, rate=10, rotation=None, codec="mpeg4", **options):
    """Frames ``[H, W, 3]`` at ``rate`` a second; ``options`` are the container's. Returns the path."""
    import av

    with av.open(path, "w", **options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path
