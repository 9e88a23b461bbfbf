"""Ours beside others on the CPU at hand: decode, prefill, vision, a request, the start and memory, on one thread.

Weights are random, of a published shape with few layers, so nothing is downloaded. Each round starts every system in a
process of its own, one after the other, and runs every case once in it. Figures are medians over the rounds, in CPU
seconds, which other processes disturb less than the clock. The checkpoint of 3B's shape takes 1.5 GB in ``--work``, and
each model that a peer converts as much again, or twice that.

    benchmarks/peers/__main__.py --ours onnxruntime:fp32 torch:bf16 --transformers fp32 bf16

Transformers runs in our environment. Another peer has an environment of its own, named by its interpreter; one that is
not named is left out, and the report says so.

OpenVINO GenAI (``--openvino-python E/bin/python --openvino fp32 int8``), for which the first run converts the model:

    python3 -m venv E
    E/bin/pip install torch==2.13.0 "optimum-intel[openvino]" openvino openvino-genai transformers==5.0.0 pillow

llama.cpp, onnxruntime-genai and vLLM are not in it yet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
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
    """What is run: an interpreter, a script beside this one, and what it is given."""

    name: str
    python: str
    script: str
    given: dict[str, Any]


def main() -> None:
    """Measure, and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ours", nargs="*", default=["onnxruntime:fp32", "torch:fp32"], metavar="BACKEND:PRECISION",
        help="default %(default)s",
    )  # fmt: skip
    parser.add_argument("--transformers", nargs="*", default=["fp32"], choices=["fp32", "bf16"], help="default fp32")
    parser.add_argument("--openvino-python", type=Path, metavar="PYTHON", help="of an environment with OpenVINO GenAI")
    parser.add_argument("--openvino", nargs="*", default=["fp32", "int8"], choices=["fp32", "int8", "int4"])
    parser.add_argument("--shape", choices=SHAPES, default="Qwen2.5-VL-3B", help="default %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder; default %(default)s")
    parser.add_argument("--blocks", type=int, default=4, help="of the vision tower; default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--work", type=Path, default=Path("artifacts/peers"), help="default %(default)s")
    arguments = parser.parse_args()

    work = arguments.work.resolve()
    missing = not (work / "known").exists()
    model = random_checkpoint(arguments.shape, arguments.layers, arguments.blocks, work)
    if missing:
        answer_with_known_tokens(model)
        (work / "known").touch()
    given = {"model": str(model), "images": _images(work), "batches": BATCHES}
    given |= {"text": WORD * (298 - 258 - 9), "long": WORD * (1034 - 9)}
    peers = _peers(arguments, model, work, given)

    found: dict[str, list[dict[str, float]]] = {peer.name: [] for peer in peers}
    versions: dict[str, str] = {}
    for number in range(arguments.rounds):
        for peer in peers:
            one = _run(peer)
            found[peer.name].append(one["found"])
            versions |= one["versions"]
            print(f"round {number + 1}, {peer.name}: {one['found']}", file=sys.stderr, flush=True)
    _report(found, versions, arguments)


def _images(work: Path) -> list[str]:
    paths = [work / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        noise = np.random.default_rng(number).integers(0, 256, (448, 448, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return [str(path) for path in paths]


def _peers(arguments: argparse.Namespace, model: Path, work: Path, given: dict[str, Any]) -> list[Peer]:
    """Ours and theirs, with engines built and models converted."""
    peers = []
    for name in arguments.ours:
        backend, _, precision = name.partition(":")
        folder = work / f"{model.name}-{backend}-{precision}"
        build = [sys.executable, ROOT / "build_engines.py", "--model", model, "--engine-dir", folder]
        build += ["--backend", backend, "--precision", precision, "--max-batch-size", 8, "--max-hw-dims", 1024]
        build += ["--max-num-seqs", max(BATCHES), "--max-input-len", 1536, "--max-seq-len", 2048]
        build += ["--quant-method", "rtn"] if precision == "int4" else []  # AWQ has nothing to gain on random weights
        subprocess.run([*map(str, build)], check=True, stdout=sys.stderr)
        peers.append(Peer(f"ours, {backend} {precision}", sys.executable, "ours.py", given | {"folder": str(folder)}))
    for precision in arguments.transformers:
        own = given | {"precision": precision}
        peers.append(Peer(f"Transformers {precision}", sys.executable, "transformers_peer.py", own))
    if arguments.openvino_python is not None:
        for precision in arguments.openvino:
            folder, python, script = (
                work / f"{model.name}-openvino-{precision}",
                str(arguments.openvino_python),
                "openvino_peer.py",
            )
            if not folder.exists():
                command = [python, str(HERE / script), "--convert", str(model), precision, str(folder)]
                subprocess.run(command, check=True, stdout=sys.stderr, env=_environment())
            own = given | {"precision": precision, "folder": str(folder)}
            peers.append(Peer(f"OpenVINO GenAI {precision}", python, script, own))
    return peers


def _environment() -> dict[str, str]:
    """One thread, no hub, none of our packages."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | one | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _run(peer: Peer) -> dict[str, Any]:
    command = [peer.python, str(HERE / peer.script), json.dumps(peer.given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=_environment())
    if done.returncode:
        raise SystemExit(f"error: {peer.name} failed with code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _report(found: dict[str, list[dict[str, float]]], versions: dict[str, str], arguments: argparse.Namespace) -> None:
    import torch

    facts = machine(torch.device("cpu"), "onnxruntime")
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    facts |= {"threads": 1, "instructions": " ".join(name for name in INSTRUCTIONS if name in flags)}
    print(one_line(facts | versions))
    print(
        f"{arguments.shape}, {arguments.layers} layers, {arguments.blocks} vision blocks; medians of {arguments.rounds}"
    )
    if arguments.openvino_python is None:
        print("OpenVINO GenAI is left out: no --openvino-python")
    print(f"\n| | {' | '.join(found)} |\n| --- |{' --- |' * len(found)}")
    for key, (title, digits) in ROWS.items():
        cells = []
        for rounds in found.values():
            values = [one[key] for one in rounds if key in one]
            cells.append(f"{median(values):,.{digits}f}" if values else "")
        print(f"| {title} | {' | '.join(cells)} |")
    for name, rounds in found.items():
        if (rounds[0]["tokens"], rounds[0]["short"]) != (1034, 40):
            print(f"{name} read prompts of {rounds[0]['tokens']} and {rounds[0]['short']} tokens, not of 1,034 and 40")


if __name__ == "__main__":
    main()
