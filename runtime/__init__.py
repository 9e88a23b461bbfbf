"""Engines to answers.

Each room is built on those before it: ``inputs`` reads pictures and videos, ``preprocessing`` turns them into patches,
``backends`` run the two engines, ``media`` gives embeddings and remembers them, ``scheduling`` shares the decoder among
requests, and ``tensorrt_llm`` takes the decoder's place where that library schedules.
:mod:`qwen2vl_trt.runtime.pipeline` joins them, :mod:`qwen2vl_trt.runtime.service` gives a pipeline a thread of its own,
for servers; ``features`` writes embeddings of whole collections.
"""

from qwen2vl_trt.media_options import ImageOptions, VideoOptions

from .inputs.video import Video
from .options import PipelineOptions
from .pipeline import Pipeline
from .preprocessing.sizes import MediaSize
from .request import Event, Output, Request, Timings
from .sampler import SamplingParams
from .scheduling.counters import Counters
from .service import Answer, Service

__all__ = [
    "Answer",
    "Counters",
    "Event",
    "ImageOptions",
    "MediaSize",
    "Output",
    "Pipeline",
    "PipelineOptions",
    "Request",
    "SamplingParams",
    "Service",
    "Timings",
    "Video",
    "VideoOptions",
]
