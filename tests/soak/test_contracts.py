"""Schemathesis compares both servers with their documents, ten times as long as the suite's one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.serving import Service, serving, serving_by_uvicorn, settings_with_token
from tests.test_contract import compare


@pytest.mark.parametrize(
    ("serve", "operations"), [(serving, 18), (serving_by_uvicorn, 15)], ids=["gunicorn", "uvicorn"]
)
def test_the_services_do_what_their_documents_say(
    database_url: str,
    tmp_path: Path,
    serve: Callable[..., AbstractContextManager[Service]],
    operations: int,
) -> None:
    """Other data in each run."""
    with serve(tmp_path, **settings_with_token(database_url, tmp_path)) as service:
        said = compare(service, tmp_path, "--max-examples=100")
    assert f"Tested: {operations}" in said
