"""Pixels, grids and window order against Transformers' own processors."""

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl, image_processing_qwen2_vl
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.runtime.inputs.video import Video
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor
from qwen2vl_trt.runtime.preprocessing.settings import PixelSettings, PreprocessorSettings
from qwen2vl_trt.windows import window_layout
from tests.support.pictures import CONFIG, TINY, merge_order, natural, noise

DEFAULT = image_processing_qwen2_vl.Qwen2VLImageProcessor
PILLOW = image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil
MEAN = torch.tensor(PixelSettings().image_mean).view(3, 1)
STD = torch.tensor(PixelSettings().image_std).view(3, 1)

# No resize: sides are multiples of 28 and the area is within the limits.
EXACT_SIZES = [(56, 56), (28, 112), (112, 112), (112, 140), (140, 112), (140, 140), (28, 5572), (5572, 28), (448, 224)]
RESIZED_SIZES = [(20, 20), (1, 1), (1, 200), (199, 1), (13, 700), (333, 71), (613, 847), (101, 1009), (1500, 1200)]


def from_sequences(packed, config=CONFIG):
    """The same by way of ``sequence_index``, which full attention gathers with: raster order of patches."""
    flat = packed.pixel_values.reshape(-1, config.qwen2_vl_dim)
    merge, patches, sequence = config.spatial_merge_size, [], 0
    for frames, height, width in packed.grids:
        for _ in range(frames):
            raster = flat[packed.layout.sequence_index[sequence, : height * width]]
            raster = raster.view(height // merge, merge, width // merge, merge, -1).transpose(1, 2)
            patches.append(raster.reshape(height * width, -1))
            sequence += 1
    return torch.cat(patches)


def levels(patches, config=CONFIG):
    """Normalised values back on the scale of 8 bits."""
    values = patches.view(len(patches), 3, -1)
    return (values * STD + MEAN) * 255


def assert_pixels(packed, expected, *, resized, level=1, config=CONFIG):
    ours = merge_order(packed, config)
    assert ours.shape == expected.shape
    assert torch.equal(from_sequences(packed, config), ours)
    if resized:
        difference = (levels(ours) - levels(expected)).abs()
        assert difference.max() < level + 0.01
        assert difference.mean() < 0.1
    else:
        assert (ours - expected).abs().max() <= 1e-6


def test_the_reference_is_transformers_default():
    """AutoImageProcessor prefers torchvision; Pillow is its fallback."""
    mapping = IMAGE_PROCESSOR_MAPPING[Qwen2_5_VLConfig]
    assert mapping["torchvision"] is DEFAULT
    assert mapping["pil"] is PILLOW


def test_auto_image_processor_resolves_to_it(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessor"}))
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is DEFAULT


@pytest.mark.parametrize("backend", [DEFAULT, PILLOW])
class TestAgainstTransformers:
    """Identical without a resize, within one 8-bit level after it."""

    @pytest.mark.parametrize("size", EXACT_SIZES)
    def test_without_resize(self, size, backend):
        image = noise(*size)
        packed = Preprocessor(CONFIG).preprocess([image])
        expected = backend()(images=image, return_tensors="pt")
        assert list(map(list, packed.grids)) == expected["image_grid_thw"].tolist()
        assert_pixels(packed, expected["pixel_values"], resized=False)

    @pytest.mark.parametrize("size", RESIZED_SIZES)
    @pytest.mark.parametrize("order", ["chw", "hwc"])
    def test_with_resize(self, size, order, backend):
        image = natural(*size)
        source = image if order == "chw" else image.permute(1, 2, 0).contiguous().numpy()
        packed = Preprocessor(CONFIG).preprocess([source])
        expected = backend()(images=image, input_data_format="channels_first", return_tensors="pt")
        assert list(map(list, packed.grids)) == expected["image_grid_thw"].tolist()
        assert_pixels(packed, expected["pixel_values"], resized=True)

    def test_mixed_batch(self, backend):
        sizes = [(28, 112), (333, 71), (112, 112), (112, 112), (20, 20), (140, 252), (1, 150), (500, 640)]
        images = [natural(*size, seed=seed) for seed, size in enumerate(sizes)]
        packed = Preprocessor(CONFIG).preprocess(images)
        expected = backend()(images=images, return_tensors="pt")
        assert list(map(list, packed.grids)) == expected["image_grid_thw"].tolist()
        # Pillow's own kernel differs from PyTorch's by two levels in a few pixels of the last image.
        assert_pixels(packed, expected["pixel_values"], resized=True, level=1 if backend is DEFAULT else 2)

    def test_limits(self, backend):
        image = natural(300, 200)
        settings = PreprocessorSettings().with_limits(min_pixels=10_000, max_pixels=30_000)
        packed = Preprocessor(CONFIG, settings).preprocess([image])
        size = {"shortest_edge": 10_000, "longest_edge": 30_000}
        expected = backend(size=size)(images=image, return_tensors="pt")
        assert list(map(list, packed.grids)) == expected["image_grid_thw"].tolist()
        assert_pixels(packed, expected["pixel_values"], resized=True)

    def test_decoded_file(self, backend, tmp_path):
        path = tmp_path / "a.jpg"
        Image.fromarray(natural(90, 230).permute(1, 2, 0).numpy()).save(path)
        packed = Preprocessor(CONFIG).preprocess([path])
        with Image.open(path) as image:
            expected = backend()(images=image, return_tensors="pt")
        assert_pixels(packed, expected["pixel_values"], resized=True)


class TestPreprocess:
    """What holds whatever Transformers does."""

    def test_resized_pixels_equal_torchvision_bit_for_bit(self):
        image = natural(613, 847)
        expected = DEFAULT()(images=image, return_tensors="pt")["pixel_values"]
        assert torch.equal(merge_order(Preprocessor(CONFIG).preprocess([image])), expected)

    @pytest.mark.parametrize("size", [(112, 168), (90, 130)])
    def test_float_images_as_with_do_rescale_false(self, size):
        image = natural(*size).float() / 255
        packed = Preprocessor(CONFIG).preprocess([image])
        expected = DEFAULT(do_rescale=False)(images=image, return_tensors="pt")["pixel_values"]
        assert_pixels(packed, expected, resized=False)

    @pytest.mark.parametrize("size", [(112, 168), (90, 130)])
    def test_float_images_up_to_255_as_by_default(self, size):
        """To the rounding of floats: Transformers resizes them as they are and divides by 255 last."""
        image = natural(*size).float()
        found = merge_order(Preprocessor(CONFIG).preprocess([image]))
        expected = DEFAULT()(images=image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)

    def test_other_normalisation(self):
        image = noise(56, 84)
        pixels = PixelSettings(image_mean=(0.5, 0.4, 0.3), image_std=(0.1, 0.2, 0.5), rescale_factor=1 / 127)
        packed = Preprocessor(CONFIG, PreprocessorSettings(image=pixels)).preprocess([image])
        reference = DEFAULT(image_mean=[0.5, 0.4, 0.3], image_std=[0.1, 0.2, 0.5], rescale_factor=1 / 127)
        assert_pixels(packed, reference(images=image, return_tensors="pt")["pixel_values"], resized=False)

    def test_layout_and_empty_slots(self):
        packed = Preprocessor(CONFIG).preprocess([noise(140, 252), noise(28, 112)])
        layout = window_layout(packed.grids, CONFIG)
        assert torch.equal(packed.layout.merge_index, layout.merge_index)
        slots = torch.arange(CONFIG.window_slots)
        empty = slots >= layout.window_lengths[:, None]
        assert packed.pixel_values.shape == (*empty.shape, 1176)
        assert empty.any()
        assert not packed.pixel_values[empty].any()
        assert packed.pixel_values[~empty].any(-1).all()

    def test_bfloat16_is_the_rounded_float32(self):
        images = [natural(140, 252), natural(90, 70)]
        exact = Preprocessor(CONFIG).preprocess(images).pixel_values
        rounded = Preprocessor(CONFIG, dtype=torch.bfloat16).preprocess(images).pixel_values
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(rounded, exact.bfloat16())

    def test_neighbours_do_not_matter(self):
        images = [natural(height, width) for height, width in [(56, 56), (56, 56), (300, 30), (140, 112), (60, 60)]]
        processor = Preprocessor(CONFIG)
        together = processor.preprocess(images).pixel_values
        alone = torch.cat([processor.preprocess([image]).pixel_values for image in images])
        assert torch.equal(together, alone)

    def test_sources_stay_as_they_were(self):
        images = [noise(112, 112), noise(100, 40), torch.rand(3, 56, 56), torch.rand(3, 50, 50)]
        copies = [image.clone() for image in images]
        Preprocessor(CONFIG).preprocess(images)
        assert all(torch.equal(image, copy) for image, copy in zip(images, copies, strict=True))

    def test_one_thread(self):
        images = [natural(100, 130, seed) for seed in range(3)]
        expected = Preprocessor(CONFIG).preprocess(images).pixel_values
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert torch.equal(Preprocessor(CONFIG).preprocess(images).pixel_values, expected)
        finally:
            torch.set_num_threads(threads)

    def test_other_dtypes_are_refused(self):
        with pytest.raises(ValueError, match="float16"):
            Preprocessor(CONFIG, dtype=torch.float16)

    def test_nothing(self):
        with pytest.raises(ValueError, match="at least one"):
            Preprocessor(CONFIG).preprocess([])

    def test_errors_name_the_image_and_its_size(self):
        with pytest.raises(MediaError, match=r"^image 2: 10x2010 has an aspect ratio of 201; .* at most 200"):
            Preprocessor(CONFIG).preprocess([noise(28, 28), noise(2010, 10)])
        with pytest.raises(MediaError, match=r"^image 1: empty"):
            Preprocessor(CONFIG).preprocess([b""])
        with pytest.raises(MediaError, match=r"^video 1: 201x1 has an aspect ratio"):
            Preprocessor(CONFIG).preprocess([], [[noise(1, 201)]])
        with pytest.raises(MediaError, match=r"^video 2, frame 1: empty"):
            Preprocessor(CONFIG).preprocess([], [[noise(28, 28)], [b""]])

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.tuples(st.integers(1, 11), st.integers(1, 11)), min_size=1, max_size=4), st.data())
    def test_every_pixel_appears_exactly_where_the_layout_says(self, sizes, data):
        """Each pixel carries its number in three channels; nothing is lost, doubled or misplaced."""
        identity = PixelSettings(min_pixels=1, image_mean=(0, 0, 0), image_std=(1, 1, 1), rescale_factor=1.0)
        images, first = [], 0
        for rows, columns in sizes:
            numbers = torch.arange(first, first + rows * columns * 16).view(rows * 4, columns * 4)
            images.append(torch.stack([numbers // 65536, numbers // 256 % 256, numbers % 256]).to(torch.uint8))
            first += numbers.numel()
        packed = Preprocessor(TINY, PreprocessorSettings(image=identity)).preprocess(images)
        flat = packed.pixel_values.view(-1, 3, 2, 4).long()
        numbers = flat[:, 0] * 65536 + flat[:, 1] * 256 + flat[:, 2]  # [slots, T, pixels of a patch]
        filled = (torch.arange(TINY.window_slots) < packed.layout.window_lengths[:, None]).view(-1)
        assert torch.equal(numbers[:, 0], numbers[:, 1])
        assert torch.equal(numbers[filled, 0].flatten().sort().values, torch.arange(first))
        first = 0
        for number, (_, height, width) in enumerate(packed.grids):
            raster = numbers[packed.layout.sequence_index[number, : height * width], 0].view(height, width, 2, 2)
            image = raster.transpose(1, 2).reshape(height * 2, width * 2)
            assert torch.equal(image, torch.arange(first, first + image.numel()).view_as(image))
            first += image.numel()

    def test_image_grid_without_pixels(self):
        processor = Preprocessor(CONFIG)
        reference = DEFAULT()
        for height, width in EXACT_SIZES + RESIZED_SIZES:
            frames, rows, columns = processor.sizes.image(height, width).grid
            assert frames == 1
            assert rows * columns == reference.get_number_of_image_patches(height, width, {})
        with pytest.raises(MediaError, match=r"^image 3: 1x300 has"):
            processor.sizes.image(300, 1, name="image 3")


class TestVideos:
    """Against ``Qwen2VLVideoProcessor``."""

    SMALL = PreprocessorSettings(video=PixelSettings(20_000, 60_000))

    def reference(self, frames, fps=None):
        metadata = None if fps is None else [{"total_num_frames": len(frames), "fps": fps}]
        size = {"shortest_edge": 20_000, "longest_edge": 60_000}
        result = Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False)(
            videos=[frames], video_metadata=metadata, return_metadata=True, return_tensors="pt"
        )
        rate = result["video_metadata"][0].sampled_fps  # Qwen2_5_VLProcessor divides temporal_patch_size by it
        return result["pixel_values_videos"], result["video_grid_thw"].tolist(), 2 / rate

    @pytest.mark.parametrize(
        ("count", "size", "resized"), [(4, (140, 168), False), (3, (333, 271), True), (1, (9, 40), True)]
    )
    @pytest.mark.parametrize("fps", [None, 2.0, 29.97])
    def test_as_transformers(self, count, size, resized, fps):
        frames = torch.stack([natural(*size, seed) for seed in range(count)])
        expected, grid, seconds = self.reference(frames, fps)
        for source in (frames, list(frames), frames.permute(0, 2, 3, 1).contiguous().numpy()):
            packed = Preprocessor(CONFIG, self.SMALL).preprocess(videos=[source if fps is None else Video(source, fps)])
            assert [list(packed.grids[0])] == grid
            assert packed.second_per_grid_ts == pytest.approx([1.0 if fps is None else seconds])  # Transformers: 24 fps
            assert_pixels(packed, expected, resized=resized)

    def test_images_come_before_videos(self):
        image, clip = noise(140, 112), [natural(150, 164, seed) for seed in range(4)]
        packed = Preprocessor(CONFIG, self.SMALL).preprocess([image], [clip, Video(clip[:2], fps=4)])
        expected = [DEFAULT()(images=image, return_tensors="pt")["pixel_values"]]
        expected += [self.reference(torch.stack(frames))[0] for frames in (clip, clip[:2])]
        assert packed.grids[0] == (1, 10, 8)
        assert packed.second_per_grid_ts == (1.0, 0.5)
        assert_pixels(packed, torch.cat(expected), resized=True)

    def test_default_limits(self):
        frames = torch.stack([natural(90, 100, seed) for seed in range(2)])
        expected = Qwen2VLVideoProcessor(cap_pixels_per_frame=False)(videos=[frames], return_tensors="pt")
        packed = Preprocessor(CONFIG).preprocess(videos=[frames])
        assert [list(grid) for grid in packed.grids] == expected["video_grid_thw"].tolist()
        assert_pixels(packed, expected["pixel_values_videos"], resized=True)

    def test_float_frames(self):
        frames = torch.stack([natural(280, 364, seed) for seed in range(2)]).float() / 255
        packed = Preprocessor(CONFIG).preprocess(videos=[frames])
        reference = Qwen2VLVideoProcessor(cap_pixels_per_frame=False, do_rescale=False)
        expected = reference(videos=[frames], return_tensors="pt")["pixel_values_videos"]
        assert_pixels(packed, expected, resized=False)

    def test_float_frames_up_to_255_as_by_default(self):
        """What qwen-vl-utils returns; a dark frame means the same as the bright ones."""
        frames = torch.stack([natural(280, 364, 1), natural(280, 364, 2).clamp(max=1)]).float()
        found = merge_order(Preprocessor(CONFIG).preprocess(videos=[frames]))
        reference = Qwen2VLVideoProcessor(cap_pixels_per_frame=False)
        expected = reference(videos=[frames], return_tensors="pt")["pixel_values_videos"]
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)

    def test_grid_without_pixels(self):
        processor = Preprocessor(CONFIG)
        for count, height, width in [(1, 300, 364), (5, 720, 200), (4, 30, 30)]:
            packed = processor.preprocess(videos=[torch.zeros(count, 3, height, width, dtype=torch.uint8)])
            assert processor.sizes.video(count, height, width, 24.0).grid == packed.grids[0]


def test_transparent_png_is_seen_on_white():
    buffer = io.BytesIO()
    Image.new("RGBA", (56, 56), (0, 0, 0, 0)).save(buffer, "PNG")
    packed = Preprocessor(CONFIG).preprocess([buffer.getvalue()])
    assert np.allclose(levels(merge_order(packed)), 255, atol=1e-3)


def test_the_last_batch_may_be_written_over():
    preprocessor = Preprocessor(CONFIG)
    images = [torch.randint(0, 256, (3, size, 84), dtype=torch.uint8) for size in (112, 56)]
    memory = torch.full((10**7,), torch.nan)
    expected, found = preprocessor.preprocess(images), preprocessor.preprocess(images, out=memory)
    assert torch.equal(found.pixel_values, expected.pixel_values)
    assert found.pixel_values.data_ptr() == memory.data_ptr()
    assert preprocessor.preprocess(images, out=memory[:7]).pixel_values.data_ptr() != memory.data_ptr()
