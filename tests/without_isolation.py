"""Rollcall with its isolation level taken away, served so that the checker can be seen to mind."""

from __future__ import annotations

from app import create_app, transactions

transactions.SERIALIZABLE = "SET LOCAL enable_seqscan = off; "
app = create_app()
