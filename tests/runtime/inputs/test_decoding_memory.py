"""From an image file to patches memory stays near the pixels; measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")

SCRIPT = """
import json, sys
import torch
from PIL import Image
from qwen2vl_trt.runtime.inputs.images import decoding_bytes, load_image
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor
from tests.support.pictures import CONFIG

torch.set_num_threads(1)
path, preprocessor = sys.argv[1], Preprocessor(CONFIG)

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))

preprocessor.preprocess([load_image(Image.new("RGB", (60, 60)))])
load_image(path.replace("large", "small"))  # imports what the format needs
before = status("VmRSS")
image = load_image(path)
preprocessor.preprocess([image])
print(json.dumps([status("VmHWM") - before, decoding_bytes(path), image.shape[1] * image.shape[2]]))
"""

SIDE = 4000


@pytest.mark.parametrize(
    ("kind", "mode", "options", "each"),
    [
        ("JPEG", "RGB", {}, 7),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}, 10),
        ("JPEG", "RGB", {"exif": 6}, 7),
        ("PNG", "RGBA", {}, 7),
        ("PNG", "P", {}, 4),
        ("PNG", "I;16", {}, 5),
        ("TIFF", "CMYK", {"compression": "tiff_lzw"}, 11),
        ("WEBP", "RGB", {"method": 0}, 16),
    ],
)
def test_peak(kind, mode, options, each, tmp_path):
    from PIL import Image

    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options = {"exif": exif}
    for name, side in (("small", 30), ("large", SIDE)):
        Image.new(mode, (side, side), 100 if mode in ("P", "I;16") else None).save(tmp_path / name, kind, **options)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "large")], capture_output=True, text=True, check=True, timeout=300
    )
    peak, expected, pixels = json.loads(done.stdout)
    assert pixels == SIDE * SIDE
    assert expected == each * pixels + (tmp_path / "large").stat().st_size
    assert peak < expected + (24 << 20)  # the patches, and what the allocator keeps
