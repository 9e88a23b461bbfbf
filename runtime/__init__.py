"""Engines to answers.

Each folder is built on those before it: ``inputs`` reads images and videos, ``preprocessing`` turns them into patches,
``backends`` run the two engines, ``media`` gives embeddings and caches them, ``scheduling`` shares the decoder among
requests, and ``tensorrt_llm`` takes the decoder's place where that library schedules.
:mod:`qwen2vl_trt.runtime.pipeline` joins them, :mod:`qwen2vl_trt.runtime.service` gives a pipeline a thread of its own,
for servers; ``features`` writes embeddings of whole collections.
"""
