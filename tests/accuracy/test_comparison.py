"""How runners are run: one at a time, on the reference's tokens."""

import numpy as np
import pytest
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from qwen2vl_trt.accuracy.comparison import Row, compare_runners
from qwen2vl_trt.accuracy.figures import Agreement

VOCABULARY, STEPS = 5, 3


class FakeRunner(BaseRunner):
    """Prefers token ``case + step`` unless it is wrong from a step on; notes who is active with it."""

    def __init__(self, name, log, wrong_from=STEPS, shift=0.0, nan=False):
        super().__init__(name=name)
        self.log, self.wrong_from, self.shift, self.nan = log, wrong_from, shift, nan

    def activate_impl(self):
        self.log.append(("activate", self.name))

    def deactivate_impl(self):
        self.log.append(("deactivate", self.name))

    def get_input_metadata_impl(self):
        return TensorMetadata().add("case", np.int64, (1,)).add("forced_ids", np.int64, (None,))

    def infer_impl(self, feed_dict):
        self.log.append(("infer", self.name, feed_dict["forced_ids"].tolist()))
        self.inference_time = 0.5
        case = int(feed_dict["case"][0])
        tokens = [(case + step + (step >= self.wrong_from)) % VOCABULARY for step in range(STEPS)]
        logits = np.eye(VOCABULARY, dtype=np.float32)[tokens] + np.float32(self.shift)
        if self.nan:
            logits[0, 0] = np.nan
        return {"greedy_ids": np.array(tokens), "logits": logits[:1], "decode_logits": logits[1:]}


def run(*others):
    log = []
    feeds = [{"case": np.array([n]), "forced_ids": np.zeros(0, np.int64)} for n in range(2)]
    told = []
    others = [FakeRunner(name, log, **options) for name, options in others]
    rows = list(compare_runners(FakeRunner("reference", log), others, feeds, told.append))
    return rows, log, told


def test_one_runner_is_active_at_a_time_and_takes_the_references_tokens():
    _, log, told = run(("first", {}), ("second", {}))
    expected = []
    for name, forced in (
        ("reference", [[], []]),
        ("first", [[0, 1, 2], [1, 2, 3]]),
        ("second", [[0, 1, 2], [1, 2, 3]]),
    ):
        expected += [("activate", name), *(("infer", name, tokens) for tokens in forced), ("deactivate", name)]
    assert log == expected
    assert told == ["reference"] * 2 + ["first"] * 2 + ["second"] * 2


def test_figures_and_agreement_of_every_case():
    (same, other), _, _ = run(("same", {}), ("other", {"wrong_from": 1, "shift": 0.25}))
    assert same.agreement == Agreement(6, 6, None)
    assert same.outputs["logits"].max_absolute == 0
    assert same.seconds == 1.0
    assert other.agreement == Agreement(2, 6, 1)
    assert other.cases[1]["greedy_ids"] == Agreement(1, 3, 1)
    assert other.outputs["logits"].max_absolute == 0.25
    assert list(other.outputs) == ["logits", "decode_logits"]


def test_the_first_disagreement_is_counted_through_the_cases():
    row = Row("x", ({"greedy_ids": Agreement(4, 4, None)}, {"greedy_ids": Agreement(1, 3, 2)}), 0.0)
    assert row.agreement == Agreement(5, 7, 6)


def test_what_is_not_a_number_reaches_the_figures():
    ((row,), _, _) = run(("broken", {"nan": True}))
    assert np.isnan(row.outputs["logits"].max_absolute)


def test_polygraphy_says_nothing(capfd):
    run(("other", {"shift": 1.0}))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_a_failing_runner_is_let_go_of():
    class Failing(FakeRunner):
        def infer_impl(self, feed_dict):
            raise RuntimeError("broken")

    log = []
    feeds = [{"case": np.array([0]), "forced_ids": np.zeros(0, np.int64)}]
    with pytest.raises(RuntimeError, match="broken"):
        list(compare_runners(FakeRunner("reference", log), [Failing("failing", log)], feeds, lambda name: None))
    assert log[-1] == ("deactivate", "failing")
