"""Where features go, and whether they may."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2vl_trt.errors import FeaturesError

from .shards import merge_shards
from .store import ERRORS, FeatureStore, IfExists, holds_features, in_the_way, open_store


@dataclass(frozen=True)
class Output:
    """Where features go: a folder of shards, or one safetensors file that is joined from shards at the end."""

    path: Path

    @property
    def is_file(self) -> bool:
        return self.path.suffix == ".safetensors"

    @property
    def folder(self) -> Path:
        """Where the shards are; of a file, beside it until it is whole."""
        return self.path.with_name(f"{self.path.name}.parts") if self.is_file else self.path

    @property
    def errors(self) -> Path:
        """Where the images that could not be used are named."""
        return self.path.with_suffix(".errors.jsonl") if self.is_file else self.path / ERRORS

    def check(self, if_exists: IfExists) -> None:
        """See before the work whether it can be written.

        Raises:
            FeaturesError: the folder above is missing or read-only, a file is where a folder belongs or the other
                way round, or an earlier run's features are in the way.
        """
        if self.is_file and self.path.is_dir():
            raise FeaturesError(f"{self.path} is a folder; a name that ends in .safetensors is for a file")
        if not self.is_file and self.path.exists() and not self.path.is_dir():
            raise FeaturesError(f"{self.path} is a file; name a folder, or a file that ends in .safetensors")
        if not self.path.parent.is_dir():
            raise FeaturesError(f"{self.path} cannot be written: there is no folder {self.path.parent}")
        target = self.path if self.path.is_dir() else self.path.parent
        if not os.access(target, os.W_OK):
            raise FeaturesError(f"{self.path} cannot be written: the folder {target} is read-only")
        if if_exists == "refuse" and holds_features(self.folder):
            raise FeaturesError(in_the_way(self.path))
        if self.is_file and self.path.exists() and not holds_features(self.folder) and if_exists != "overwrite":
            raise FeaturesError(f"{self.path} exists already; --overwrite makes it again")

    @contextmanager
    def open(self, settings: dict[str, Any], if_exists: IfExists, shard_size: int) -> Iterator[FeatureStore]:
        """The store to fill; see :func:`qwen2vl_trt.runtime.features.store.open_store`."""
        with open_store(self.folder, settings, if_exists, shard_size) as store:
            yield store

    def finish(self, store: FeatureStore) -> None:
        """After a run that was not stopped, while the store is open: of a file, join the shards and remove them.

        Raises:
            FeaturesError: it cannot be written.
        """
        if not self.is_file:
            return
        self.errors.unlink(missing_ok=True)
        if store.failed:
            shutil.copyfile(self.folder / ERRORS, self.errors)
        if store.saved:
            merge_shards(self.folder, self.path)
        shutil.rmtree(self.folder)
