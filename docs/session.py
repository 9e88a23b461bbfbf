"""Draws docs/session.png: runs each command of the tiny model and writes what it prints. Needs the ``bench`` extra.

It is run in the checkout: ``python docs/session.py``.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
PICTURE = "docs/digits.png"
COMMANDS = (
    f'run.py --model tiny --image {PICTURE} --prompt "What digits are in the image?"',
    f'run.py --model tiny --image {PICTURE} --prompt "How many digits are in the image?"',
    "run.py inspect artifacts/tiny-onnxruntime-fp32",
)
LINES = 14  # of a command's output
SIZE, LEADING, MARGIN = 26, 36, 36
BACKGROUND, TEXT, PROMPT, DIM = "#0d1117", "#e6edf3", "#7ee787", "#8b949e"


def session() -> list[tuple[str, str]]:
    """Lines and their colours."""
    lines = []
    build = [sys.executable, "build_engines.py", "--model", "tiny", "--backend", "onnxruntime"]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True)
    for number, command in enumerate(COMMANDS):
        output = subprocess.run(
            [sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        lines += [("", TEXT)] * (number > 0) + [(f"$ python {command}", PROMPT)]
        lines += [(line.rstrip(), TEXT) for line in output[:LINES]]
        if len(output) > LINES:
            lines.append(("...", DIM))
    return lines


def main() -> None:
    """Draw it."""
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", SIZE)
    lines, picture = session(), Image.open(ROOT / PICTURE).convert("RGB")
    picture = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.BICUBIC)
    top = MARGIN + picture.height + LEADING + MARGIN
    width = round(max(font.getlength(line) for line, _ in lines)) + 2 * MARGIN
    drawn = Image.new("RGB", (width, top + LEADING * len(lines) + MARGIN), BACKGROUND)
    drawn.paste(picture, (MARGIN, MARGIN))
    draw = ImageDraw.Draw(drawn)
    draw.text((MARGIN, MARGIN + picture.height + 8), PICTURE, DIM, font)
    for row, (line, colour) in enumerate(lines):
        draw.text((MARGIN, top + row * LEADING), line, colour, font)
    drawn.quantize(64).save(ROOT / "docs" / "session.png", optimize=True)


if __name__ == "__main__":
    main()
