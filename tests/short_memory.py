"""Rollcall whose workers remember tokens for a moment, so that a test need not wait for long."""

from __future__ import annotations

from app import create_app, tokens
from app.token_cache import TokenCache

app = create_app()
app.extensions["rollcall_tokens"] = TokenCache(tokens.find, tokens.note_use, lifetime=0.2)
