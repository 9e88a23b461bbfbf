"""The page in a browser, against a stub of the API and against the server over the tiny model."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import jsonschema
import pytest
from PIL import Image

from qwen2vl_trt import Pipeline, Request, Service
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.runtime.preprocessing.settings import smart_resize
from qwen2vl_trt.serving.page import page as served
from tests.support.engine_folders import build
from tests.support.media_files import digit_pictures, save_video

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("openai", reason="openai is not installed")
from qwen2vl_trt.serving.app import App, ServerSettings  # noqa: E402
from tests.serving.page_stub import stub  # noqa: E402
from tests.serving.test_server import DIGITS, QUESTION, ROOT, idle, opened, serving  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")
PICTURE = ROOT / "docs" / "digits.png"
DROP = """([data, name, type]) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, {type}));
    for (const kind of ["dragenter", "dragover", "drop"])
        document.body.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: transfer}));
}"""


FOCUSED = """() => {
    const control = document.activeElement;
    if (control === document.body) return null;
    const box = control.getBoundingClientRect();
    const outlined = control.id === "prompt" ? control.closest(".sheet") : control;
    const shown = getComputedStyle(outlined).outlineStyle !== "none";
    const inside = box.top >= 0 && box.bottom <= innerHeight && box.left >= 0 && box.right <= innerWidth;
    const covering = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    return {
        name: control.id || control.textContent,
        place: [...document.querySelectorAll("*")].indexOf(control),
        visible: shown && inside && control.contains(covering),
    };
}"""
OUTLINE = """
- link "Skip to the question"
- banner:
  - heading "qwen2vl-trt" [level=1]
  - paragraph: tiny
  - button "Request as code": Code
  - button "New chat"
- main:
  - region "Ask about a picture"
  - log "Conversation"
  - list "Attached files":
    - listitem:
      - img "digits.png"
      - button "Remove digits.png": ✕
  - textbox "Your question":
    - text: What digits are in the image?
  - button "Add images or a video"
  - button "Send"
  - status
  - complementary "Settings":
    - heading "Largest picture" [level=2]
    - slider "Largest picture": "100"
    - paragraph: /50,176 pixels/
    - group:
      - spinbutton "Temperature"
      - spinbutton "Most tokens"
      - spinbutton "Seed"
    - group:
      - textbox "JSON Schema"
    - group:
      - textbox "API key"
"""
TURN = """
- log "Conversation":
  - article:
    - heading "You" [level=3]
    - list:
      - listitem:
        - img "digits.png"
    - paragraph: What digits are in the image?
    - heading "Answer" [level=3]
    - text: "92059"
    - term: First token
    - definition: 42 ms
"""
CODE = """
- dialog "This request as code":
  - heading "This request as code" [level=2]
  - combobox "Language"
  - button "Copy"
  - button "Close"
