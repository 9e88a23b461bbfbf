"""Export touches no weight, however large."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_export_of_7b_widths_stays_far_below_the_weights(tmp_path):
    """A layer and two blocks of 7B's width, in a sparse file; the whole depth takes no more a layer."""
    done = subprocess.run(
        [sys.executable, "run.py", "bench", "export", "--layers", "1", "--blocks", "2", "--json"],
        check=True,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
    )
    found = json.loads(done.stdout)
    assert found["weights_mb"] > 2500
    assert found["peak_memory_mb"] < 1000
    assert found["written_mb"] < 0.1
