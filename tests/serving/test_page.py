"""The page in a browser, against a stub of the API."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qwen2vl_trt.runtime.preprocessing.settings import smart_resize
from qwen2vl_trt.serving.page import page as served

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("starlette", reason="starlette is not installed")
from tests.serving.page_stub import stub  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")
DIGITS = Path(__file__).resolve().parents[2] / "docs" / "digits.png"
QUESTION = "What digits are in the image?"
DROP = """([data, name, type]) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, {type}));
    for (const kind of ["dragenter", "dragover", "drop"])
        document.body.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: transfer}));
}"""


@dataclass
class Server:
    address: str
    bodies: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


def serve(wanted_key: str | None = None) -> Iterator[Server]:
    found = Server("")
    config = uvicorn.Config(stub(found.bodies, found.keys, wanted_key), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    found.address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    yield found
    server.should_exit = server.force_exit = True
    thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    yield from serve()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def requests() -> list[str]:
    return []


@pytest.fixture
def complaints() -> list[str]:
    """What the console told, policy violations among it, and exceptions that nothing caught."""
    return []


@pytest.fixture
def page(browser, server, requests, complaints):
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(server.address)
    playwright.expect(page.locator("#model")).to_have_text(re.compile("."))
    yield page
    context.close()


def drop(page, path=DIGITS, kind="image/png"):
    page.evaluate(DROP, [base64.b64encode(path.read_bytes()).decode(), path.name, kind])
    playwright.expect(page.locator("#files li").last).to_contain_text(path.name)


def ask(page, question, *, ends=True):
    page.locator("#prompt").fill(question)
    page.keyboard.press("Control+Enter")
    if ends:
        playwright.expect(page.locator("#send")).to_be_visible()
        playwright.expect(page.locator(".turn").last).not_to_have_class(re.compile("busy"))


def test_a_dropped_image_is_answered(page, server, requests, complaints):
    drop(page)
    assert "267 \u00d7 70 → 280 \u00d7 56, 20 tokens" in page.locator("#files").inner_text()
    ask(page, QUESTION)
    assert page.locator(".answer").inner_text() == "92059"
    told = page.locator(".facts").inner_text().replace("\n", " ")
    assert told == (
        "First token 42 ms Speed 50 tokens/s Answer 6 tokens Prompt 48 tokens Of images 20 tokens From cache 16 tokens"
    )
    image, text = server.bodies[-1]["messages"][0]["content"]
    assert base64.b64decode(image["image_url"]["url"].split(",")[1]) == DIGITS.read_bytes()
    assert (text["text"], server.bodies[-1]["stream_options"]) == (QUESTION, {"include_usage": True})
    ask(page, "And how many?")
    roles = [message["role"] for message in server.bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert all(url.startswith((server.address, "data:")) for url in requests)
    assert not complaints


def test_the_slider_sets_pixels_and_counts_tokens_as_transformers_does(page, server):
    drop(page)
    page.locator("#pixels").fill("30")
    limit = page.evaluate("document.getElementById('pixels-text').textContent")
    pixels = int(limit.split(" pixels")[0].replace(",", ""))
    height, width = smart_resize(70, 267, 28, 3136, pixels)
    assert f"→ {width} \u00d7 {height}, {height * width // 784} tokens" in page.locator("#files").inner_text()
    ask(page, QUESTION)
    assert server.bodies[-1]["messages"][0]["content"][0]["max_pixels"] == pixels


def test_a_video_goes_as_one_and_other_files_are_refused(page, server, tmp_path, complaints):
    for name, kind in (("clip.mkv", ""), ("notes.txt", "text/plain")):
        (tmp_path / name).write_bytes(b"bytes")
        page.evaluate(DROP, [base64.b64encode(b"bytes").decode(), name, kind])
    playwright.expect(page.locator("#composer .error")).to_contain_text("notes.txt: not an image or a video")
    ask(page, QUESTION)
    (video, _) = server.bodies[-1]["messages"][0]["content"]
    assert video["type"] == "video_url"
    assert base64.b64decode(video["video_url"]["url"].split(",")[1]) == b"bytes"
    assert not complaints


def test_clear_stops_and_forgets(page, server, complaints):
    ask(page, "slow", ends=False)
    playwright.expect(page.locator(".answer")).to_contain_text("92059")
    page.locator("#clear").click()
    playwright.expect(page.locator("#empty")).to_be_visible()
    ask(page, QUESTION)
    assert len(server.bodies[-1]["messages"]) == page.locator(".turn").count() == 1
    assert not complaints


def test_stop_keeps_what_there_is(page, server, complaints):
    ask(page, "slow", ends=False)
    playwright.expect(page.locator(".answer")).to_contain_text("92059 and")
    page.locator("#stop").click()
    playwright.expect(page.locator(".reply")).to_contain_text("Stopped.")
    playwright.expect(page.locator("#send")).to_be_visible()
    assert page.locator(".error").count() == 0
    ask(page, QUESTION)
    assert server.bodies[-1]["messages"][1]["content"].startswith("92059 and")
    assert not complaints


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ("refuse", "image 1 is not an image"),
        ("full", "256 requests wait. Try again in 7 s."),
        ("break", "The engine failed."),
        ("cut", "The connection ended before the answer was complete."),
    ],
)
def test_errors_are_told_and_the_question_comes_back(page, server, question, told):
    ask(page, question)
    assert page.locator(".error").inner_text() == told
    assert page.locator("#prompt").input_value() == question
    ask(page, QUESTION)
    assert len(server.bodies[-1]["messages"]) == 1


def test_a_schema_is_checked_before_it_is_sent(page, server, complaints):
    page.locator("#structure summary").click()
    page.locator("#schema").fill('{"type": ')
    assert "not a JSON Schema" in page.locator("#schema-error").inner_text()
    before = len(server.bodies)
    page.locator("#prompt").fill(QUESTION)
    page.locator("#send").click()
    playwright.expect(page.locator("#schema")).to_be_focused()
    assert len(server.bodies) == before
    page.locator("#schema").fill('{"type": "object"}')
    page.locator("#sampling summary").click()
    page.locator("#temperature").fill("0.5")
    ask(page, QUESTION)
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}
    assert (server.bodies[-1]["response_format"], server.bodies[-1]["temperature"]) == (wanted, 0.5)
    assert not complaints


def test_boxes_are_drawn_where_the_model_saw_them(page, complaints):
    drop(page)
    ask(page, "boxes")
    picture = page.locator(".boxes img").bounding_box()
    second = page.locator(".box").nth(1).bounding_box()
    found = [
        (second["x"] - picture["x"]) / picture["width"],
        (second["y"] - picture["y"]) / picture["height"],
        second["width"] / picture["width"],
        second["height"] / picture["height"],
    ]
    assert found == pytest.approx([70 / 280, 0, 56 / 280, 42 / 56], abs=0.005)
    assert page.locator(".box span").all_inner_texts() == ["nine <b>", "two"]
    assert not complaints


def test_an_answer_is_text(page, complaints):
    ask(page, "markup")
    assert page.locator(".answer").inner_text() == "<img src=x onerror=alert(1)>"
    assert page.locator(".answer *").count() == 0
    assert not complaints


def test_the_request_as_code_is_the_request(page, server, tmp_path):
    pytest.importorskip("openai", reason="openai is not installed")
    name = tmp_path / "it's $HOME.png"
    name.write_bytes(DIGITS.read_bytes())
    drop(page, name)
    page.locator("#prompt").fill('true? "$HOME" `id` \\ é')
    page.locator("#code-button").click()
    curl = page.locator("#code-text").inner_text()
    page.locator("#language").select_option("python")
    python = page.locator("#code-text").inner_text()
    page.locator("#code-close").click()
    page.locator("#send").click()
    playwright.expect(page.locator(".facts")).to_be_visible()
    wanted = server.bodies[-1]
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    for command in (["bash", "-c", curl], [sys.executable, "-c", python]):
        if shutil.which(command[0]) and (command[0] != "bash" or shutil.which("curl")):
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
            assert done.returncode == 0, done.stderr
            assert "2" in done.stdout
            assert server.bodies.pop() == wanted


def test_everything_is_reached_by_keyboard(page, server):
    reached = []
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    for control in ("code-button", "clear", "prompt", "choose", "pixels", "SUMMARY"):
        assert control in reached
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input:not([hidden]), textarea, select')].filter((control) =>"
        " !(control.textContent.trim() || control.ariaLabel || control.labels?.length)).map((control) => control.id)"
    )
    assert not unnamed
    assert page.locator("[tabindex]:not([tabindex='0'])").count() == 0


def test_a_key_is_asked_for_and_kept_in_the_tab(browser):
    for server in serve("secret"):
        page = browser.new_page()
        page.goto(server.address)
        playwright.expect(page.locator("#key")).to_be_focused()
        page.locator("#key").fill("secret")
        page.keyboard.press("Tab")
        playwright.expect(page.locator("#model")).to_have_text("tiny")
        ask(page, QUESTION)
        assert server.keys == ["Bearer secret"]
        assert "secret" not in page.evaluate("JSON.stringify([localStorage, document.cookie])")
        page.locator("#code-button").click()
        assert "$API_KEY" in page.locator("#code-text").inner_text()
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 820, 1440])
def test_it_fits_every_width(browser, server, tmp_path, width, scheme):
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(server.address)
    playwright.expect(page.locator("#model")).to_have_text(re.compile("."))
    page.screenshot(path=folder / f"{width}-{scheme}-empty.png")
    drop(page)
    page.screenshot(path=folder / f"{width}-{scheme}-draft.png")
    ask(page, QUESTION)
    drop(page)
    ask(page, "boxes")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.screenshot(path=folder / f"{width}-{scheme}-answer.png")
    page.locator("#code-button").click()
    page.screenshot(path=folder / f"{width}-{scheme}-code.png")
    page.locator("#code-close").click()
    if page.locator("#settings-button").is_visible():
        page.locator("#settings-button").click()
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator("#settings").scroll_into_view_if_needed()
    page.screenshot(path=folder / f"{width}-{scheme}-settings.png")
    context.close()


def test_the_policy_names_what_is_inline_and_nothing_else():
    body, headers = served()
    text = body.decode()
    for tag in ("script", "style"):
        (inner,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in headers["Content-Security-Policy"]
    markup = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", text, flags=re.DOTALL)
    assert not re.findall(r"\s(on\w+|style)=", markup)
    assert not re.findall(r"(?:src|href)=[\"'](?!#|data:)", markup)
    assert json.dumps(headers).isascii()
