"""Reading what a batch job wrote, and writing the lines that it reads."""

import json

import pyarrow.parquet as pq


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
        for line in map(json.loads, path.read_bytes().splitlines()):
            json.dumps(line, ensure_ascii=False).encode()  # valid Unicode
            assert line["id"] not in found
            found[line["id"]] = line["error"]
    assert not set(found) & set(rows(output))
    return found


def write_lines(path, values):
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return path
