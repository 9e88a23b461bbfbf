"""One worker, without Ray: its numbers, its files, and what it does about bad rows and where memory ends."""

import errno

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from qwen2vl_trt import Request, SamplingParams
from qwen2vl_trt.batch.journal import Journal
from qwen2vl_trt.batch.partition_file import data_path, errors_path, read_done
from qwen2vl_trt.commands import features
from qwen2vl_trt.errors import BatchError, FeaturesError
from tests.batch.outputs import failures, rows, write_lines
from tests.support.bounds import FP32, FP32_BEHIND_BOTH
from tests.support.media_files import save_images
from tests.support.models import relative_error

PROMPT = "What digits are in the image?"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 20 images."""
    return save_images(tmp_path_factory.mktemp("images") / "in", 20)


def single_process(pipeline, folder, output, *options):
    """Features as `run.py features` makes them, by image."""
    from safetensors.torch import load_file

    from qwen2vl_trt.commands.options import Parser
    from qwen2vl_trt.runtime.features.shards import shard_paths

    parser = Parser()
    features.add_arguments(parser)
    arguments = parser.parse_args(["--input", str(folder), "--output", str(output), *options])
    features.run(arguments, lambda _: pipeline)
    return {key: value for path in shard_paths(output) for key, value in load_file(path).items()}


def tensor(row):
    return torch.tensor(row["features"]).view(row["shape"]).to(getattr(torch, row["dtype"]))


@pytest.mark.parametrize("pool", ["none", "mean"])
def test_features_are_those_of_the_single_process(job, pipeline, images, tmp_path, pool):
    batch = job(images, pool=pool)
    assert [answer["saved"] for answer in batch.run()] == [8, 8, 4]
    found = rows(batch.output)
    expected = single_process(pipeline, images, tmp_path / "single", "--pool", pool, "--shard-size", "8")
    assert list(found) == list(expected)  # in the order of the input
    assert all(torch.equal(tensor(found[key]), value) for key, value in expected.items())  # the batches are the same
    assert found["0001.png"]["grid"] == [1, 8, 10]
    table = pq.read_table(data_path(batch.output, 0))
    width = pipeline.engines.checkpoint.config.vision.out_hidden_size
    assert table.schema.field("features").type == (
        pa.list_(pa.float32(), width) if pool == "mean" else pa.list_(pa.float32())
    )


def test_bfloat16_is_stored_exactly(job, images):
    from qwen2vl_trt.batch.partition_file import PartitionWriter, feature_schema

    batch = job(images)
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    with Journal(batch.settings.work / "j", 1) as journal:
        writer = PartitionWriter(batch.output, 0, 1, feature_schema(None), batch.settings.work, journal)
        writer.add("a", (1, 2, 2), values)
        writer.commit()
    assert torch.equal(tensor(rows(batch.output)["a"]), values)


def test_a_layer_is_that_of_a_single_process(job, images, pipeline, engine_dir, tmp_path):
    from qwen2vl_trt import Pipeline

    batch = job(images, layer=1, pool="mean")
    batch.run()
    own = Pipeline.from_engine_dir(engine_dir, "cpu")
    expected = single_process(own, images, tmp_path / "s", "--pool", "mean", "--layer", "1", "--shard-size", "8")
    found = rows(batch.output)
    assert all(torch.equal(tensor(found[key]), value) for key, value in expected.items())
    (answer, *_) = job(images, layer=9).run()
    assert "has layers 1 to 2" in answer["fatal"]


def table_of(images, tmp_path, prompts):
    values = [
        {"image": str(path), "prompt": prompt, "id": f"row {n}"}
        for n, (path, prompt) in enumerate(zip(sorted(images.glob("*.png")), prompts))
    ]
    return write_lines(tmp_path / "rows.jsonl", values)


def test_decoder_states_over_each_rows_prompt(job, images, pipeline, tmp_path):
    prompts = [PROMPT, "Why?", "<image><image>", None, "x " * 600, PROMPT]
    batch = job(table_of(images, tmp_path, prompts), source="decoder")
    batch.run()
    found = rows(batch.output)
    assert list(found) == ["row 0", "row 1", "row 5"]
    for key in found:
        number = int(key.split()[1])
        (states,) = pipeline.hidden_states([Request(prompts[number], [images / f"{number:04d}.png"])])
        assert relative_error(tensor(found[key]), states) < FP32_BEHIND_BOTH
    reasons = failures(batch.output)
    assert sorted(reasons) == ["row 2", "row 3", "row 4"]
    assert ": 2; images given: 1" in reasons["row 2"]
    assert "the column 'prompt' is empty" in reasons["row 3"]
    assert "tokens; these engines take 400" in reasons["row 4"]


@pytest.mark.parametrize("batch_tokens", [None, 60, 61])
def test_answers_are_those_of_the_prompts_asked_alone(job, images, pipeline, tmp_path, batch_tokens):
    prompts = [f"{PROMPT} {n}" for n in range(11)]
    prompts[4] = "<image><image>"
    params = SamplingParams(max_tokens=9)
    batch = job(table_of(images, tmp_path, prompts), task="generate", params=params, batch_tokens=batch_tokens)
    together = count_running(batch)
    batch.run(together)
    found = rows(batch.output)
    good = [n for n in range(11) if n != 4]
    assert list(found) == [f"row {n}" for n in good]
    outputs = pipeline.generate([Request(prompts[n], [images / f"{n:04d}.png"]) for n in good], params)
    for n, output in zip(good, outputs):
        assert found[f"row {n}"] == {
            "id": f"row {n}",
            "prompt": prompts[n],
            "answer": output.text,
            "prompt_tokens": output.prompt_tokens,
            "output_tokens": len(output.token_ids),
            "finish_reason": output.finish_reason,
            "original_size": [output.images[0].width, output.images[0].height],
            "resized_size": [output.images[0].resized_width, output.images[0].resized_height],
        }
    assert list(failures(batch.output)) == ["row 4"]
    # Images have 6, 20 and 8 tokens, answers 9: together 61. The cache has room for four rows.
    assert max(together.counts) == {None: 4, 60: 2, 61: 3}[batch_tokens]


def count_running(batch):
    """A worker that notes how many answers run at each step."""
    worker = batch.worker()
    pipeline, worker.counts = worker._generation._pipeline, []
    step = pipeline.step

    def counted():
        answer = step()
        worker.counts.append(pipeline.counters().running)
        return answer

    pipeline.step = counted
    return worker


def test_bad_rows_lose_no_neighbour(job, images, pipeline, tmp_path):
    folder = save_images(tmp_path / "in", 12)
    (folder / "0002.png").write_bytes((folder / "0002.png").read_bytes()[:200])
    for name in ("0003.png", "0008.png", "0009.png", "0010.png", "0011.png"):
        (folder / name).write_text("no image")
    batch = job(folder, rows=4)
    answers = batch.run()
    assert [(answer["saved"], answer["failed"]) for answer in answers] == [(2, 2), (4, 0), (0, 4)]
    assert answers[0]["first_failure"].startswith("row 0002.png")
    assert "truncated or corrupt" in answers[0]["first_failure"]
    found = rows(batch.output)
    names = [f"{n:04d}.png" for n in (0, 1, 4, 5, 6, 7)]
    assert list(found) == names
    assert sorted(failures(batch.output)) == [f"{n:04d}.png" for n in (2, 3, 8, 9, 10, 11)]
    assert not errors_path(batch.output, 1).exists()
    for name, expected in zip(names, pipeline.embed_images([folder / name for name in names])):
        assert relative_error(tensor(found[name]), expected) < FP32


# Exactly once


def test_a_done_partition_is_not_touched(job, images):
    batch = job(images)
    first = batch.run()
    stamps = [path.stat().st_mtime_ns for path in sorted((batch.output / "data").iterdir())]
    assert batch.run() == first
    assert [path.stat().st_mtime_ns for path in sorted((batch.output / "data").iterdir())] == stamps


def test_the_second_of_two_attempts_changes_nothing(job, images, monkeypatch):
    batch = job(images, rows=20)
    worker = batch.worker()
    run = worker._run

    def run_beside_another(rows, writer):
        run(rows, writer)
        monkeypatch.setattr(worker, "_run", run)
        batch.run()  # another worker is faster
        (batch.output / "data" / "part-00000.parquet").chmod(0o444)

    monkeypatch.setattr(worker, "_run", run_beside_another)
    before = batch.run(worker)
    assert before[0]["saved"] == 20
    assert (batch.output / "data" / "part-00000.parquet").stat().st_mode & 0o222 == 0  # still the first one's
    assert [path.name for path in (batch.output / "data").iterdir()] == ["part-00000.parquet"]
    assert not list(batch.settings.work.glob("*.parquet.*"))


def test_a_file_system_without_hard_links(job, images, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    batch = job(images)
    assert [answer["saved"] for answer in batch.run()] == [8, 8, 4]
    assert len(rows(batch.output)) == 20


def test_what_an_old_runs_worker_writes_does_not_appear(job, images, monkeypatch):
    batch = job(images, rows=20)
    worker = batch.worker()
    run = worker._run

    def run_until_the_next_run_begins(rows, writer):
        run(rows, writer)
        batch.settings.work.rename(batch.output / ".gone")

    monkeypatch.setattr(worker, "_run", run_until_the_next_run_begins)
    (answer,) = batch.run(worker)
    assert "cannot be written" in answer["fatal"]
    assert answer["fatal"].endswith("the partitions that are done are safe: run again with --resume")
    assert not list((batch.output / "data").iterdir())


def test_the_side_file_is_made_again_from_the_partition(job, images, tmp_path):
    folder = save_images(tmp_path / "in", 3)
    (folder / "0001.png").write_text("no image")
    batch = job(folder)
    batch.run()
    before = failures(batch.output)
    errors_path(batch.output, 0).unlink()  # as if the worker had been lost before it was written
    assert read_done(batch.output, 0).failures == [{"id": "0001.png", "error": before["0001.png"]}]
    assert failures(batch.output) == before


def test_a_damaged_partition_is_named(job, images):
    batch = job(images)
    batch.run()
    path = data_path(batch.output, 1)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BatchError, match=r"part-00001\.parquet is damaged or not of this command .* delete it"):
        read_done(batch.output, 1)


# Lost workers


def test_a_row_that_was_lost_is_taken_alone_then_given_up(job, images, pipeline):
    batch = job(images, rows=20)
    names = [f"{n:04d}.png" for n in range(20)]
    notes = batch.settings.work / "partition 0.journal"
    for hand in (names[4:9], names[4:9], names[6:7], names[6:7]):
        journal = Journal(notes, 1)
        for name in hand:
            journal.start(name)
    worker = batch.worker()
    sizes = []
    embed = worker._source._source.extract
    worker._source._source.extract = lambda images: sizes.append(len(images)) or embed(images)
    assert batch.run(worker)[0]["saved"] == 19
    assert sizes == [4, 1, 1, 1, 1, 4, 4, 3]
    assert failures(batch.output) == {
        "0006.png": "row 0006.png: 4 workers were lost with it in hand (crashed or out of memory)"
    }
    found = rows(batch.output)
    assert list(found) == [name for name in names if name != "0006.png"]
    for name, expected in zip(names, pipeline.embed_images([images / name for name in names])):
        if name in found:
            assert relative_error(tensor(found[name]), expected) < FP32
    assert not notes.exists()


def test_workers_that_never_open_their_engines_end_the_run(job, images):
    batch = job(images)
    (batch.settings.work / "starts").write_bytes(b"++-++")
    (answer, *_) = batch.run()
    assert "2 workers in a row were lost while they opened the engines" in answer["fatal"]
    (batch.settings.work / "starts").write_bytes(b"++-+")
    assert not batch.run()[0]["fatal"]


# Memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
    ],
)
def test_features_where_memory_ends(job, images, pipeline, tmp_path, error):
    batch = job(images, rows=20)
    worker = batch.worker()
    extract, sizes = worker._source._source.extract, []

    def limited(images):
        tokens = sum(image.size.tokens for image in images)
        if tokens > 15:  # an image has 6, 20 or 8 tokens
            raise error
        sizes.append(len(images))
        return extract(images)

    worker._source._source.extract = limited
    assert batch.run(worker)[0] | {"first_failure": ""} == {
        "number": 0, "saved": 13, "failed": 7, "first_failure": "", "fatal": ""
    }  # fmt: skip
    reasons = failures(batch.output)
    assert list(reasons) == [f"{n:04d}.png" for n in range(1, 20, 3)]
    assert all("out of memory with this row alone, 20 image tokens: lower --max-pixels" in r for r in reasons.values())
    found = rows(batch.output)
    for n, expected in enumerate(pipeline.embed_images(sorted(images.glob("*.png")))):
        if n % 3 != 1:
            assert relative_error(tensor(found[f"{n:04d}.png"]), expected) < FP32


def test_answers_where_memory_ends(job, images, pipeline, tmp_path):
    prompts = [PROMPT] * 9
    params = SamplingParams(max_tokens=5)
    batch = job(table_of(images, tmp_path, prompts), task="generate", params=params)
    expected = pipeline.generate([Request(PROMPT, [images / f"{n:04d}.png"]) for n in range(9)], params)
    longest = max(output.prompt_tokens for output in expected)
    worker = batch.worker()
    own = worker._generation._pipeline
    step = own._executor()._decoder.step

    def limited(chunks, *given, **named):
        # Two answers at once, or the larger images' prompts.
        if own.counters().running > 1 or chunks[0].end >= longest:
            raise RuntimeError("CUDA out of memory")
        return step(chunks, *given, **named)

    own._executor()._decoder.step = limited
    batch.run(worker)
    found, reasons = rows(batch.output), failures(batch.output)
    assert sorted({**found, **reasons}) == [f"row {n}" for n in range(9)]
    assert list(reasons) == ["row 1", "row 4", "row 7"]
    assert all("out of memory with this row alone" in reason for reason in reasons.values())
    assert all(found[f"row {n}"]["answer"] == expected[n].text for n in range(9) if n % 3 != 1)


def test_another_error_ends_the_run(job, images):
    batch = job(images)
    worker = batch.worker()

    def broken(images):
        raise FeaturesError("the disk is full")

    worker._source._source.extract = broken
    (first, *_) = batch.run(worker)
    assert first["fatal"] == "the disk is full"
    assert not rows(batch.output)


def test_an_engine_that_fails_ends_the_run(job, images, tmp_path):
    batch = job(table_of(images, tmp_path, [PROMPT] * 3), task="generate")
    worker = batch.worker()

    def broken(*arguments, **named):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    worker._generation._pipeline._executor()._decoder.step = broken
    (answer,) = batch.run(worker)
    assert "the decoder engine failed: RuntimeError: CUDA error: an illegal memory access" in answer["fatal"]
    assert not rows(batch.output)
