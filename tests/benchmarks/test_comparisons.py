"""``run.py bench comparisons`` over a small model, on every row's own code; its rooflines counted by hand."""

import json

import pytest

from qwen2vl_trt import published
from qwen2vl_trt.benchmarks import comparisons, engines, transformers
from qwen2vl_trt.benchmarks.comparisons import Plan, Report, Row, case_of, plan_for, roofline_of
from qwen2vl_trt.benchmarks.measure import Until
from qwen2vl_trt.benchmarks.random_model import config_of
from qwen2vl_trt.benchmarks.report import comparisons_text
from qwen2vl_trt.benchmarks.roofline import Rates
from qwen2vl_trt.commands import call
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines import backends
from qwen2vl_trt.engines.precision import BF16
from qwen2vl_trt.errors import BenchmarkError
from tests.support.models import SMALL_SHAPE

PLAN = Plan(
    (
        Row(case_of("processor", "processor", ((84, 112),) * 2), "image", compared=True),
        Row(case_of("vision", "vision", ((84, 112), (140, 56))), "image", compared=True),
        Row(case_of("hidden states", "full", ((84, 112),), batch=2), "sample", compared=True),
        Row(case_of("vision", "video", ((56, 84),), frames=4), "video", compared=True),
        Row(case_of("decoder", "decode", batch=2, prompt=5, generate=3), "token"),
        Row(case_of("pipeline", "requests", ((56, 84),), batch=2, generate=2), "request"),
    ),
    slots=2,
    reduced="reduced for this test",
)


