"""Engines to answers."""

from .pipeline import Pipeline
from .request import Event, Output, Request, Timings
from .sampler import SamplingParams
from .video import Video

__all__ = ["Event", "Output", "Pipeline", "Request", "SamplingParams", "Timings", "Video"]
