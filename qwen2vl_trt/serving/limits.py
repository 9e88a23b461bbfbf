"""What one request may ask of a server, and all of them together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Maxima; each is a flag of ``serve``: ``image_bytes`` is ``--image-bytes``.

    Attributes:
        body_bytes: of a request's body.
        body_bytes_in_flight: of all bodies that are held at one time, and of the media that were fetched for them.
        body_seconds: until a request's header is there, and then until its body is.
        send_seconds: until a client has taken what it is sent; one that takes nothing has hung up.
        parts: of a request: its messages, and the texts and media in them.
        images: of a request.
        image_bytes: of an image, encoded.
        videos: of a request.
        video_bytes: of a video, encoded; of all frames of one that is given as images.
        video_frames: of a video that is given as images.
        image_fetch_seconds: until an image of a URL is there, whatever its host sends meanwhile.
        video_fetch_seconds: likewise of a video, or of all the frames of one.
        fetches: URLs that are fetched at one time; others wait for as many seconds as their fetch may take.
        tools: that a model may call.
        n: answers to one prompt.
        stop: strings that end an answer.
        stop_token_ids: tokens that end an answer.
        top_logprobs: likeliest tokens that are told of each place.
        logit_bias: tokens with a bias.
        pending: requests that are under way or wait.
    """

    body_bytes: int = 64 << 20
    body_bytes_in_flight: int = 1 << 30
    body_seconds: float = 30.0
    send_seconds: float = 60.0
    parts: int = 4096
    images: int = 16
    image_bytes: int = 32 << 20
    videos: int = 4
    video_bytes: int = 64 << 20
    video_frames: int = 768
    image_fetch_seconds: float = 10.0
    video_fetch_seconds: float = 30.0
    fetches: int = 16
    tools: int = 128
    n: int = 8
    stop: int = 4
    stop_token_ids: int = 64
    top_logprobs: int = 20
    logit_bias: int = 300
    pending: int = 256