@pytest.fixture
def bench(no_processes, small_rates, monkeypatch, tmp_path, capsys):
    """Run the command on a small model; gives the JSON and what else was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(published.SHAPES, "Qwen2.5-VL-3B", SMALL_SHAPE)
    for name, value in (("hidden_size", 160), ("num_heads", 2), ("intermediate_size", 64)):
        monkeypatch.setitem(published.VISION, name, value)
    monkeypatch.setattr(comparisons, "plan_for", lambda kind: PLAN)
    monkeypatch.setattr(comparisons, "_UNTIL", Until(None, 0.0, 1))
    find = backends.find_backend  # whatever this CPU is best at
    monkeypatch.setattr(comparisons, "find_backend", lambda name, precision, device=None: find(name, "bf16"))

    def run(*arguments):
        call("bench comparisons", ["--device", "cpu", "--layers", "2", "--blocks", "2", *arguments, "--json"])
        return json.loads(capsys.readouterr().out)

    return run


def test_every_row_is_measured_and_compared(bench, tmp_path):
    found = bench("--plot", "c.png")
    assert (found["device"], found["reduced"]) == ("cpu", PLAN.reduced)
    (model,) = found["models"]
    assert (model["name"], model["layers"], model["blocks"]) == ("Qwen2.5-VL-3B-random-2-2", 2, 2)
    rows = {row["title"]: row for row in model["rows"]}
    assert list(rows) == [row.case.label for row in PLAN.rows]
    for row in PLAN.rows:
        measured = rows[row.case.label]
        assert measured["errors"] == []
        seconds, memory = measured["seconds_per_item"], measured["memory_bytes"]
        ways = {"decode": {"batched"}, "video": {"one at a time"}}.get(row.case.label, {"one at a time", "batched"})
        assert seconds.keys() == memory.keys() == {"ours", *ways}
        assert measured["ratios"] == {how: pytest.approx(seconds[how] / seconds["ours"]) for how in ways}
        for found in memory.values():
            assert found["host"] > 0.99 * found["before"] > 0  # the kernel counts pages in batches
        assert measured["roofline_seconds_per_item"] > 0
        assert (measured["deviation_from_fp32"] is not None) == row.compared
        if row.compared:  # the rounding of BF16 on both sides, so the same image, the same text and the same order
            deviation = measured["deviation_from_fp32"]
            assert 1e-4 < deviation["ours"] < 0.03
            assert deviation["ours"] < 2 * deviation["theirs"]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_that_fails_leaves_the_others_alone(bench, monkeypatch):
    def fails(self, case):
        raise BenchmarkError("out of memory")

    monkeypatch.setattr(engines._Decoder, "load", fails)
    monkeypatch.setattr(transformers._HiddenStates, "calls", fails)
    (model,) = bench()["models"]
    rows = {row["title"]: row for row in model["rows"]}
    assert rows["decode"]["errors"] == ["ours: out of memory"]
    ways = ("Transformers, one at a time", "Transformers, batched", "deviation")
    assert rows["full"]["errors"] == [f"{way}: out of memory" for way in ways]
    assert rows["decode"]["ratios"] == rows["full"]["ratios"] == {}
    assert [title for title, row in rows.items() if row["errors"]] == ["full", "decode"]
    assert min(rows["vision"]["ratios"].values()) > 0


def test_an_interrupt_loses_nothing_that_was_measured(bench, monkeypatch, capsys):
    def interrupts(self, case):
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers._HiddenStates, "calls", interrupts)
    with pytest.raises(KeyboardInterrupt):
        bench()
    found = json.loads(capsys.readouterr().out)
    assert found["interrupted"]
    (model,) = found["models"]
    assert [len(row["seconds_per_item"]) for row in model["rows"]] == [3, 3, 1, 1, 1, 1]


def test_a_gpu_runs_the_seeds_sizes_and_a_cpu_less():
    gpu, cpu = plan_for("cuda"), plan_for("cpu")
    assert not gpu.reduced
    assert cpu.reduced
    assert [row.published is not None for row in gpu.rows] == [True] * 3 + [False] * 8
    assert [row.published[2] for row in gpu.rows[:3]] == [28.3, 12.8, 1.49]
    assert [len(row.case.sizes) for row in gpu.rows[:2]] == [64, 64]
    assert gpu.rows[1].case.grids == ((1, 32, 32),) * 64
    large, video = gpu.rows[4:6]
    assert set(large.case.grids) == {(1, 78, 138)}  # not shrunk
    assert video.case.grids == ((16, 32, 32),)
    assert [row.case.batch for row in gpu.rows if row.case.stage == "decoder"] == [1, 8, 32, 128]
    assert gpu.rows[-1].case.batch == 64
    assert max(row.case.batch for row in cpu.rows) == 8
    for plan in (gpu, cpu):
        assert max(row.case.batch for row in plan.rows) <= plan.slots


def test_rooflines_are_those_counted_by_hand():
    """The rates of an H200, and the figures that follow from them."""
    rates = Rates(copy=4.3e12, read={1 << 30: 4.3e12}, gemm=790e12, fp8_gemm=None)
    config = Qwen2VLConfig.from_dict(config_of("Qwen2.5-VL-7B"))
    rows = plan_for("cuda").rows
    assert roofline_of(rows[0], config, BF16, rates, 0) == pytest.approx(0.7e-6, rel=0.02)
    assert roofline_of(rows[1], config, BF16, rates, 0) == pytest.approx(1.70e-3, rel=0.01)
    decode = {row.case.batch: roofline_of(row, config, BF16, rates, 0) for row in rows if row.case.stage == "decoder"}
    assert 1 / decode[1] == pytest.approx(304, rel=0.01)
    assert decode[128] < decode[32] < decode[8] < decode[1] / 7
    full, requests = rows[2], rows[-1]
    assert roofline_of(full, config, BF16, rates, 0) is None  # without the prompt's length
    prompt = 2 * 290 * 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944) / 790e12
    assert roofline_of(full, config, BF16, rates, 290) == pytest.approx(1.70e-3 + prompt, rel=0.02)
    assert roofline_of(requests, config, BF16, rates, 290) > roofline_of(full, config, BF16, rates, 290)


def test_the_text_shows_what_was_measured(bench, monkeypatch):
    reports, measure = [], comparisons.run
    monkeypatch.setattr(comparisons, "run", lambda *arguments: reports.append(measure(*arguments)) or reports[0])
    bench()
    (report,) = reports
    lines = list(comparisons_text(report))
    assert lines[1] == PLAN.reduced
    (line,) = [line for line in lines if line.startswith("| decode") and "tokens/s" in line]
    ours = report.models[0].results[4].seconds["ours"]
    assert f"{1 / ours:,.2f}" in line
    empty = Report(report.device, BF16, PLAN, report.rates, [])
    assert len(list(comparisons_text(empty))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "72B"), "invalid choice: '72B'"),
        (("--layers", "0"), "--layers"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--plot", "none/p.png"), "there is no folder none"),
    ],
)
def test_wrong_options_are_named(arguments, message, capsys, monkeypatch, tmp_path):
    import sys

    import run
    from qwen2vl_trt.commands.process import run_command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "bench", "comparisons", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command(run.main)
    found = capsys.readouterr()
    assert (ended.value.code, found.out, found.err.count("\n")) == (2, "", 1)
    assert message in found.err
