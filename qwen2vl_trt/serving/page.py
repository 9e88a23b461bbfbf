"""The page at ``/``: one file, and the headers that keep it to its own script, style and server."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from pathlib import Path


def page() -> tuple[bytes, dict[str, str]]:
    """Body and headers. The policy names the inline script and style by their SHA-256, so no other one runs."""
    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    policy = (
        "default-src 'none'",
        f"script-src {_hash(text, 'script')}",
        f"style-src {_hash(text, 'style')}",
        "img-src data: blob:",
        "media-src data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return text.encode(), {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _hash(text: str, tag: str) -> str:
    """What a policy calls the only element of that name."""
    (inner,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"