"""


@dataclass
class Server:
    address: str
    bodies: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)


@contextmanager
def stubbed(wanted_key: str | None = None) -> Iterator[Server]:
    found = Server("")
    with serving(stub(found.bodies, found.keys, found.sizes, wanted_key)) as address:
        found.address = f"{address}/"
        yield found


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with stubbed() as server:
        yield server


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    profile = BuildProfile(4, 1024, max_batch_size=2, max_num_seqs=4, max_input_len=512, max_seq_len=640)
    folder = build("tiny", tmp_path_factory.mktemp("page") / "engines", "torch", profile=profile)
    return Pipeline.from_engine_dir(folder, "cpu")


@pytest.fixture(scope="module")
def service(pipeline):
    with Service(pipeline) as service:
        yield service


@pytest.fixture(scope="module")
def live(service, pipeline):
    """The address of the server over the tiny model."""
    with opened(service, pipeline) as (_, address):
        yield f"{address}/"


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
    """What the console told at any level, policy violations among it, and exceptions that nothing caught."""
    return []


@pytest.fixture
def visit(browser, requests, complaints):
    contexts = []

    def visit(address, model="tiny", **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1440, "height": 900}} | options))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda line: complaints.append(line.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        playwright.expect(page.locator("#model")).to_have_text(model)
        return page

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture
def screenshots(tmp_path) -> Path:
    """Where they go: the folder that the variable SCREENSHOTS names, or one that is thrown away."""
    return Path(os.environ.get("SCREENSHOTS", tmp_path))


@pytest.fixture
def page(visit, server):
    server.sizes[:] = [(280, 56)]
    return visit(server.address)


@pytest.fixture
def living(visit, live):
    """The page of the server over the tiny model."""
    return visit(live)


def drop(page, path=PICTURE, kind="image/png"):
    page.evaluate(DROP, [base64.b64encode(path.read_bytes()).decode(), path.name, kind])
    playwright.expect(page.locator("#files li").last).to_contain_text(path.name)


def ask(page, question, *, ends=True):
    page.locator("#prompt").fill(question)
    page.keyboard.press("Control+Enter")
    if ends:
        playwright.expect(page.locator("#send")).to_be_visible()
        playwright.expect(page.locator(".turn").last).not_to_have_class(re.compile("busy"))


def set_schema(page, schema, max_tokens=300):
    for summary in page.locator("summary").all():
        summary.click()
    page.locator("#schema").fill(json.dumps(schema))
    page.locator("#max_tokens").fill(str(max_tokens))


def run_code(code, language, folder, **variables):
    command = ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()} | variables
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done


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
    assert base64.b64decode(image["image_url"]["url"].split(",")[1]) == DIGITS
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


NINE, TWO = {"bbox_2d": [8, 4, 48, 50], "label": "nine <b>"}, {"bbox_2d": [70, 0, 126, 42], "label": "two"}


def shares(page):
    """Left, top, width and height of each box that is drawn, as shares of the picture."""
    picture = page.locator(".boxes img").bounding_box()
    found = [box.bounding_box() for box in page.locator(".box").all()]
    return [
        [
            (box["x"] - picture["x"]) / picture["width"],
            (box["y"] - picture["y"]) / picture["height"],
            box["width"] / picture["width"],
            box["height"] / picture["height"],
        ]
        for box in found
    ]


@pytest.mark.parametrize("viewport", [(1440, 900), (390, 844)])
@pytest.mark.parametrize("size", [(280, 56), (560, 112), (252, 84), (140, 420)])
def test_boxes_are_drawn_where_the_model_saw_them(visit, server, complaints, tmp_path, size, viewport):
    server.sizes[:] = [size]
    page = visit(server.address, viewport=dict(zip(("width", "height"), viewport)))
    Image.new("RGB", (size[0] + 9, size[1] - 5)).save(tmp_path / "it.png")
    drop(page, tmp_path / "it.png")
    ask(page, "say ```json\n" + json.dumps([NINE, TWO]) + "\n```")
    width, height = size
    for found, (x1, y1, x2, y2) in zip(shares(page), (NINE["bbox_2d"], TWO["bbox_2d"]), strict=True):
        wanted = [x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height]
        assert found == pytest.approx(wanted, abs=0.005)
    assert page.locator(".box span").all_inner_texts() == ["nine <b>", "two"]
    assert "nine <b> at 8, 4, 48, 50; two at 70, 0, 126, 42" in page.locator(".boxes img").get_attribute("alt")
    assert not complaints


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        (json.dumps(NINE), 1),
        (json.dumps([NINE, TWO]), 2),
        (json.dumps({"objects": [NINE, {"parts": TWO}]}), 2),
        (f"The nine [left] is\n```json\n{json.dumps([NINE])}\n```\nand the two\n```\n{json.dumps([TWO])}\n```", 2),
        (f"They are here: {json.dumps([NINE, TWO], indent=2)} in the image.", 2),
        ("```json\n" + json.dumps([NINE, TWO, NINE])[:-20], 2),
        ("```json\n[]\n```", 0),
        (json.dumps([{"bbox_2d": [1, 2, 3], "label": "x"}, {"bbox_2d": ["1", 2, 3, 4]}, {"bbox": [1, 2, 3, 4]}]), 0),
    ],
)
def test_boxes_are_found_in_an_answer(page, complaints, answer, count):
    drop(page)
    ask(page, f"say {answer}")
    assert page.locator(".box").count() == count
    assert not complaints


def test_boxes_end_at_the_edges(page):
    drop(page)
    boxes = [[-20, 14, 70, 900], [300, 60, 400, 90], [140, 28, 70, 14]]
    ask(page, "say " + json.dumps([{"bbox_2d": box} for box in boxes]))
    assert page.evaluate("document.documentElement.scrollWidth") == 1440
    first, *others = shares(page)
    assert first == pytest.approx([0, 0.25, 0.25, 0.75], abs=0.005)
    assert all(-0.005 <= each <= 1.005 for box in others for each in box)


@pytest.mark.parametrize("width", [390, 1280])
def test_labels_of_boxes_are_not_cut_off(visit, server, width):
    server.sizes[:] = [(280, 56)]
    page = visit(server.address, viewport={"width": width, "height": 800})
    drop(page)
    boxes = [[250, 10, 280, 40], [145, 10, 150, 20], [130, 10, 139, 20], [0, 0, 20, 20]]
    ask(page, "say " + json.dumps([{"bbox_2d": box, "label": "a handwritten digit of green ink"} for box in boxes]))
    picture = page.locator(".boxes img").bounding_box()
    for label in page.locator(".box span").all():
        found = label.bounding_box()
        assert picture["x"] <= found["x"] < found["x"] + found["width"] <= picture["x"] + picture["width"]


def test_the_reader_chooses_the_picture_of_the_boxes(page, server, tmp_path):
    server.sizes[:] = [(280, 56), (140, 168)]
    Image.new("RGB", (150, 160), "teal").save(tmp_path / "other.png")
    drop(page)
    drop(page, tmp_path / "other.png")
    ask(page, "say " + json.dumps(NINE))
    for place, (width, height) in enumerate(server.sizes):
        page.get_by_label("Picture of the boxes").select_option(str(place))
        assert shares(page) == [pytest.approx([8 / width, 4 / height, 40 / width, 46 / height], abs=0.005)]


def test_an_answer_is_text(page, complaints):
    ask(page, "say <img src=x onerror=alert(1)>")
    assert page.locator(".answer").inner_text() == "<img src=x onerror=alert(1)>"
    assert page.locator(".answer *").count() == 0
    assert not complaints


def test_the_request_as_code_is_the_request(page, server, tmp_path):
    pytest.importorskip("openai", reason="openai is not installed")
    name = tmp_path / "it's $HOME.png"
    name.write_bytes(DIGITS)
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
    for language, code in (("curl", curl), ("python", python)):
        if language == "python" or shutil.which("curl"):
            assert "2" in run_code(code, language, tmp_path).stdout
            assert server.bodies.pop() == wanted


@pytest.mark.parametrize("width", [390, 1280])
def test_everything_is_reached_by_keyboard(visit, server, width):
    page = visit(server.address, viewport={"width": width, "height": 800})
    drop(page)
    if width == 390:
        page.locator("#settings-button").press("Enter")
        playwright.expect(page.locator("#pixels")).to_be_focused()
    for summary in page.locator("summary").all():
        summary.press("Enter")
    page.locator("#prompt").fill(QUESTION)
    wanted = page.evaluate("""() => [...document.querySelectorAll("a, button, input, textarea, select, summary")]
        .filter((control) => control.checkVisibility() && !control.disabled).length""")
    page.locator(".skip").focus()
    seen = []
    while (control := page.evaluate(FOCUSED)) is not None:
        assert control["visible"], control
        seen.append(control)
        page.keyboard.press("Tab")
    assert len(seen) == wanted > 15
    assert [control["place"] for control in seen] == sorted(control["place"] for control in seen)
    assert page.locator("[tabindex]:not([tabindex='0'])").count() == 0


def test_the_keyboard_does_it_all(page, server, tmp_path):
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#prompt")).to_be_focused()
    with page.expect_file_chooser() as chosen:
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
    chosen.value.set_files(PICTURE)
    playwright.expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("slow")
    page.keyboard.press("Control+Enter")
    playwright.expect(page.locator(".answer")).to_contain_text("92059 and")
    page.keyboard.press("Escape")
    playwright.expect(page.locator(".note").first).to_have_text("Stopped.")
    page.locator("#code-button").press("Enter")
    playwright.expect(page.get_by_role("dialog", name="This request as code")).to_be_visible()
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#code-button")).to_be_focused()


def test_a_screen_reader_has_a_name_for_everything(page):
    drop(page)
    page.locator("#prompt").fill(QUESTION)
    for summary in page.locator("summary").all():
        summary.click()
    playwright.expect(page.locator("body")).to_match_aria_snapshot(OUTLINE)
    ask(page, QUESTION)
    playwright.expect(page.locator("#thread")).to_match_aria_snapshot(TURN)
    page.locator("#code-button").click()
    playwright.expect(page.locator("#code")).to_match_aria_snapshot(CODE)


def test_a_screen_reader_is_told_sentences(page):
    page.evaluate("""() => {
        window.told = [];
        new MutationObserver(() => told.push(document.getElementById("status").textContent))
            .observe(document.getElementById("status"), {childList: true});
    }""")
    ask(page, "say It reads 9.5 kg. Is it\nso? Yes")
    ask(page, "long")
    ask(page, "refuse")
    waits = "Waiting for the answer."
    assert page.evaluate("told") == [
        *(waits, "It reads 9.5 kg.", "Is it", "so?", "Yes End of the answer."),
        *(waits, "92059 Cut off at the most tokens that were allowed."),
        *(waits, "Error: image 1 is not an image"),
    ]
    assert page.get_by_role("status").count() == 1
    assert page.get_by_role("log").get_attribute("aria-live") == "off"


@pytest.mark.parametrize(
    ("question", "schema", "note"),
    [
        ("long", "", "Cut off at the most tokens that were allowed."),
        ("long", "{}", "Cut off at the most tokens that were allowed, so it may not fit the schema."),
        ("late", "", "Cut off by the server (cancelled)."),
        ("say", "", ""),
    ],
)
def test_how_an_answer_ended_is_told(page, question, schema, note):
    page.locator("#structure summary").click()
    page.locator("#schema").fill(schema)
    ask(page, question)
    assert page.locator(".reply .note").all_inner_texts() == [note] * bool(note)


def test_a_key_is_asked_for_and_kept_in_the_tab(visit):
    with stubbed("secret") as server:
        page = visit(server.address, model="")
        playwright.expect(page.locator("#key")).to_be_focused()
        page.locator("#key").fill("secret")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#model")).to_have_text("tiny")
        ask(page, QUESTION)
        assert server.keys == ["Bearer secret"]
        assert "secret" not in page.evaluate("JSON.stringify([localStorage, document.cookie])")
        page.locator("#code-button").click()
        assert "$API_KEY" in page.locator("#code-text").inner_text()
        assert page.url == server.address


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 820, 1280])
def test_it_fits_every_width(visit, server, screenshots, width, scheme):
    server.sizes[:] = [(280, 56)] * 2
    page = visit(server.address, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.screenshot(path=screenshots / f"{width}-{scheme}-empty.png")
    drop(page)
    page.screenshot(path=screenshots / f"{width}-{scheme}-draft.png")
    ask(page, QUESTION)
    drop(page)
    ask(page, "say " + json.dumps([NINE, TWO]))
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.screenshot(path=screenshots / f"{width}-{scheme}-answer.png")
    page.locator("#code-button").click()
    page.screenshot(path=screenshots / f"{width}-{scheme}-code.png")
    page.locator("#code-close").click()
    if page.locator("#settings-button").is_visible():
        page.locator("#settings-button").click()
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator("#settings").scroll_into_view_if_needed()
    page.screenshot(path=screenshots / f"{width}-{scheme}-settings.png")


class TestServer:
    """The page that the server over the tiny model gives."""

    def test_a_dropped_image_is_answered(self, living, live, pipeline, requests, complaints):
        drop(living)
        ask(living, QUESTION)
        expected = pipeline.generate(Request(QUESTION, [DIGITS]))[0]
        answer = living.locator(".answer")
        assert answer.inner_text() == expected.text == "92059"
        assert answer.evaluate("answer => answer.childNodes.length") == 5  # it came token by token
        facts = living.locator(".facts").inner_text().replace("\n", " ")
        assert f"Prompt {expected.prompt_tokens} tokens Of images {expected.images[0].tokens} tokens" in facts
        assert all(url.startswith((live, "data:")) for url in requests)
        assert not complaints

    def test_a_dropped_video_is_answered(self, living, pipeline, complaints, tmp_path):
        path = save_video(tmp_path / "digits.mp4", digit_pictures(), rate=1)
        drop(living, path, "video/mp4")
        ask(living, QUESTION)
        expected = pipeline.generate(Request(QUESTION, videos=[path.read_bytes()]))[0]
        assert living.locator(".answer").inner_text() == expected.text
        facts = living.locator(".facts").inner_text().replace("\n", " ")
        assert f"Prompt {expected.prompt_tokens} tokens Of images {expected.videos[0].tokens} tokens" in facts
        assert not complaints

    def test_stop_cancels_it_in_the_service(self, living, service, complaints):
        before = service.counters()
        set_schema(living, {"type": "array", "items": {"const": 0}, "minItems": 250}, 500)
        ask(living, QUESTION, ends=False)
        playwright.expect(living.locator(".answer")).to_contain_text("[")
        living.locator("#stop").click()
        playwright.expect(living.locator(".reply")).to_contain_text("Stopped.")
        idle(service)
        after = service.counters()
        assert (after.cancelled, after.finished) == (before.cancelled + 1, before.finished)
        assert not complaints

    def test_answers_fit_the_schema(self, living, complaints):
        values = {"digits": {"type": "array", "items": {"enum": ["two", "nine"]}, "maxItems": 3}}
        schema = {"type": "object", "properties": values, "required": ["digits"], "additionalProperties": False}
        set_schema(living, schema)
        living.locator("#temperature").fill("1.5")
        for seed in range(3):
            living.locator("#seed").fill(str(seed))
            ask(living, QUESTION)
            jsonschema.validate(json.loads(living.locator(".answer").last.inner_text()), schema)
        assert living.locator(".reply .note").count() == 0
        living.locator("#max_tokens").fill("2")
        ask(living, QUESTION)
        assert "it may not fit the schema" in living.locator(".reply .note").inner_text()
        assert not complaints

    def test_a_schema_that_cannot_be_compiled_says_why(self, living):
        set_schema(living, {"type": "nope"})
        ask(living, QUESTION)
        assert "nope" in living.locator(".reply .error").inner_text()
        assert living.locator("#prompt").input_value() == QUESTION

    def test_boxes_of_an_answer(self, living):
        set_schema(living, {"const": [{"bbox_2d": [70, 14, 140, 42], "label": "two"}]})
        drop(living)
        ask(living, QUESTION)
        assert shares(living) == [pytest.approx([70 / 280, 14 / 56, 70 / 280, 28 / 56], abs=0.005)]

    @pytest.mark.parametrize("language", ["curl", "python"])
    def test_the_request_as_code_runs(self, visit, service, pipeline, tmp_path, language):
        if not shutil.which("curl"):
            pytest.skip("curl is not installed")
        name = tmp_path / "it's $HOME.png"
        name.write_bytes(DIGITS)
        with opened(service, pipeline, api_keys=["a $key"]) as (_, address):
            page = visit(address, model="")
            page.locator("#key").fill("a $key")
            page.keyboard.press("Tab")
            playwright.expect(page.locator("#model")).to_have_text("tiny")
            drop(page, name)
            page.locator("#prompt").fill(QUESTION)
            page.locator("#code-button").click()
            page.locator("#language").select_option(language)
            done = run_code(page.locator("#code-text").inner_text(), language, tmp_path, API_KEY="a $key")
            page.locator("#code-close").click()
        if language == "curl":
            *events, last = [line[6:] for line in done.stdout.splitlines() if line]
            choices = [choice for event in events for choice in json.loads(event)["choices"]]
            assert ("".join(choice["delta"].get("content") or "" for choice in choices), last) == ("92059", "[DONE]")
        else:
            assert done.stdout == "92059\n"

    def test_it_waits_for_the_model(self, visit, service, pipeline, complaints):
        app = App(ServerSettings("tiny"))
        with serving(app) as address:
            page = visit(address, model="tiny is loading")
            drop(page)
            assert "267 \u00d7 70" in page.locator("#files").inner_text()
            app.open(service, pipeline)
            playwright.expect(page.locator("#model")).to_have_text("tiny")
            assert "280 \u00d7 56, 20 tokens" in page.locator("#files").inner_text()
            ask(page, QUESTION)
            assert page.locator(".answer").inner_text() == "92059"
        assert not complaints

    def test_the_picture_in_the_readme(self, visit, live, screenshots, complaints):
        """``SCREENSHOTS=docs python -m pytest tests/serving/test_page.py -k readme`` makes it anew."""
        page = visit(live, viewport={"width": 1080, "height": 560}, device_scale_factor=2)
        for _ in range(2):  # the second answer has the times of a server that is warm
            page.locator("#clear").press("Enter")
            drop(page)
            ask(page, QUESTION)
        page.evaluate("document.activeElement.blur()")
        page.screenshot(path=screenshots / "page.png", animations="disabled")
        for path in (screenshots / "page.png", ROOT / "docs" / "page.png"):
            with Image.open(path) as picture:
                assert picture.size == (2160, 1120)
        assert 'src="docs/page.png"' in (ROOT / "README.md").read_text(encoding="utf-8")
        assert not complaints


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
