"""The command's options, what it refuses, and how it ends; workers run in the test's own process instead of Ray's."""

import os
import sys
from dataclasses import asdict

import pytest

import qwen2vl_trt.batch.driver
from qwen2vl_trt.batch.ray_driver import connect
from qwen2vl_trt.batch.worker import Worker
from qwen2vl_trt.commands import call
from qwen2vl_trt.errors import BatchError, FeaturesError, MediaError, MissingDependencyError, SamplingError
from tests.batch.outputs import failures, rows, write_lines
from tests.support.media_files import save_images


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """The place of Ray's driver is taken by a loop; what it was asked for is kept."""
    asked = {}

    class Loop:
        def __init__(self, address, num_cpus):
            asked.update(address=address, num_cpus=num_cpus)
            self.resources = {"CPU": 2.0, **asked.get("resources", {})}

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def run(self, partitions, settings, num_cpus, num_gpus):
            asked.update(settings=settings, worker_cpus=num_cpus, worker_gpus=num_gpus)
            worker = Worker(settings)
            for partition in partitions:
                answer = worker(asdict(partition))
                if answer["fatal"]:
                    raise BatchError(answer["fatal"])
                yield answer

    monkeypatch.setattr(qwen2vl_trt.batch.driver, "Driver", Loop)
    return asked


@pytest.fixture
def images(tmp_path):
    return save_images(tmp_path / "in", 10)


@pytest.fixture
def batch(engine_dir, tmp_path):
    def command(*options, device=("--device", "cpu"), output=tmp_path / "out", task="features"):
        options = (
            "--engine-dir",
            engine_dir,
            "--output",
            output,
            "--task",
            task,
            *device,
            "--cpus-per-worker",
            1,
            *options,
        )
        call("batch", [str(option) for option in options])

    return command


def test_a_run_and_how_it_goes_on(batch, images, tmp_path, capsys):
    (images / "0007.png").write_text("no image")
    batch("--input", images, "--shard-size", 4)
    said = capsys.readouterr()
    assert said.out == ""
    assert "out: 9 rows, " in said.err
    assert f"warning: 1 rows could not be used: see {tmp_path / 'out' / 'errors'}" in said.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != ".lock") == [
        "data",
        "errors",
        "input",
        "settings.json",
    ]
    before = rows(tmp_path / "out")
    (tmp_path / "out" / "data" / "part-00001.parquet").unlink()
    with pytest.raises(FeaturesError, match="--resume goes on with it, --overwrite starts again"):
        batch("--input", images, "--shard-size", 4)
    batch("--input", images, "--shard-size", 4, "--resume")
    assert "out: 3 rows, 6 were there, " in capsys.readouterr().err
    assert rows(tmp_path / "out") == before
    batch("--input", images, "--shard-size", 4, "--resume")
    assert "out: 0 rows, 9 were there\n" in capsys.readouterr().err
    assert list(failures(tmp_path / "out")) == ["0007.png"]
    batch("--input", save_images(tmp_path / "other", 2), "--overwrite")
    assert list(rows(tmp_path / "out")) == ["0000.png", "0001.png"]
    assert not failures(tmp_path / "out")


def test_jpeg_files_decoded_on_a_gpu_need_one(batch, images):
    with pytest.raises(BatchError, match=r"--decode gpu\) needs a GPU, and the engines run on cpu"):
        batch("--input", images, "--decode", "gpu")  # said by the workers: their machines may have other devices


def test_resume_where_nothing_is_begins(batch, images, tmp_path):
    batch("--input", images, "--resume")
    assert len(rows(tmp_path / "out")) == 10


def test_a_resumed_run_must_be_the_same(batch, images, tmp_path):
    batch("--input", images, "--shard-size", 4)
    for changed, message in (
        (("--pool", "mean"), "begun with pool 'none', this run has 'mean'"),
        (("--shard-size", 5), "begun with shard_size 4, this run has 5"),
        (("--max-pixels", 9408), "begun with max_pixels"),
        (("--image-pixel-limit", 99999), "begun with image_pixel_limit 100000000, this run has 99999"),
        (("--decode", "gpu"), "begun with decode 'cpu', this run has 'gpu'"),
        (("--source", "decoder", "--prompt", "x"), "begun with prompt None, this run has 'x'"),
        (("--input", save_images(tmp_path / "other", 1)), "begun with input"),
    ):
        with pytest.raises(FeaturesError, match=message):
            batch("--input", images, "--shard-size", 4, "--resume", *changed)
    with pytest.raises(FeaturesError, match="begun with generation_config None, this run has 'auto'"):
        batch("--input", images, "--shard-size", 4, "--resume", "--prompt", "x", task="generate")


