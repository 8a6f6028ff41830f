"""Rollcall without metrics: what it would be if nobody counted."""

from app import get_or_create, metrics, transactions
from wsgi import app

__all__ = ["app"]

metrics.count_request = lambda *known: None
get_or_create.on_outcome.clear()
transactions.on_retry.clear()
