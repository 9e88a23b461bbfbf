"""The exceptions a user can meet. Each message names the thing, the limit and the way out, in one line."""


class Qwen2VLError(Exception):
    """Base of every error this project raises on purpose. The commands print it and exit with code 2."""


class CheckpointError(Qwen2VLError):
    """A checkpoint is missing, incomplete, corrupt, or not a Qwen2.5-VL."""


class MediaError(Qwen2VLError):
    """An image or a video cannot be read or has an unusable size."""


class PromptError(Qwen2VLError):
    """A prompt does not fit its images, its videos or the chat template."""


class LimitError(Qwen2VLError):
    """An input lies outside what the engines were built for."""


class SamplingError(Qwen2VLError):
    """A sampling parameter has no meaning."""


class BuildError(Qwen2VLError):
    """An engine cannot be built."""


class EngineError(Qwen2VLError):
    """An engine cannot be loaded: corrupt, incomplete, or of another version."""


class ExecutionError(Qwen2VLError):
    """An engine failed while it ran, for want of memory for one."""


class DeadlineError(Qwen2VLError):
    """A request's deadline passed before its first token, or is no number of seconds."""


class UnavailableError(Qwen2VLError):
    """A service takes no more requests: it is full, closed, or has failed."""


class FeaturesError(Qwen2VLError):
    """Features cannot be written to their file."""


class CompareError(Qwen2VLError):
    """Two models cannot be compared, or a comparison cannot be written."""


class BenchmarkError(Qwen2VLError):
    """A benchmark cannot be run as asked."""


class MissingDependencyError(Qwen2VLError):
    """An optional package is not installed; the message names the extra that brings it."""


class PlanError(Qwen2VLError):
    """A deployment cannot be planned as asked."""


class BatchError(Qwen2VLError):
    """A batch job cannot be run as asked, or cannot go on."""
