"""What `eval` prints."""

import json

import pytest

from qwen2vl_trt.tiny import report


@pytest.mark.parametrize("as_json", [True, False])
def test_a_part_of_the_tasks_does_not_look_whole(monkeypatch, capsys, as_json):
    """Ctrl-C in the second task of four."""

    def answer(pipeline, scenes):
        if asked:
            raise KeyboardInterrupt
        asked.append(scenes)
        return [""] * len(scenes)

    asked: list[object] = []
    monkeypatch.setattr(report, "answer_scenes", answer)
    with pytest.raises(KeyboardInterrupt):
        report.print_accuracy(None, 2, 0, as_json)
    out = capsys.readouterr().out
    if as_json:
        found = json.loads(out)
        assert (set(found), found["interrupted"]) == ({"read", "interrupted"}, True)
    else:
        assert "held-out digits, interrupted" in out
