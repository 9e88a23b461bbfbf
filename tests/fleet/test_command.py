"""The command's options, what it refuses, and how it ends; workers run in the test's own process instead of Ray's."""

import sys
from contextlib import contextmanager
from dataclasses import asdict

import pytest

import fleet.cluster
import fleet.extra
import run
from fleet.cluster import connect
from fleet.worker import Worker
from qwen2vl_trt.errors import BatchError, FeaturesError, MediaError, MissingDependencyError, SamplingError
from tests.fleet.outputs import failures, rows, write_lines
from tests.support.media_files import save_images


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """Ray's place is taken by a loop; what it was asked for is kept."""
    asked = {}

    @contextmanager
    def local(address, num_cpus):
        asked.update(address=address, num_cpus=num_cpus)
        yield {"CPU": 2.0, **asked.get("resources", {})}

    def run_partitions(partitions, settings, num_cpus, num_gpus):
        asked.update(settings=settings, worker_cpus=num_cpus, worker_gpus=num_gpus)
        worker = Worker(settings)
        for partition in partitions:
            answer = worker(asdict(partition))
            if answer["fatal"]:
                raise BatchError(answer["fatal"])
            yield answer

    monkeypatch.setattr(fleet.cluster, "connect", local)
    monkeypatch.setattr(fleet.cluster, "run_partitions", run_partitions)
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
        run.batch([str(option) for option in options])

    return command


def test_a_run_and_how_it_goes_on(batch, images, tmp_path, capsys):
    (images / "0007.png").write_text("no image")
    batch("--input", images, "--partition-rows", 4)
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
    with pytest.raises(BatchError, match="--resume goes on with it, --overwrite starts again"):
        batch("--input", images, "--partition-rows", 4)
    batch("--input", images, "--partition-rows", 4, "--resume")
    assert "out: 3 rows, 6 were there, " in capsys.readouterr().err
    assert rows(tmp_path / "out") == before
    batch("--input", images, "--partition-rows", 4, "--resume")
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
    batch("--input", images, "--partition-rows", 4)
    for changed, message in (
        (("--pool", "mean"), "begun with pool 'none', this run has 'mean'"),
        (("--partition-rows", 5), "begun with partition_rows 4, this run has 5"),
        (("--max-pixels", 9408), "begun with max_pixels"),
        (("--decode", "gpu"), "begun with decode 'cpu', this run has 'gpu'"),
        (("--source", "decoder", "--prompt", "x"), "begun with prompt None, this run has 'x'"),
        (("--input", save_images(tmp_path / "other", 1)), "begun with input"),
    ):
        with pytest.raises(FeaturesError, match=message):
            batch("--input", images, "--partition-rows", 4, "--resume", *changed)
    with pytest.raises(FeaturesError, match="begun with generation_config None, this run has 'auto'"):
        batch("--input", images, "--partition-rows", 4, "--resume", "--prompt", "x", task="generate")


def test_an_interrupted_job_goes_on_where_it_was(batch, images, tmp_path, monkeypatch, capsys):
    run_partitions = fleet.cluster.run_partitions

    def interrupted(partitions, *rest):
        yield from run_partitions(partitions[:2], *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(fleet.cluster, "run_partitions", interrupted)
    with pytest.raises(SystemExit) as end:
        batch("--input", images, "--partition-rows", 4)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted: 8 rows are saved; run again with --resume to go on\n"
    monkeypatch.setattr(fleet.cluster, "run_partitions", run_partitions)
    batch("--input", images, "--partition-rows", 4, "--resume")
    assert len(rows(tmp_path / "out")) == 10


def test_a_prompt_is_a_column_or_one_for_all(batch, images, tmp_path):
    table = write_lines(tmp_path / "a.jsonl", [{"picture": f"in/{n:04d}.png", "ask": f"{n}?"} for n in range(3)])
    batch("--input", table, "--image-column", "picture", "--prompt-column", "ask", "--max-tokens", 3, task="generate")
    assert [row["prompt"] for row in rows(tmp_path / "out").values()] == ["0?", "1?", "2?"]
    assert list(rows(tmp_path / "out")) == [f"a.jsonl:{n}" for n in range(3)]
    batch("--input", images, "--prompt", "Why?", "--max-tokens", 3, "--overwrite", task="generate")
    assert {row["prompt"] for row in rows(tmp_path / "out").values()} == {"Why?"}


def test_workers_get_the_cores_and_gpus_that_are_asked_for(batch, images, tmp_path, no_ray):
    batch("--input", images, "--num-workers", 8, "--partition-rows", 4, "--cpus-per-worker", 3)
    assert (no_ray["settings"].workers, no_ray["worker_cpus"], no_ray["settings"].threads) == (3, 3, 3)  # 3 partitions
    assert no_ray["num_cpus"] >= 9
    assert no_ray["worker_gpus"] == 0
    no_ray["resources"] = {"GPU": 1.0}
    batch("--input", images, "--overwrite", "--num-workers", 2, "--partition-rows", 5, "--gpus-per-worker", 0.5)
    assert no_ray["worker_gpus"] == 0.5
    batch("--input", images, "--overwrite")
    assert no_ray["worker_gpus"] == 0  # --device cpu
    with pytest.raises(
        BatchError, match="2 workers of 1 GPUs need 2, Ray has 1: give fewer --num-workers or a smaller"
    ):
        batch("--input", images, "--overwrite", "--num-workers", 2, "--partition-rows", 5, device=())
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
        ((*given, "--output", tmp_path / "file"), BatchError, "is a file; name a folder"),
        ((*given, "--output", tmp_path / "no" / "out"), BatchError, "there is no folder"),
        ((*given, "--prompt", "x"), BatchError, "are for --task generate and --source decoder"),
        ((*given, "--source", "decoder"), BatchError, "every row needs a prompt: give --prompt TEXT, or a table"),
        ((*given, "--task", "generate"), BatchError, "every row needs a prompt"),
        ((*given, "--task", "generate", "--prompt", "x", "--pool", "mean"), BatchError, "are for --task features"),
        ((*given, "--max-tokens", 5), BatchError, "are for --task generate"),
        ((*given, "--task", "generate", "--prompt", "x", "--top-p", 2), SamplingError, "top_p is 2"),
        ((*given, "--gpus-per-worker", 1.5), BatchError, "give a share of one GPU, up to 1, or a whole number"),
        ((*given, "--gpus-per-worker", -1), BatchError, "give a share of one GPU"),
        ((*given, "--max-retries", -1), BatchError, "--max-retries -1: give 0 or more"),
        ((*given, "--layer", 9), BatchError, "has layers 1 to 4"),
    ):
        with pytest.raises(error, match=message):
            batch(*options)
    for options in (("--num-workers", 0), ("--task", "train"), ("--resume", "--overwrite")):
        with pytest.raises(SystemExit):
            batch(*given, *options)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the superuser may write anywhere
    with pytest.raises(BatchError, match="read-only"):
        batch(*given, output=tmp_path / "new")


def test_two_runs_exclude_each_other(batch, images, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(BatchError, match="another run is writing there"):
        batch("--input", images)


def test_ray_is_not_installed(batch, images, monkeypatch):
    monkeypatch.setattr(fleet.extra, "find_spec", lambda name: None if name == "ray" else name)
    with pytest.raises(
        MissingDependencyError, match=r"needs ray, which is not installed: pip install 'qwen2vl-trt\[ray\]'"
    ):
        batch("--input", images)


def test_there_is_no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    with pytest.raises(BatchError, match="--address auto: no Ray cluster there"), connect("auto", 1):
        pass
    assert not sys.modules["ray"].is_initialized()
