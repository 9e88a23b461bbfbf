"""Engines to answers."""

from .counters import Counters
from .pipeline import Pipeline
from .request import Event, Output, Request, Timings
from .sampler import SamplingParams
from .video import Video

__all__ = ["Counters", "Event", "Output", "Pipeline", "Request", "SamplingParams", "Timings", "Video"]
