"""Who is asking: a browser, known by a cookie of ours, or a program, known by its session.

What a visitor is called here is a hash. Neither the cookie nor the session's name is ever used as a file's name.
"""

from __future__ import annotations

import hashlib
import re
import secrets

import gradio as gr

__all__ = ["COOKIE", "new_cookie", "valid_cookie", "visitor_of"]

COOKIE = "dora_visitor"


def new_cookie() -> str:
    return secrets.token_urlsafe(24)


def valid_cookie(value: str | None) -> bool:
    return bool(value and re.fullmatch(r"[A-Za-z0-9_-]{32}", value))


def visitor_of(page: gr.Request) -> str:
    """Sixteen letters that stand for the visitor, in paths too."""
    cookie = (page.cookies or {}).get(COOKIE) if page.request is not None else None
    known_by = f"cookie {cookie}" if valid_cookie(cookie) else f"session {page.session_hash}"
    return hashlib.sha256(known_by.encode()).hexdigest()[:16]