def test_an_interrupted_job_goes_on_where_it_was(batch, images, tmp_path, monkeypatch, capsys):
    """What it says is what the output holds: a worker is a partition ahead of what the driver was told."""
    run_all = qwen2vl_trt.batch.driver.Driver.run

    def interrupted(self, partitions, *rest):
        told = run_all(self, partitions[:2], *rest)
        yield next(told)
        next(told)
        raise KeyboardInterrupt

    monkeypatch.setattr(qwen2vl_trt.batch.driver.Driver, "run", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"^8 rows are saved; run again with --resume to go on$"):
        batch("--input", images, "--shard-size", 4)
    assert len(rows(tmp_path / "out")) == 8
    assert not (tmp_path / "out" / ".work").exists()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(qwen2vl_trt.batch.driver.Driver, "run", run_all)
    batch("--input", images, "--shard-size", 4, "--resume")
    assert len(rows(tmp_path / "out")) == 10


def test_a_prompt_is_a_column_or_one_for_all(batch, images, tmp_path):
    table = write_lines(tmp_path / "a.jsonl", [{"picture": f"in/{n:04d}.png", "ask": f"{n}?"} for n in range(3)])
    batch("--input", table, "--image-column", "picture", "--prompt-column", "ask", "--max-tokens", 3, task="generate")
    assert [row["prompt"] for row in rows(tmp_path / "out").values()] == ["0?", "1?", "2?"]
    assert list(rows(tmp_path / "out")) == [f"a.jsonl:{n}" for n in range(3)]
    batch("--input", images, "--prompt", "Why?", "--max-tokens", 3, "--overwrite", task="generate")
    assert {row["prompt"] for row in rows(tmp_path / "out").values()} == {"Why?"}


def test_workers_get_the_cores_and_gpus_that_are_asked_for(batch, images, tmp_path, no_ray):
    batch("--input", images, "--workers", 8, "--shard-size", 4, "--cpus-per-worker", 3)
    assert (no_ray["settings"].workers, no_ray["worker_cpus"], no_ray["settings"].threads) == (3, 3, 3)  # 3 partitions
    assert no_ray["num_cpus"] >= 9
    assert no_ray["worker_gpus"] == 0
    no_ray["resources"] = {"GPU": 1.0}
    batch("--input", images, "--overwrite", "--workers", 2, "--shard-size", 5, "--gpus-per-worker", 0.5)
    assert no_ray["worker_gpus"] == 0.5
    batch("--input", images, "--overwrite")
    assert no_ray["worker_gpus"] == 0  # --device cpu
    with pytest.raises(BatchError, match="2 workers of 1 GPUs need 2, Ray has 1: give fewer --workers or a smaller"):
        batch("--input", images, "--overwrite", "--workers", 2, "--shard-size", 5, device=())
    no_ray["resources"] = {}
    batch("--input", images, "--overwrite", device=())
    assert no_ray["settings"].device == "cpu"  # what Ray gives a worker without GPUs


def test_no_good_row_at_all(batch, tmp_path):
    table = write_lines(tmp_path / "a.jsonl", [{"image": "no.png"}, {"image": None}])
    with pytest.raises(BatchError, match=r"none of the 2 rows could be used; the first: row a\.jsonl:0 .*no such file"):
        batch("--input", table)
    assert len(failures(tmp_path / "out")) == 2


