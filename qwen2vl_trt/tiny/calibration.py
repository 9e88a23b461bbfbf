"""What the tiny model's FP8 quantisation is calibrated with: scenes of its training digits."""

from __future__ import annotations

from qwen2vl_trt.runtime.calibration import CalibrationData
from qwen2vl_trt.runtime.inputs.video import Video
from qwen2vl_trt.runtime.request import Request

from .curriculum import ROWS_UNTIL, training_scenes

_SEED = 0


def training_data(size: int) -> CalibrationData:
    """The first ``size`` scenes of the training's last phase, of all tasks."""
    requests: list[Request] = []
    step = ROWS_UNTIL
    while len(requests) < size:
        for scene in training_scenes(_SEED, step):
            videos = [Video(frames, fps) for frames, fps in scene.videos]
            requests.append(Request(scene.messages, scene.images, videos))
        step += 1
    return CalibrationData(requests[:size], f"training scenes of seed {_SEED} from step {ROWS_UNTIL}")
