"""Engines to answers.

In the order in which data passes: ``inputs`` reads pictures and videos, ``preprocessing`` turns them into patches,
``backends`` run the two engines, ``media`` gives embeddings and remembers them, ``scheduling`` shares the decoder among
requests, :mod:`runtime.pipeline` joins them. ``tensorrt_llm`` takes the place of the last two where that library
schedules; ``features`` writes embeddings of whole collections.
"""

from .inputs.video import Video
from .pipeline import Pipeline
from .request import Event, Output, Request, Timings
from .sampler import SamplingParams
from .scheduling.counters import Counters

__all__ = ["Counters", "Event", "Output", "Pipeline", "Request", "SamplingParams", "Timings", "Video"]