def test_what_is_refused_before_the_work(batch, images, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    given = ("--input", images)
    for options, error, message in (
        (("--input", tmp_path / "empty"), MediaError, "no image there"),
        ((*given, "--output", tmp_path / "no" / "out"), FeaturesError, "there is no folder"),
        ((*given, "--prompt", "x"), BatchError, "are for --task generate and --source decoder"),
        ((*given, "--source", "decoder"), BatchError, "every row needs a prompt: give --prompt TEXT, or a table"),
        ((*given, "--task", "generate"), BatchError, "every row needs a prompt"),
        ((*given, "--task", "generate", "--prompt", "x", "--pool", "mean"), BatchError, "are for --task features"),
        ((*given, "--max-tokens", 5), BatchError, "are for --task generate"),
        ((*given, "--task", "generate", "--prompt", "x", "--top-p", 2), SamplingError, "top_p is 2"),
        ((*given, "--gpus-per-worker", 1.5), BatchError, "give a share of one GPU, up to 1, or a whole number"),
        ((*given, "--gpus-per-worker", -1), BatchError, "give a share of one GPU"),
        ((*given, "--max-retries", -1), BatchError, "--max-retries -1: give 0 or more"),
        ((*given, "--layer", 9), BatchError, "has layers 1 to 2"),
    ):
        with pytest.raises(error, match=message):
            batch(*options)
    for options in (("--workers", 0), ("--task", "train"), ("--resume", "--overwrite")):
        with pytest.raises(SystemExit):
            batch(*given, *options)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the superuser may write anywhere
    with pytest.raises(FeaturesError, match="read-only"):
        batch(*given, output=tmp_path / "new")


def test_a_worker_that_lives_on_adds_nothing_to_what_was_counted(batch, images, tmp_path, monkeypatch):
    """On another machine of a cluster it ends later than the command."""
    left = []

    def interrupted(self, partitions, settings, *rest):
        worker = Worker(settings)
        worker(asdict(partitions[0]))
        link, left[:] = os.link, [lambda: worker(asdict(partitions[1]))]
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
        try:
            left[0]()  # its attempt is written, and not yet linked
        finally:
            monkeypatch.setattr(os, "link", link)
        yield

    monkeypatch.setattr(qwen2vl_trt.batch.driver.Driver, "run", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"^4 rows are saved"):
        batch("--input", images, "--shard-size", 4)
    assert "cannot be written" in left[0]()["fatal"]
    assert len(rows(tmp_path / "out")) == 4


def test_what_lies_in_the_folder_and_is_passed_over(batch, images, tmp_path, capsys):
    for name in ("1.xcf", "2.xcf", "notes.txt"):
        (images / name).touch()
    for form in (str(images), f"file://{images}"):
        batch("--input", form, "--overwrite")
        assert capsys.readouterr().err.startswith("passed over: 2 .xcf, 1 .txt\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "1.xcf").touch()
    with pytest.raises(MediaError, match=r"other: no image there, but 1 \.xcf; a folder of tables is given as"):
        batch("--input", tmp_path / "other", "--overwrite")


def test_whatever_an_image_or_a_row_is_called(batch, pipeline, images, tmp_path):
    """Each is in the output under one id, which every reader of Parquet and JSON takes."""
    names = ["__metadata__", "a\nb.png", "\x7f\u2028.png", "\u00e9.png", "e\u0301.png", "\\udcff.png", "\udcff.png"]
    content = (images / "0000.png").read_bytes()
    (expected,) = pipeline.embed_images([content])
    (tmp_path / "odd").mkdir()
    for name in names:
        (tmp_path / "odd" / name).write_bytes(content)
    (tmp_path / "odd" / "bad\udcfe.png").write_text("no image")
    batch("--input", tmp_path / "odd" / "*")
    assert sorted(rows(tmp_path / "out")) == sorted([*names[:-2], "\\\\udcff.png", "\\udcff.png"])
    assert {tuple(row["features"]) for row in rows(tmp_path / "out").values()} == {tuple(expected.flatten().tolist())}
    assert list(failures(tmp_path / "out")) == ["bad\\udcfe.png"]
    ids = ["", "__metadata__", "a\n", "\ud800", "\udcff", "é", "e\u0301", "x" * 200_000]
    table = tmp_path / "rows\udcff.jsonl"
    write_lines(table, [{"id": row, "image": "in/0000.png"} for row in ids] + [{"id": "\ud801", "image": "no"}])
    batch("--input", table, "--overwrite")
    assert sorted(rows(tmp_path / "out")) == sorted([*ids[:3], "\\ud800", "\\udcff", *ids[5:]])
    assert list(failures(tmp_path / "out")) == ["\\ud801"]
    write_lines(table, [{"image": "in/0000.png"}, {"image": "no"}])
    batch("--input", table, "--overwrite")
    assert list(rows(tmp_path / "out")) == ["rows\\udcff.jsonl:0"]
    assert list(failures(tmp_path / "out")) == ["rows\\udcff.jsonl:1"]
    batch("--input", table, "--resume")
    with pytest.raises(BatchError, match="is not valid UTF-8, which Parquet files need"):
        batch("--input", images, output=tmp_path / "out\udcff")


def test_two_runs_exclude_each_other(batch, images, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(FeaturesError, match="another run is writing there"):
        batch("--input", images)


def test_ray_is_not_installed(batch, images, monkeypatch):
    monkeypatch.setattr("qwen2vl_trt.errors.find_spec", lambda name: None if name == "ray" else name)
    with pytest.raises(MissingDependencyError, match=r"needs ray, which is not installed: pip install -e '.*\[ray\]'"):
        batch("--input", images)


def test_there_is_no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    with pytest.raises(BatchError, match="no Ray cluster at auto"), connect("auto", 1):
        pass
    assert not sys.modules["ray"].is_initialized()
