"""Reading what a batch job wrote, and writing what it reads."""

import json

import numpy as np
import pyarrow.parquet as pq
from PIL import Image


def save_images(folder, count, sizes=((56, 84), (112, 140), (60, 100))):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png", compress_level=0)
    return folder


def rows(output):
    """Every row of the output by id; an id that is there twice fails."""
    found = {}
    for path in sorted((output / "data").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            assert row["id"] not in found, f"{row['id']} is there twice"
            found[row["id"]] = row
    return found


def failures(output):
    """Reason by id of every bad row; an id that is there twice, or that has a result too, fails."""
    found = {}
    for path in sorted((output / "errors").glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            assert line["id"] not in found
            found[line["id"]] = line["error"]
    assert not set(found) & set(rows(output))
    return found


def write_lines(path, values):
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return path
