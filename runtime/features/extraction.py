"""Features of any number of images: decoded on CPU threads ahead of the engine, saved in shards that survive a kill."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from qwen2vl_trt.windows import Grid

from ..inputs.image_listing import ImageFile
from ..pipeline import Pipeline
from ..prefetcher import Job, Prefetcher
from ..preprocessing.sizes import Medium
from .sources import IMAGE_FAULTS, FeatureSource

Pool = Literal["mean", "none"]


@dataclass(frozen=True)
class Batching:
    """Bounds of a batch, and of what is held at once.

    Attributes:
        max_images: most images in one: of a call of the vision engine, or rows of the decoder's batch.
        max_tokens: most merged image tokens in one, unless a single image has more.
        workers: threads that decode.
    """

    max_images: int
    max_tokens: int
    workers: int

    @classmethod
    def of(cls, pipeline: Pipeline, source: str, max_tokens: int | None, workers: int) -> Batching:
        """What the engine that is the source (``vision`` or ``decoder``) takes, or so many tokens."""
        profile, unit = pipeline.profile, pipeline.engines.checkpoint.config.vision.merge_unit
        images = profile.max_num_seqs if source == "decoder" else profile.max_batch_size
        return cls(images, max_tokens or images * profile.max_hw_dims // unit, workers)


class Store:
    """Where features go; :class:`qwen2vl_trt.runtime.features.store.FeatureStore` is one.

    Attributes:
        failed: images without features.
        first_failure: why, of the first.
    """

    failed = 0
    first_failure: str | None = None

    @property
    def remaining(self) -> int:
        """Images that the current file still takes; a batch ends with it."""
        raise NotImplementedError

    def __contains__(self, key: str) -> bool:
        """Whether an image's features are safe on the disk."""
        return False

    def refusal(self, key: str) -> str | None:
        """Why nothing can be stored under a key, if so."""
        return None

    def add(self, key: str, grid: Grid, features: Tensor) -> None:
        """Add an image's features; raises FeaturesError where they, or earlier ones, cannot be written."""
        raise NotImplementedError

    def fail(self, key: str, reason: str) -> None:
        """Note that an image has no features, and why."""
        raise NotImplementedError

    def flush(self) -> None:
        """Write what has been added; FeaturesError where it cannot be written. What was saved before stays."""
        raise NotImplementedError


@dataclass
class Extraction:
    """How a run went.

    Attributes:
        extracted: images whose features this run made.
        resized: of these, resized to fit the engine.
        skipped: images whose features were there.
        seconds: the whole run.
        waited: of these, for images to be decoded.
        engine: of these, in the preprocessor and the engines.
    """

    extracted: int = 0
    resized: int = 0
    skipped: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    engine: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.extracted / self.seconds if self.seconds else 0.0


def extract_features(
    source: FeatureSource,
    images: Iterable[ImageFile],
    store: Store,
    batching: Batching,
    pool: Pool = "none",
    stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Extraction], None] = lambda state: None,
) -> Extraction:
    """Add the features of every image that the store does not hold yet; note in it what cannot be used.

    Memory does not grow with the number of images. Batches and shards follow from the order of the images alone, so a
    run that was killed and resumed computes the same batches as one that was not.

    Args:
        source: makes the features.
        images: in order.
        store: where they go.
        batching: bounds of what is held at once.
        pool: ``mean`` over an image's tokens (in FP32), or all of them.
        stop: asked between batches; once true, what is done is saved and the run ends.
        on_progress: told after each batch.

    Raises:
        FeaturesError: the store cannot be written.
        MediaError: the images cannot be listed.
        PromptError: the prompt is wrong, whatever the image.
    """
    run, began = Extraction(), time.perf_counter()
    batch: list[tuple[str, Medium]] = []
    tokens = 0

    def finish_batch() -> None:
        nonlocal tokens
        started = time.perf_counter()
        results = _extract_each(source, [image for _, image in batch]) if batch else []
        run.engine += time.perf_counter() - started
        for (key, image), features in zip(batch, results):
            if isinstance(features, Tensor):
                features = features.float().mean(0).to(features.dtype) if pool == "mean" else features
                store.add(key, image.size.grid, features.contiguous().cpu())
                run.extracted += 1
                run.resized += image.size.limited_by is not None
            else:
                store.fail(key, str(features))
        batch.clear()
        tokens = 0
        run.seconds = time.perf_counter() - began
        on_progress(run)

    with closing(Prefetcher(batching.workers, name="decode")) as prefetcher:
        decoded = decoded_images(source, _missing(images, store, run), batching, prefetcher)
        while True:
            started = time.perf_counter()
            item = next(decoded, None)
            run.waited += time.perf_counter() - started
            if item is None or stop():
                break
            key, image = item
            if isinstance(image, Exception):
                store.fail(key, str(image))
                continue
            if tokens + image.size.tokens > batching.max_tokens:
                finish_batch()
            batch.append((key, image))
            tokens += image.size.tokens
            if len(batch) == min(batching.max_images, store.remaining):
                finish_batch()
    if not stop():
        finish_batch()
    store.flush()
    run.seconds = time.perf_counter() - began
    return run


def decoded_images(
    source: FeatureSource, images: Iterator[tuple[int, ImageFile]], batching: Batching, prefetcher: Prefetcher
) -> Iterator[tuple[str, Medium | Exception]]:
    """The key of each image, in order, and its pixels or what is wrong with it; images come with their numbers.

    A batch for the engine and the next are decoded or being decoded; an image counts until the caller lets go of it.
    """
    jobs: deque[tuple[str, Job]] = deque()
    while True:
        while len(jobs) < 2 * max(batching.max_images, batching.workers):
            following = next(images, None)
            if following is None:
                break
            number, file = following
            name = f"image {number}"
            load, size = partial(_load, source, file.path, name), partial(source.size, file.path, name)
            jobs.append((file.key, prefetcher.submit(load, size)))
        if not jobs:
            return
        key, job = jobs.popleft()
        try:
            (image,) = job.future.result()
        except IMAGE_FAULTS as error:
            yield key, error
            continue
        prefetcher.hand_over(job, [image])
        del job
        yield key, image


def _load(source: FeatureSource, path: str, name: str) -> list[Medium]:
    return [source.load(path, name)]


def _missing(images: Iterable[ImageFile], store: Store, run: Extraction) -> Iterator[tuple[int, ImageFile]]:
    for number, image in enumerate(images, start=1):
        if image.key in store:
            run.skipped += 1
        elif (reason := store.refusal(image.key)) is not None:
            store.fail(image.key, f"image {number} ({image.path!r}): {reason}")
        else:
            yield number, image


def _extract_each(source: FeatureSource, images: list[Medium]) -> list[Tensor | Exception]:
    """Features of each image or what is wrong with it; the neighbours of a faulty one are not lost."""
    try:
        return list(source.extract(images))
    except IMAGE_FAULTS as error:
        if len(images) == 1:
            return [error]
        return [result for image in images for result in _extract_each(source, [image])]
