"""Writes what the graphs are given, in the forms that `polygraphy run` and `trtexec` load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from polygraphy.json import save_json
from torch import Tensor

from qwen2vl_trt.errors import CompareError, reason
from qwen2vl_trt.runtime.backends.runners import Engines


class SavedInputs:
    """Collects the inputs of both graphs as an engine runs, then writes them.

    A folder gets, for each graph, ``vision.json``, a list of feed dictionaries for Polygraphy's ``--load-inputs``, and
    ``vision/000/NAME.bin``, the same as raw bytes for ``trtexec --loadInputs``, with ``trtexec.txt`` beside them: the
    two options as they are to be typed in that folder.

    Args:
        folder: made if missing.
        engines: which are about to run; BF16 inputs become PyTorch tensors, NumPy has no such type.

    Raises:
        CompareError: the engine has no graphs, or the folder cannot be made.
    """

    def __init__(self, folder: Path, engines: Engines) -> None:
        self._folder = folder
        self._feeds: dict[str, list[dict[str, Tensor]]] = {}
        if "vision.onnx" not in engines.manifest.files:
            raise CompareError(f"--save-inputs: {engines.folder} has no ONNX graphs; backend onnxruntime has")
        self._capacity = (
            engines.manifest.profile.max_seq_len if engines.backend.plans else None
        )  # static in TensorRT's graph
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CompareError(f"{folder} cannot be made: {reason(error)}") from None

    def __call__(self, graph: str, inputs: dict[str, Tensor]) -> None:
        """Keep a copy of a graph's inputs."""
        feed = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in inputs.items()}
        if self._capacity is not None:
            feed = {name: _padded(t, self._capacity) if "_cache_" in name else t for name, t in feed.items()}
        self._feeds.setdefault(graph, []).append(feed)

    def write(self) -> None:
        """Write everything.

        Raises:
            CompareError: a file cannot be written.
        """
        try:
            for graph, feeds in self._feeds.items():
                save_json(
                    [{n: _array(t) for n, t in feed.items()} for feed in feeds], str(self._folder / f"{graph}.json")
                )
                for number, feed in enumerate(feeds):
                    self._write_raw(self._folder / graph / f"{number:03d}", feed)
        except OSError as error:
            raise CompareError(f"{error.filename or self._folder} cannot be written: {error.strerror}") from None

    def _write_raw(self, folder: Path, feed: dict[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensor in feed.items():
            (folder / f"{name}.bin").write_bytes(tensor.view(torch.uint8).numpy().tobytes())
        shapes = ",".join(f"{name}:{'x'.join(map(str, tensor.shape))}" for name, tensor in feed.items())
        files = ",".join(f"{name}:{name}.bin" for name in feed)
        (folder / "trtexec.txt").write_text(f"--shapes={shapes}\n--loadInputs={files}\n", encoding="utf-8")


def _array(tensor: Tensor) -> np.ndarray | Tensor:
    return tensor if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _padded(cache: Tensor, capacity: int) -> Tensor:
    return torch.nn.functional.pad(cache, (0, 0, 0, capacity - cache.shape[2]))
