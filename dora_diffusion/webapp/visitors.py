"""Who is asking: a browser, known by a cookie of ours, or a program, known by its session.

What a visitor is called here is a hash. Neither the cookie nor the session's name is ever used as a file's name.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets

import gradio as gr

__all__ = ["COOKIE", "cookie_for", "new_cookie", "valid_cookie", "visitor_known_by", "visitor_of"]

COOKIE = "dora_visitor"
_SECRET = secrets.token_bytes(32)


def new_cookie() -> str:
    return secrets.token_urlsafe(24)


def cookie_for(address: str) -> str:
    """What stands for a program at this address that keeps no cookie; nobody else can make it up."""
    return base64.urlsafe_b64encode(hmac.digest(_SECRET, address.encode(), "sha256")[:24]).decode()


def valid_cookie(value: str | None) -> bool:
    return bool(value and re.fullmatch(r"[A-Za-z0-9_-]{32}", value))


def visitor_known_by(cookie: str | None, session: str | None) -> str:
    """Sixteen letters that stand for the visitor, in paths too."""
    known_by = f"cookie {cookie}" if valid_cookie(cookie) else f"session {session}"
    return hashlib.sha256(known_by.encode()).hexdigest()[:16]


def visitor_of(page: gr.Request) -> str:
    """As visitor_known_by."""
    cookie = (page.cookies or {}).get(COOKIE) if page.request is not None else None
    return visitor_known_by(cookie, page.session_hash)
