# ruff: noqa: RUF001  (texts of many scripts)
"""Conversations as users write them: messages, and how many images and videos they have."""

SCRIPTS = (
    "What is in the picture?",
    "¿Qué hay en la imagen? ¡Dímelo ya!",
    "图片里有什么？请用中文回答。",
    "この画像には何が写っていますか？",
    "이 사진에 무엇이 있나요?",
    "Что изображено на картинке?",
    "ما الموجود في الصورة؟",
    "מה יש בתמונה?",
    "इस तस्वीर में क्या है?",
    "รูปนี้มีอะไรบ้าง",
    "Τι υπάρχει στην εικόνα;",
    "emoji 👩🏽‍🚀🇨🇭 zwj, combining e\u0301 against é",
    "tabs\tand\r\nline ends\n\n\nand   spaces  ",
    "code: def f(x):\n    return {'a': [1, 2.5e-3]}  # 12345678901234567890",
    "it's we'LL they're I'm 'quoted'",
    "\u200bzero width\u00a0no-break\ufeff",
    "{{ template }} {% raw %} </s> [INST]",
    " leading and trailing ",
    "\n",
)
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict:
    return {"role": "system", "content": content}


CONVERSATIONS = [
    *([user(text(script))] for script in SCRIPTS if script.strip()),
    *([user(IMAGE, text(script))] for script in SCRIPTS),
    [user(IMAGE)],
    [user(VIDEO)],
    [user(text("before "), IMAGE, text(" after"))],
    [user(text("Compare "), IMAGE, text(" with "), IMAGE, text("."))],
    [user(IMAGE, IMAGE, IMAGE)],
    [user(VIDEO, text("What happens?"))],
    [user(IMAGE, VIDEO, text("Is the picture from the video?"))],
    [user(text("A"), VIDEO, text("B"), IMAGE, text("C"), VIDEO)],
    [system("You read digits."), user(IMAGE, text("Which?"))],
    [system(""), user(text("Hello"))],
    [user(text("one")), assistant("two"), user(text("three"))],
    [user(IMAGE, text("one")), assistant("two"), user(IMAGE, text("three"))],
    [user(IMAGE, text("one")), assistant("two"), user(text("three")), assistant("four"), user(VIDEO, text("five"))],
    [system("s"), user(text("1")), assistant("2"), user(text("3")), assistant("4"), user(text("5"))],
    [user(text("")), assistant("I am here."), user(text("Go on."))],
    [user(text("a"), text("b"), text("c"))],
    [{"role": "user", "content": "a plain string"}],
    [{"role": "user", "content": "<image> and <video> in a plain string are text"}],
    [system("s"), {"role": "user", "content": "x"}, assistant("y"), {"role": "user", "content": "z"}],
    [user(text("call")), assistant("calling"), {"role": "tool", "content": "42"}],
    [user({"image": None}, {"text": "parts without a type"})],
]


def counts(messages: list[dict]) -> tuple[int, int]:
    """Images and videos that the parts have places for."""
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    images = sum(part.get("type") == "image" or "image" in part for part in parts)
    return images, sum(part.get("type") == "video" for part in parts)
