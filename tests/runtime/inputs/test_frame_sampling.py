"""Which frames are kept: as Transformers keeps them at a constant rate, by time at any other."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.video_utils import VideoMetadata

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.runtime.inputs.frame_sampling import FrameSampling, Timeline

MS = Fraction(1, 1000)
RATES = (Fraction(24), Fraction(25), Fraction(30), Fraction(60), Fraction(24000, 1001), Fraction(30000, 1001))


def stamps(times, last=0):
    return [(time, 0) for time in times[:-1]] + [(times[-1], last)]


def times_of(timeline, kept):
    return [float(timeline.ticks[number] * timeline.tick) for number in kept]


class TestIndices:
    """``FrameSampling.indices`` against ``Qwen2VLVideoProcessor.sample_frames``."""

    processor = Qwen2VLVideoProcessor()

    @settings(max_examples=300, deadline=None)
    @given(
        st.integers(2, 5000),
        st.floats(1, 240),
        st.floats(0.1, 30),
        st.integers(0, 20),
        st.integers(2, 800),
        st.sampled_from([1, 2, 4]),
    )
    def test_equals_transformers(self, total, rate, fps, fewest, most, unit):
        sampling = FrameSampling(fps, fewest, most, unit)
        kept = sampling.indices(total, rate)
        assert kept == sorted(set(kept))
        assert kept[0] >= 0
        assert kept[-1] < total
        metadata = VideoMetadata(total_num_frames=total, fps=rate)
        try:
            expected = self.processor.sample_frames(
                metadata, temporal_patch_size=unit, min_frames=fewest, max_frames=most, fps=fps
            )
        except ZeroDivisionError:  # too short for one temporal patch
            assert kept == list(range(min(total, unit)))
        else:
            assert kept == [index for index in expected.tolist() if index < total]

    @settings(max_examples=200, deadline=None)
    @given(st.integers(2, 500), st.integers(1, 500))
    def test_a_number_of_frames_equals_transformers(self, total, count):
        sampling = FrameSampling(num_frames=count)
        timeline = Timeline.of([(number, 1) for number in range(total)], Fraction(1, 25), [Fraction(25)])
        if not 2 <= round(count / 2) * 2 <= total:  # where Transformers divides by zero or refuses
            with pytest.raises(MediaError, match=rf"video 1: nframes {count} is not within 2 to {total}"):
                sampling.choose(timeline, "video 1")
            return
        metadata = VideoMetadata(total_num_frames=total, fps=25.0)
        expected = self.processor.sample_frames(metadata, num_frames=count)
        assert sampling.choose(timeline, "video 1") == [index for index in expected.tolist() if index < total]

    def test_typical(self):
        assert FrameSampling().indices(100, 25.0) == [0, 12, 25, 37, 50, 62, 75, 87]
        assert FrameSampling().indices(3, 30.0) == [0, 1]
        assert FrameSampling().indices(1, 30.0) == [0]


class TestTimeline:
    """What timestamps say, and when a header is believed."""

    @settings(max_examples=200, deadline=None)
    @given(
        st.integers(2, 2000),
        st.sampled_from(RATES),
        st.sampled_from([MS, Fraction(1, 600), Fraction(1, 90000)]),
        st.integers(-5000, 5000),
        st.sampled_from(["round", "floor"]),
    )
    def test_a_constant_rate_is_sampled_as_transformers_does(self, total, rate, tick, first, rounding):
        """Whatever the rounding of its timestamps."""
        exact = [first + number / (rate * tick) for number in range(total)]
        ticks = [round(time) if rounding == "round" else time.numerator // time.denominator for time in exact]
        timeline = Timeline.of(stamps(ticks), tick, [None, Fraction(1000), rate])
        assert timeline.rate == rate
        assert timeline.duration == total / rate
        assert FrameSampling().choose(timeline, "") == FrameSampling().indices(total, float(rate))

    @given(st.permutations(range(12)))
    def test_the_order_of_decoding_is_not_that_of_time(self, order):
        timeline = Timeline.of([(number * 40, 40) for number in order], MS, [Fraction(25)])
        assert timeline == Timeline.of([(number * 40, 40) for number in range(12)], MS, [Fraction(25)])

    def test_a_rate_that_one_timestamp_contradicts_is_not_believed(self):
        times = [40 * number for number in range(50)]
        assert Timeline.of(stamps(times), MS, [Fraction(25)]).rate == 25
        times[30] += 2
        assert Timeline.of(stamps(times), MS, [Fraction(25)]).rate is None
        frames = list(range(50))
        frames[30:] = range(31, 51)  # a frame is missing: AVI counts in frames
        assert Timeline.of(stamps(frames), Fraction(1, 25), [Fraction(25)]).rate is None

    def test_a_last_frame_without_a_duration(self):
        """As long as the one before it, at most a second; what its packet says if that is more."""
        assert Timeline.of(stamps([0, 100, 250]), MS).duration == Fraction(400, 1000)
        assert Timeline.of(stamps([0, 100, 250], 1), MS).duration == Fraction(400, 1000)
        assert Timeline.of(stamps([0, 100, 250], 700), MS).duration == Fraction(950, 1000)
        assert Timeline.of(stamps([0, 100, 20_000]), MS).duration == 21
        assert Timeline.of([(5, 0)], MS).duration == Fraction(1, 2)
        assert Timeline.of([(5, 0), (5, 0)], MS).duration > 0

    def test_no_timestamps(self):
        timeline = Timeline.of([(None, 40_000)] * 120, Fraction(1, 1_200_000), [Fraction(25), Fraction(30)])
        assert (timeline.rate, timeline.duration) == (30, 4)
        assert Timeline.of([(None, 0)] * 50, MS, [Fraction(25)]).duration == 2

    def test_a_variable_rate(self):
        """30 frames in the first second, then 2 a second."""
        times = [round(1000 * number / 30) for number in range(30)] + list(range(1000, 4000, 500))
        timeline = Timeline.of(stamps(times), MS, [Fraction(30)])
        kept = FrameSampling().choose(timeline, "")
        assert times_of(timeline, kept) == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
        assert len(kept) / timeline.duration == 2

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(1, 3000), min_size=2, max_size=300), st.floats(0.2, 10))
    def test_each_is_the_frame_shown_at_its_time(self, intervals, fps):
        times = [sum(intervals[:number]) for number in range(len(intervals))]
        timeline = Timeline.of(stamps(times, intervals[-1]), MS)
        kept = FrameSampling(fps=fps, max_frames=64).choose(timeline, "")
        assert len(kept) <= min(64, len(times))
        for number, index in enumerate(kept):
            wanted = number * timeline.end / len(kept)
            assert times[index] <= wanted
            assert index + 1 == len(times) or times[index + 1] > wanted


class TestBetween:
    """``video_start`` and ``video_end``; at a constant rate qwen-vl-utils' ``calculate_video_frame_range``."""

    constant = Timeline.of([(number, 1) for number in range(120)], Fraction(1, 30), [Fraction(30)])
    variable = Timeline.of(stamps([0, 1000, 1100, 5000], 1000), MS)

    @pytest.mark.parametrize(
        ("start", "end", "first", "count"),
        [(0, 4, 0, 120), (2, 4, 60, 60), (0, 2, 0, 61), (0.5, 1.01, 15, 16), (0.51, 1.0, 16, 15), (3.99, 4, 119, 1)],
    )
    def test_a_constant_rate(self, start, end, first, count):
        found, part = self.constant.between(start, end)
        assert (found, len(part.ticks)) == (first, count)
        assert part.duration == Fraction(count, 30)

    @pytest.mark.parametrize(
        ("start", "end", "first", "ticks", "duration"),
        [
            (0.5, 1.5, 1, (0, 100), 4),
            (1.0, 1.05, 1, (0,), 0.1),
            (2.0, 3.0, 2, (0,), 3.9),  # nothing begins there; the frame of 1.1 s is shown
            (5.5, 6.0, 3, (0,), 1),
        ],
    )
    def test_a_variable_rate(self, start, end, first, ticks, duration):
        found, part = self.variable.between(start, end)
        assert (found, part.ticks) == (first, ticks)
        assert float(part.duration) == duration
