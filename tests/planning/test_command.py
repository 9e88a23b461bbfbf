"""``run.py plan`` as a user meets it."""

import json
import sys

import pytest

import run
from qwen2vl_trt.commands.process import run_command

ASK = "--model Qwen2.5-VL-72B --gpu H200 --images-per-second 100 --output-tokens 128".split()  # noqa: SIM905


@pytest.fixture
def call(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", "plan", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_command(run.main)
        found = capsys.readouterr()
        return ended.value.code or 0, found.out, found.err

    return call


def test_the_arithmetic_and_the_answer(call):
    code, out, errors = call(*ASK)
    assert (code, errors) == (0, "")
    assert "32 text + 256 image + 2 = 290" in out
    assert "2 x 80 layers x 8 heads x 128 x 2 bytes = 327,680 bytes, over 2 GPUs" in out
    assert "measured on one (data sheet 989 TFLOP/s)" in out
    assert "assumptions unless you measured" in out
    assert out.splitlines()[-1].startswith("16 x H200: 8 x tp_size 2, bf16, batch 256, ")
    code, out, _ = call(*ASK, "--json")
    found = json.loads(out)
    assert (code, found["gpus"], found["plan"]["tp_size"], found["plan"]["groups"]) == (0, 16, 2, 8)
    assert found["assumptions"] == {"vision": 0.6, "prefill": 0.6, "decode": 0.8, "tp": 0.9, "reserve": 0.1}


def test_options_reach_the_plan(call):
    options = "--image-size 1000x2000 --max-pixels 501760 --prompt-tokens 10 --precision fp8 --tp-size 4"
    options += " --max-num-seqs 7"
    fractions = "--vision-fraction 0.5 --prefill-fraction 0.4 --decode-fraction 0.7 --tp-fraction 0.8"
    fractions += " --reserve-fraction 0.2"
    found = json.loads(call(*ASK, *options.split(), *fractions.split(), "--max-seq-len", "4096", "--json")[1])
    assert (found["load"]["rows"], found["load"]["columns"]) == (34, 70)  # 476x980 pixels
    assert found["plan"]["prompt_tokens"] == 10 + 34 * 70 // 4 + 2
    assert (found["plan"]["tp_size"], found["plan"]["batch"], found["plan"]["slot_tokens"]) == (4, 7, 4096)
    assert list(found["assumptions"].values()) == [0.5, 0.4, 0.7, 0.8, 0.2]
    assert found["precision"] == "fp8"
    text = call(*ASK, *options.split())[1]
    assert "4 GPUs with an image each" in text
    assert "/ 1,583 + " in text  # FP8's rate beside BF16's


def test_features_and_a_checkpoint_folder(call):
    answer = call(
        "--model", "qwen2vl_trt/tiny/checkpoint", "--gpu", "l4", "--images-per-second", "5", "--output-tokens", "0"
    )
    assert answer[0] == 0
    assert "16 x 16 = 256, tokens 64" in answer[1]  # the checkpoint's own limit of pixels
    assert answer[1].splitlines()[-1].startswith("1 x L4: 1 x tp_size 1, bf16, no decoder, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "H300"), "unknown GPU 'H300'; known: H200, "),
        (("--model", "Qwen"), "unknown model 'Qwen'; known: "),
        (("--tp-size", "3"), "argument --tp-size: invalid choice: 3"),
        (("--tp-size", "1"), "tp_size 1 does not fit"),
        (("--image-size", "448"), "'448' is no size; 448x448 is height by width"),
        (("--image-size", "10x2500"), "aspect ratio of 250"),
        (("--images-per-second", "0"), "--images-per-second is 0; it must be above 0"),
        (("--decode-fraction", "2"), "the decode fraction is 2; it must be above 0 and at most 1"),
        (("--max-num-seqs", "0"), "'0' is not a whole number of at least 1"),
        (("--output-tokens", "-1"), "--output-tokens: '-1' is not a whole number of at least 0"),
    ],
)
def test_wrong_input_is_one_line(call, arguments, message):
    code, out, errors = call(*ASK, *arguments)
    assert (code, out) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
