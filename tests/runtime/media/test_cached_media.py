"""A picture that comes again is neither decoded nor embedded again, and nothing else is taken for it."""

from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen2vl_trt import Video
from qwen2vl_trt.errors import LimitError, MediaError
from qwen2vl_trt.media_options import ImageOptions, VideoOptions
from qwen2vl_trt.runtime.media.cached_media import (
    CachedMedia,
    EmbeddingCache,
    PixelKeys,
    _splitmix,
    contents_key,
    file_key,
)
from qwen2vl_trt.runtime.preprocessing import preprocessor as preprocessor_module
from qwen2vl_trt.runtime.preprocessing.sizes import MediaSize
from tests.support.fake_vision import embedder, picture
from tests.support.media_files import save_video


def cached(limit=1 << 20, **settings):
    media, engine = embedder(**settings)
    return CachedMedia(media, EmbeddingCache(limit)), engine


def png(array):
    file = BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_duplicates_in_a_batch_are_embedded_once():
    for limit in (0, 1 << 20):
        media, engine = cached(limit)
        loaded = [media.load_image(picture(number), "image") for number in (0, 1, 0, 0)]
        embeds, _ = media.embed(loaded)
        assert engine.calls == [2]
        assert (media.hits, media.misses) == (2, 2)
        assert torch.equal(embeds[0], embeds[2])
        assert not torch.equal(embeds[0], embeds[1])
        media.embed([media.load_image(picture(0), "image")])
        assert engine.calls == ([2, 1] if limit == 0 else [2])


def test_a_file_in_the_cache_is_not_even_decoded(tmp_path, monkeypatch):
    media, engine = cached()
    path = tmp_path / "a.png"
    path.write_bytes(png(picture(0)))
    first = media.embed([media.load_image(path, "image 1")])[0][0]
    monkeypatch.setattr(preprocessor_module, "load_image", None)
    for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes())):
        again = media.load_image(source, "image 1")
        assert again.size.grid == (1, 4, 6)
        assert (again.size.width, again.size.height) == (84, 56)
        assert torch.equal(media.embed([again])[0][0], first)
    assert engine.calls == [1]
    monkeypatch.undo()
    path.write_bytes(png(picture(1)))  # the same name, another picture
    assert not torch.equal(media.embed([media.load_image(path, "image 1")])[0][0], first)


def test_the_same_pixels_in_any_form_of_array_are_one_picture():
    media, engine = cached()
    array = picture(0)
    forms = [array, Image.fromarray(array), torch.from_numpy(array).movedim(-1, 0), array[:, ::-1][:, ::-1]]
    media.embed([media.load_image(form, "image") for form in forms])
    assert engine.calls == [1]


def test_other_sizes_and_types_are_other_pictures():
    media, engine = cached()
    grey = np.zeros((56, 84), np.uint8)
    forms = [grey, grey.T, torch.zeros(3, 56, 84), picture(0)]
    media.embed([media.load_image(form, "image") for form in forms])
    assert sum(engine.calls) == 4


def test_one_picture_in_two_sizes_is_two_pictures(tmp_path):
    """Whether it goes by its file or by its pixels."""
    media, engine = cached()
    path = tmp_path / "a.png"
    path.write_bytes(png(picture(0, 112, 112)))
    small = ImageOptions(max_pixels=56 * 56)
    for source in (path, path.read_bytes(), picture(0, 112, 112)):
        whole, shrunk, again = (
            media.load_image(source, "image", options) for options in (ImageOptions(), small, small)
        )
        assert (whole.size.grid, shrunk.size.grid) == ((1, 8, 8), (1, 4, 4))
        assert whole.key != shrunk.key == again.key
        assert [len(embeds) for embeds in media.embed([whole, shrunk, again])[0]] == [16, 4, 4]
    assert sum(engine.calls) == 4  # file and bytes are one, pixels another, in two sizes each


def test_a_video_that_comes_again_is_not_embedded_again():
    media, engine = cached()
    frames = [picture(number) for number in range(4)]
    clip = media.load_video(frames, "video 1", VideoOptions(fps=2.0))
    assert clip.size.second_per_grid == 1.0
    embeds = media.embed([clip, media.load_image(frames[0], "image 1"), clip])[0]
    calls = len(engine.calls)
    again = media.load_video(Video(frames, fps=4.0), "video 1")
    assert again.size.second_per_grid == 0.5  # a rate moves positions, not pixels
    found = media.embed([again])[0][0]
    assert torch.equal(found, embeds[0])
    assert torch.equal(embeds[2], embeds[0])
    assert len(engine.calls) == calls
    media.embed([media.load_video(frames[::-1], "video 1", VideoOptions(fps=2.0))])
    assert len(engine.calls) == calls + 1


def test_a_video_file_that_comes_again_is_not_decoded_again(tmp_path, monkeypatch):
    path = save_video(tmp_path / "clip.mp4", [picture(number) for number in range(60)])
    media, engine = cached()
    first = media.load_video(path, "video 1")
    often, seldom = media.embed([first, media.load_video(path, "video 1", VideoOptions(fps=1.0))])[0]
    assert len(often) == 2 * len(seldom)
    calls = len(engine.calls)
    monkeypatch.setattr(preprocessor_module, "load_video", None)
    for source in (path, str(path), path.read_bytes()):
        again = media.load_video(source, "video 1")
        assert again.size == first.size
        media.embed([again, media.load_video(source, "video 1", VideoOptions(fps=1.0))])
    assert len(engine.calls) == calls


