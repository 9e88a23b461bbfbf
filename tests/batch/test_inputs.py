"""What a job reads: folders, globs, tables and URIs, divided into partitions that stay the same."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen2vl_trt.batch.inputs import divide, find_input, read_partitions
from qwen2vl_trt.batch.rows import read_rows
from qwen2vl_trt.errors import BatchError, MediaError
from tests.batch.outputs import write_lines
from tests.support.media_files import save_images


def read(source, folder, rows=3, **columns):
    """Rows of each partition."""
    names = {"image": None, "prompt": None, "row_id": None} | columns
    given = find_input(str(source), **names)
    divide(given, rows, folder / "input")
    return [list(read_rows(partition, given.columns)) for partition in read_partitions(folder / "input")]


@pytest.fixture
def folder(tmp_path):
    images = save_images(tmp_path / "in", 5)
    (images / "more").mkdir()
    (images / "0004.png").rename(images / "more" / "z.PNG")
    (images / "notes.txt").touch()
    return images


@pytest.mark.parametrize("form", ["{}", "file://{}", "{}/**/*.[pP]*", "file://{}/**/*.[pP]*"])
def test_images_are_divided_in_order(form, folder, tmp_path):
    parts = read(form.format(folder), tmp_path)
    assert [[row.id for row in part] for part in parts] == [
        ["0000.png", "0001.png", "0002.png"],
        ["0003.png", "more/z.PNG"],
    ]
    scheme = "file://" if form.startswith("file") else ""
    assert parts[1][1].image == f"{scheme}{folder}/more/z.PNG"


def test_a_resumed_run_keeps_its_listing(folder, tmp_path):
    before = read(folder, tmp_path)
    (folder / "00.png").touch()
    columns = find_input(str(folder), None, None, None).columns
    assert [list(read_rows(p, columns)) for p in read_partitions(tmp_path / "input")] == before


def table(path, count=10, group=4, **columns):
    values = {"image": [f"{n}.png" for n in range(count)]} | columns
    pq.write_table(pa.table(values), path, row_group_size=group)
    return path


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 100])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_every_row_is_in_one_partition(kind, rows, tmp_path):
    ids = [f"id {n}" for n in range(10)]
    table(tmp_path / "a.parquet", id=ids)
    lines = [json.dumps({"image": f"{n}.png", "id": row_id}) for n, row_id in enumerate(ids)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))  # blank lines, and none at the end
    parts = read(tmp_path / f"a.{kind}", tmp_path, rows)
    assert [len(part) for part in parts] == [min(rows, 10 - first) for first in range(0, 10, rows)]
    found = [(row.id, row.image) for part in parts for row in part]
    assert found == [(row_id, f"{tmp_path}/{n}.png") for n, row_id in enumerate(ids)]


def test_large_row_groups_are_read_from_their_middle(tmp_path):
    parts = read(table(tmp_path / "a.parquet", 300, 300), tmp_path, 130)
    assert [row.id for part in parts for row in part] == [f"a.parquet:{n}" for n in range(300)]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_rows_of_several_tables_are_told_apart(scheme, tmp_path):
    (tmp_path / "b").mkdir()
    table(tmp_path / "a.parquet", 2)
    table(tmp_path / "b" / "a.parquet", 2)
    parts = read(f"{scheme}{tmp_path}/**/*.parquet", tmp_path, 9)
    assert [[row.id for row in part] for part in parts] == [
        ["a.parquet:0", "a.parquet:1"],
        ["b/a.parquet:0", "b/a.parquet:1"],
    ]
    assert parts[1][0].image == f"{scheme}{tmp_path}/b/0.png"


def test_forms_of_a_column(tmp_path):
    struct = pa.array([{"bytes": b"x", "path": None}, {"bytes": None, "path": "/a.png"}, None])
    pq.write_table(
        pa.table({"picture": struct, "question": ["why", None, "how"], "key": [1, 2, 3]}), tmp_path / "a.parquet"
    )
    names = {"image": "picture", "prompt": "question", "row_id": "key"}
    ((first, second, third),) = read(tmp_path / "a.parquet", tmp_path, **names)
    assert (first.id, first.image, first.prompt) == ("1", b"x", "why")
    assert (second.id, second.image, second.prompt) == ("2", "/a.png", None)
    assert third.fault == "the column 'picture' is empty"


def test_bad_lines_keep_their_place(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        [
            {"image": "s3://b/a.png", "prompt": "x"},
            "{torn",
            "[1]",
            {"image": 3},
            {"image": "a", "prompt": 1},
            {"other": 1},
        ],
    )
    parts = read(path, tmp_path, 2, prompt="prompt")
    found = [row for part in parts for row in part]
    assert [row.id for row in found] == [f"a.jsonl:{n}" for n in range(6)]
    assert found[0].image == "s3://b/a.png"
    assert found[1].fault.startswith("the line is not JSON")
    assert found[2].fault == "the line is not a JSON object"
    assert found[3].fault == "the column 'image' holds a int, not a path or bytes"
    assert found[4].fault == "the column 'prompt' holds a int, not text"
    assert found[5].fault == "the column 'image' is empty"


def test_ids_are_unique(tmp_path):
    (tmp_path / "b").mkdir()
    table(tmp_path / "a.parquet", 3, id=["x", "y", "z"])
    table(tmp_path / "b" / "a.parquet", 3, id=["u", "v", "y"])
    with pytest.raises(BatchError, match=r"the id 'y' is given 2 times \(a.parquet row 1, b/a.parquet row 2\)"):
        read(f"{tmp_path}/**/*.parquet", tmp_path)
    lines = write_lines(tmp_path / "a.jsonl", [{"image": "a", "id": 1}, {"image": "a", "id": "1"}])
    with pytest.raises(BatchError, match="the id '1' is given 2 times"):
        read(lines, tmp_path)
    with pytest.raises(BatchError, match="row 1 has no 'id'; every row needs one"):
        read(write_lines(tmp_path / "a.jsonl", [{"image": "a", "id": 1}, {"image": "a"}]), tmp_path)


def test_ids_of_bytes_and_columns_of_one_name(tmp_path):
    (part,) = read(table(tmp_path / "a.parquet", 2, id=[b"x", b"\xff"]), tmp_path)
    assert [row.id for row in part] == ["x", "\\udcff"]
    twice = pa.table([["1"], ["2"], ["a.png"]], names=["id", "id", "image"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(BatchError, match=r"twice\.parquet has 2 columns 'id'; one of them is to be read"):
        read(tmp_path / "twice.parquet", tmp_path)
    pq.write_table(pa.table([["1"], ["2"], ["a.png"]], names=["x", "x", "image"]), tmp_path / "twice.parquet")
    assert [[row.id for row in part] for part in read(tmp_path / "twice.parquet", tmp_path)] == [["twice.parquet:0"]]


def test_a_table_that_changes(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"image": "a"}] * 3)
    read(path, tmp_path)
    with path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(BatchError, match=r"a\.jsonl has changed since the run began; --overwrite starts again"):
        read_partitions(tmp_path / "input")


def test_what_cannot_be_read(folder, tmp_path):
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "empty.jsonl", [])
    table(tmp_path / "a.parquet")
    table(tmp_path / "none.parquet", 0)
    for source, columns, error, message in (
        ("", {}, MediaError, "the input is empty"),
        (tmp_path / "empty", {}, MediaError, r"no image there; a folder of tables is given as 'DIR/\*.parquet'"),
        (tmp_path / "no", {}, MediaError, "there is no such folder"),
        (f"file://{tmp_path}/no", {}, MediaError, "no image there"),
        (tmp_path / "no.parquet", {}, MediaError, "there is no such file"),
        (tmp_path / "no*.jsonl", {}, MediaError, "there is no such file"),
        ("nosuch://bucket/*.parquet", {}, MediaError, "cannot be opened"),
        (tmp_path / "damaged.parquet", {}, BatchError, "cannot be read"),
        (tmp_path / "empty.jsonl", {}, BatchError, "holds no JSON object"),
        (tmp_path / "none.parquet", {}, BatchError, "has no rows"),
        (tmp_path / "a.parquet", {"image": "url"}, BatchError, "no column 'url', it has image; name it with --image-"),
        (tmp_path / "a.parquet", {"row_id": "key"}, BatchError, "no column 'key', it has image; name it with --id-col"),
        (folder, {"image": "url"}, BatchError, "is images, not a table"),
    ):
        with pytest.raises(error, match=message):
            read(source, tmp_path, **columns)
    pq.write_table(pa.table({"url": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(BatchError, match=r"b\.parquet has no column 'image', which .*a\.parquet has"):
        read(tmp_path / "[ab].parquet", tmp_path)
