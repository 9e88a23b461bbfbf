"""Equal pixels have equal keys, whatever their layout; other pixels, sizes and types have others."""

import numpy as np
import torch

from qwen2vl_trt.runtime.media.content_keys import PixelKeys, contents_key, file_key


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
    from qwen2vl_trt.runtime.media.content_keys import _splitmix

    increment = 0x9E3779B97F4A7C15 - (1 << 64)
    found = _splitmix(torch.tensor([increment]) * torch.tensor([1, 2]))
    assert [value % (1 << 64) for value in found.tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
