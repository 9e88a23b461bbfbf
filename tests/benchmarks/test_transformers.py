"""Transformers in a process of its own, as a benchmark starts it: nothing there has made torchvision importable yet."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import torch
from pathlib import Path
from qwen2vl_trt.benchmarks.cases import Case
from qwen2vl_trt.benchmarks.transformers import TransformersSystem

system = TransformersSystem(Path("qwen2vl_trt/tiny/checkpoint"), "fp32", torch.float32, "cpu")
system.prepare(Case("pipeline", "small", ((56, 56),), generate=2))
print(len(system.run(2).samples))
"""


def test_the_pipeline_answers_in_a_fresh_process():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
