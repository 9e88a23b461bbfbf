"""Video streams as clips, by PyAV."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, cast

import numpy as np
from torch import Tensor

from qwen2vl_trt.errors import MediaError, MissingDependencyError

from .clips import MAX_FRAME_PIXELS, VideoFile, VideoLimits, check_count, check_frame
from .frame_sampling import Stamp, Timeline
from .images import channels_first, rgb

if TYPE_CHECKING:
    import av

_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,h264,hevc"
_SOUND = "mp3,flac,wav"  # may hold a cover, which is no video
_OPTIONS = {
    # Playlists, concatenations, image sequences and network addresses make FFmpeg open other files.
    "format_whitelist": f"{_CONTAINERS},{_SOUND}",
    "protocol_whitelist": "none",
    "max_pixels": str(MAX_FRAME_PIXELS),
}

_MIN_PACKETS = 0.9
"""Share of a file's index that must exist, else it is truncated; an index is often off by a few frames."""

_MIN_DECODED = 0.5
"""Share of the packets that must become frames; a field or a hidden picture becomes none."""


class VideoStream:
    """The video stream with the most frames, as a :class:`~qwen2vl_trt.runtime.inputs.clips.Clip`.

    It opens no other file, whatever the container refers to.

    Raises:
        MissingDependencyError: PyAV is not installed.
    """

    def __init__(self, file: VideoFile, label: str, limits: VideoLimits, check_time: Callable[[], None]) -> None:
        try:
            import av  # noqa: F401
        except ImportError:
            raise MissingDependencyError(f"{label}: reading a video file needs PyAV; pip install av") from None
        self._file, self._label, self._limits, self._check_time = file, label, limits, check_time
        self._number = self._packets = 0

    def timeline(self) -> Timeline:
        """From the packets' timestamps."""
        with self._opened() as container:
            streams = self._streams(container)
            packets: Counter[int] = Counter()
            stamps: dict[int, list[Stamp]] = defaultdict(list)
            for packet in container.demux(streams):
                self._check_time()
                if packet.size:
                    packets[packet.stream_index] += 1
                    check_count(packets.total(), self._label)
                    if not packet.is_discard:  # an edit list hides it
                        stamps[packet.stream_index].append((packet.pts, packet.duration or 0))
            stream = max(streams, key=lambda stream: packets[stream.index])
            self._number, self._packets = container.streams.video.index(stream), packets[stream.index]
            # An MP4 file's index is that of its edit list, which may leave out what the header counts.
            claimed = len(stream.index_entries) if container.format.name.startswith("mov") else stream.frames
            if self._packets < _MIN_PACKETS * claimed:
                raise self._truncated(self._packets, claimed)
            if not stamps[stream.index]:
                raise MediaError(f"{self._label}: no frames")
            return _timeline(stream, stamps[stream.index])

    def decode(self, indices: Sequence[int], timeline: Timeline) -> tuple[dict[int, Tensor], Timeline]:
        wanted, last = set(indices), max(indices)
        frames: dict[int, Tensor] = {}
        stamps: list[Stamp] = []
        agree = True
        with self._opened() as container:
            stream = container.streams.video[self._number]
            if stream.codec_context is None:
                raise MediaError(f"{self._label}: no decoder for its video stream")
            check_frame(stream.width, stream.height, self._label)
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"max_pixels": _OPTIONS["max_pixels"]}
            for number, frame in enumerate(self._decoded(container)):
                stamps.append((frame.pts, frame.duration or 0))
                if number in wanted:
                    if frame.is_corrupt:
                        raise MediaError(f"{self._label}: frame {number + 1} is corrupt")
                    pixels = self._pixels(frame)
                    self.size = (pixels.shape[1], pixels.shape[2])
                    frames[number] = self._limits.shrunk(pixels, len(indices), self._label)
                expected = timeline.first + timeline.ticks[number] if number < len(timeline.ticks) else None
                agree = agree and frame.pts is not None and frame.pts == expected
                if agree and number == last:
                    return frames, timeline
            if len(stamps) < max(1, _MIN_DECODED * self._packets):
                raise self._truncated(len(stamps), self._packets)
            return frames, _timeline(stream, stamps)

    def _decoded(self, container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
        """All frames; the time is looked at for each packet, of which one may give no frame."""
        for packet in container.demux(video=self._number):
            self._check_time()
            yield from cast("list[av.VideoFrame]", packet.decode())

    def _streams(self, container: av.container.InputContainer) -> list[av.VideoStream]:
        from av.stream import Disposition

        if not container.streams.video:
            raise MediaError(f"{self._label}: no video stream")
        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams:
            raise MediaError(f"{self._label}: no video stream, only cover art")
        return streams

    def _pixels(self, frame: av.VideoFrame) -> Tensor:
        """``[3, H, W]``, rotated as the file says: phones store portrait videos as landscape."""
        transparent = any(component.is_alpha for component in frame.format.components)
        pixels = frame.to_ndarray(format="rgba" if transparent else "rgb24")
        upright = np.rot90(pixels, round(getattr(frame, "rotation", 0) / 90))
        return rgb(channels_first(upright, self._label), self._label)

    @contextmanager
    def _opened(self) -> Iterator[av.container.InputContainer]:
        """The container from its beginning; opened anew, since not every one can seek."""
        import av

        self._file.seek(0)
        try:
            with av.open(self._file, options=_OPTIONS) as container:
                yield container
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            raise MediaError(f"{self._label}: not a video, truncated or corrupt: {reason}") from None

    def _truncated(self, found: int, expected: int) -> MediaError:
        return MediaError(f"{self._label}: truncated or corrupt: {found} of {expected} frames can be decoded")


def _timeline(stream: av.VideoStream, stamps: Sequence[Stamp]) -> Timeline:
    rates = stream.average_rate, stream.guessed_rate, stream.base_rate
    return Timeline.of(stamps, stream.time_base or Fraction(1, 1000), rates)
