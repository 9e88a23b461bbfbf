"""A decoder of our own in nvImageCodec's place, with the names of its 0.9."""

import sys
import types

import torch

from qwen2vl_trt.runtime.inputs.images import load_image


class FakeCodec(types.ModuleType):
    """Decodes as Pillow does, but every level one lower, so that one sees who has decoded; gives up what it is told."""

    def __init__(self):
        super().__init__("nvidia.nvimgcodec")
        self.calls, self.gives_up = [], ()
        codec = self

        class Decoder:
            def __init__(self, device_id, options):
                codec.created = (device_id, options)

            def decode(self, files, params, cuda_stream):
                codec.calls.append((files, params, cuda_stream))
                return [None if file in codec.gives_up else codec.decode_one(file, params) for file in files]

        self.Decoder = Decoder
        self.DecodeParams = lambda **options: types.SimpleNamespace(**options)
        self.ColorSpec = types.SimpleNamespace(SRGB="sRGB")

    @staticmethod
    def decode_one(file, params):
        assert params.apply_exif_orientation
        assert params.color_spec == "sRGB"
        pixels = load_image(file).permute(1, 2, 0).contiguous()  # torch tensors speak DLPack, as its images do
        return pixels - (pixels > 0).to(torch.uint8)


def install(monkeypatch):
    """Put it there for a test."""
    fake = FakeCodec()
    monkeypatch.setitem(sys.modules, "nvidia", types.ModuleType("nvidia"))
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", fake)
    return fake


def lowered(source):
    """What it makes of a JPEG file."""
    pixels = load_image(source)
    return pixels - (pixels > 0).to(torch.uint8)