def test_errors_are_those_of_loading(tmp_path):
    media, _ = cached()
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    for name, message in (("none.png", "no such file"), ("empty.png", "empty"), ("text.png", "not an image")):
        with pytest.raises(MediaError, match=rf"image 2 \(.*{name}\): .*{message}"):
            media.load_image(tmp_path / name, "image 2")
    with pytest.raises(MediaError, match="addresses are not fetched"):
        media.load_image("https://x/y.png", "image 2")
    large = tmp_path / "large.png"
    large.write_bytes(png(picture(0, 600, 700)))
    media, _ = cached(min_pixels=1, max_pixels=10**6, strict_size=True)
    with pytest.raises(LimitError, match=r"image 3 \(.*large.png\) \(700x600\)"):
        media.load_image(large, "image 3")
    with pytest.raises(MediaError, match=r"video 1 \(.*none.mp4\): no such file"):
        media.load_video(tmp_path / "none.mp4", "video 1")


def test_an_engine_that_fails_leaves_nothing_in_the_cache():
    media, engine = cached()
    loaded = [media.load_image(picture(number), "image") for number in range(2)]

    def broken(pixel_values, layout):
        raise RuntimeError("engine")

    runner, media._media._runner = media._media._runner, broken
    with pytest.raises(RuntimeError, match="engine"):
        media.embed(loaded)
    media._media._runner = runner
    assert (media.hits, media.misses) == (0, 0)
    media.embed(loaded)
    assert engine.calls == [2]


# Content keys


def pixels(seed, height=9, width=13):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def test_layout_does_not_matter_and_everything_else_does():
    keys, image = PixelKeys(), pixels(0)
    key = keys.key([image])
    assert len(key) == 16
    assert keys.key([image.movedim(0, -1).contiguous().movedim(-1, 0)]) == key
    changed = image.clone()
    changed[2, 8, 12] ^= 1
    others = [changed, image.float(), image.transpose(1, 2), image[:, :-1], image.flip(2), pixels(1)]
    assert len({key, *(keys.key([other]) for other in others)}) == 7
    blank = [torch.zeros(3, 4, 6), torch.zeros(3, 6, 4), torch.zeros(3, 4, 24, dtype=torch.uint8)]
    assert len({keys.key([image]) for image in blank}) == 3  # the same bytes
    assert keys.key([image, image]) != key
    assert keys.key([image, changed]) != keys.key([changed, image])


def test_a_files_key_is_that_of_its_contents(tmp_path):
    path = tmp_path / "file"
    data = bytes(range(256)) * 9000  # more than is read at a time
    path.write_bytes(data)
    with path.open("rb") as file:
        file.read(1)
        assert file_key(file, "image") == contents_key(data, "image") != contents_key(data, "video")
        assert file.read() == data


def test_the_mix_of_another_device_tells_contents_apart():
    """Computed on the CPU here; on a GPU the same operators run there."""
    keys = PixelKeys()
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.integers(0, 256, 801, dtype=np.uint8))
    found = {keys.mix(base)}
    for place in range(801):  # any byte, any place
        other = base.clone()
        other[place] += 1
        found.add(keys.mix(other))
    swapped = base.clone()
    swapped[:8], swapped[8:16] = base[8:16], base[:8]
    found.add(keys.mix(swapped))
    assert len(found) == 803
    assert keys.mix(base) in found
    assert PixelKeys().mix(base) not in found  # under other seeds
    assert len(keys.mix(base)) == 16


def test_the_mix_is_splitmix64():
    """First outputs of the published generator with seed 0 are the finaliser of multiples of its increment."""
    increment = 0x9E3779B97F4A7C15 - (1 << 64)
    found = _splitmix(torch.tensor([increment]) * torch.tensor([1, 2]))
    assert [value % (1 << 64) for value in found.tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


# The cache alone

ROW = 4 * 8  # bytes
SIZE = MediaSize(60, 30, 56, 28, (1, 2, 4), 2)


def entry(tokens, value=0.0):
    return torch.full((tokens, 8), value), SIZE


def test_the_least_recently_used_makes_room():
    cache = EmbeddingCache(10 * ROW)
    for name, tokens in ((b"a", 4), (b"b", 3), (b"c", 3)):
        cache.store(name, *entry(tokens))
    assert (len(cache), cache.nbytes) == (3, 10 * ROW)
    assert cache.find(b"a") is not None
    cache.store(b"d", *entry(2))
    assert cache.find(b"b") is None
    assert all(cache.find(name) is not None for name in (b"a", b"c", b"d"))
    assert (cache.nbytes, cache.evictions) == (9 * ROW, 1)
    cache.store(b"e", *entry(11))  # alone too large: nobody is driven out for it
    assert cache.find(b"e") is None
    assert len(cache) == 3
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_zero_keeps_nothing():
    cache = EmbeddingCache(0)
    cache.store(b"a", *entry(1))
    assert len(cache) == 0


def test_a_batch_does_not_stay_for_one_of_its_images():
    cache, batch = EmbeddingCache(100 * ROW), torch.arange(80.0).view(10, 8)
    cache.store(b"a", batch[2:4], SIZE)
    found = cache.find(b"a")
    assert found.embeds.untyped_storage().nbytes() == 2 * ROW
    assert torch.equal(found.embeds, batch[2:4])
    assert found.size is SIZE


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), max_size=60), st.integers(0, 12))
def test_bytes_are_counted(steps, limit):
    cache, sizes = EmbeddingCache(limit * ROW), {}
    for name, tokens in steps:
        key = bytes([name])
        if cache.find(key) is None:
            sizes[key] = tokens
        cache.store(key, *entry(tokens))
        held = [key for key in sizes if cache.find(key) is not None]
        assert cache.nbytes == sum(sizes[key] for key in held) * ROW <= limit * ROW
        assert all(cache.find(key).embeds.shape == (sizes[key], 8) for key in held)
