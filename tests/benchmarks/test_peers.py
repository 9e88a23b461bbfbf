"""benchmarks/peers without its peers: scripts of the test stand for them."""

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
COUNTS = '''
import sys, time
from pathlib import Path

sys.path.insert(0, {here!r})
import measured


class Counts:
    """A token a word; 200 tokens take a second of the CPU."""

    def answer(self, text, images, batch, tokens):
        if images and {text_alone}:
            raise NotImplementedError
        end = time.process_time() + tokens / 200
        while time.process_time() < end:
            pass
        return len(text.split()) + 9 + 258 * len(images)

    def embed(self, images):
        raise NotImplementedError


def convert(model, precision, folder):
    Path(folder).mkdir()
    (Path(folder) / "part").touch()
    if precision == "broken":
        sys.exit(3)
    (Path(folder) / "whole").touch()


def load(given):
    assert {{"part", "whole"}} == {{file.name for file in Path(given["folder"]).iterdir()}}
    if given["precision"] == "silent":
        raise SystemExit
    if given["precision"] == "failing":
        sys.exit(4)
    return Counts()


if __name__ == "__main__":
    measured.main(load, convert=convert)
'''


@pytest.fixture
def peers(monkeypatch):
    """The command's module."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("benchmarks_peers", HERE / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(peers, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["peers", *map(str, arguments)])
    peers.main()


def cells(table, row):
    """Of a row of the table, by column."""
    lines = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines() if line.startswith("|")]
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    return dict(zip(lines[0], lines[names.index(row)]))


def test_one_that_fails_has_a_column_and_the_others_run(peers, monkeypatch, tmp_path, capfd):
    work, environments = tmp_path / "work", tmp_path / "environments"
    model = work / "Qwen2.5-VL-3B-random-4-4"
    model.mkdir(parents=True)
    monkeypatch.setattr(peers, "random_checkpoint", lambda *arguments: model)
    monkeypatch.setattr(peers, "answer_with_known_tokens", lambda model: None)
    for name, text_alone in (("all", False), ("text", True)):
        script = tmp_path / f"{name}.py"
        script.write_text(COUNTS.format(here=str(HERE), text_alone=text_alone))
        peers.PEERS[name] = peers.Peer(name.title(), str(script), ("whole", "broken", "failing", "silent"))
        (environments / name / "bin").mkdir(parents=True)
        (environments / name / "bin" / "python").symlink_to(sys.executable)
    asked = ["all:broken", "all:failing", "all:silent", "all:whole", "text:whole"]
    given = ["--environments", environments, "--rounds", 1, "--work", work]
    with pytest.raises(SystemExit, match="1"):
        run(peers, monkeypatch, "--ours", "--peers", *asked, *given)
    table = capfd.readouterr().out
    decode = cells(table, "decode, batch 8, tokens/s")
    assert decode["All broken"] == decode["All failing"] == decode["All silent"] == "failed"
    assert float(decode["All whole"].replace(",", "")) == pytest.approx(1600, rel=0.2)
    assert "All broken failed: making its model ended with code 3" in table
    assert "All failing failed: round 1 ended with code 4" in table
    assert "All silent failed: round 1 printed no result" in table
    request = cells(table, "a request (448x448, 298 + 16 tokens), s")
    assert float(request["All whole"]) == pytest.approx(0.08, abs=0.02)
    assert request["Text whole"] == ""
    assert "read prompts" not in table
    made = {file.name for file in work.iterdir() if file.is_dir()}
    assert made == {
        model.name,
        *(f"{model.name}-{name}" for name in ("all-failing", "all-silent", "all-whole", "text-whole")),
    }


def test_the_table_has_medians_and_says_what_was_read(peers, capsys, monkeypatch):
    rounds = [{"decode 1": rate, "tokens": 1034, "short": 40, "peak": 1.5} for rate in (9.0, 11.0, 10.0)]
    monkeypatch.setattr(sys, "argv", ["peers"])
    arguments = peers.command_line().parse_args(["--rounds", "3"])
    found = {"one": rounds, "other": [{"prefill": 1234.4, "tokens": 1035, "short": 40, "peak": 0.3}]}
    peers.report(found, {"other": "round 2 ended with code 1"}, {"other-package": "1.2"}, arguments)
    table = capsys.readouterr().out
    assert cells(table, "decode, batch 1, tokens/s") == {"one": "10.0", "other": ""}
    assert cells(table, "prefill of 1,034 tokens, tokens/s") == {"one": "", "other": "1,234"}
    assert cells(table, "peak memory, GB") == {"one": "1.50", "other": "0.30"}
    assert "other-package 1.2" in table
    assert "Qwen2.5-VL-3B, 4 layers, 4 vision blocks; medians of 3" in table
    assert "other failed: round 2 ended with code 1" in table
    assert "other read prompts of 1035 and 40 tokens, not of 1,034 and 40" in table
    assert "one read" not in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "tensorflow:int8"], "no peer 'tensorflow'; known: transformers, openvino"),
        (["--peers", "openvino:int2"], "openvino has no 'int2'; known: fp32, bf16, int8, int4"),
        (["--peers", "openvino:int8", "--environments", "E"], "openvino needs an environment, but there is no /"),
    ],
)
def test_what_it_refuses(peers, monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run(peers, monkeypatch, *arguments)
    assert message in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("script", sorted(HERE.glob("*_peer.py")), ids=lambda script: script.stem)
def test_every_script_is_in_the_table_with_its_recipe(peers, script):
    """One of the table's, and an environment of its name in the recipe."""
    [name] = [name for name, peer in peers.PEERS.items() if peer.script == script.name]
    assert name == peers.OWN or f"python3 -m venv E/{name}\n" in peers.__doc__
