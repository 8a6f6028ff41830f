"""The Swagger document and the service say the same, as schemathesis finds out.

It reads the document, sends what is valid by it and what is not, in sequences too, and checks each
answer: status, headers, content, and that nothing is to be had without a token.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.tokens import new_token
from tests.contract_hooks import after_call
from tests.serving import ROOT, serving

HERE = Path(__file__).parent
SCHEMATHESIS = str(Path(sys.executable).with_name("schemathesis"))


def test_the_service_does_what_its_document_says(database_url: str, tmp_path: Path) -> None:
    """With all of schemathesis's checks, and stateful; the same data in each run."""
    token = new_token()
    (tmp_path / "token").write_text(token)
    with serving(
        tmp_path,
        DATABASE_URL=database_url,
        ROLLCALL_AUTH="token",
        ROLLCALL_ADMIN_TOKEN_FILE=str(tmp_path / "token"),
    ) as service:
        done = subprocess.run(
            [
                SCHEMATHESIS,
                f"--config-file={HERE / 'schemathesis.toml'}",
                "run",
                f"http://127.0.0.1:{service.port}/api/v1/swagger.json",
                f"--header=Authorization: Bearer {token}",
                "--checks=all",
                "--max-examples=10",
                "--generation-deterministic",
                "--continue-on-failure",
                "--warnings=off",
                "--no-color",
            ],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "SCHEMATHESIS_HOOKS": "tests.contract_hooks",
                "SCHEMATHESIS_COVERAGE": "false",
            },
            capture_output=True,
            text=True,
        )
        log = service.log.read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Tested: 18" in done.stdout
    assert "unforeseen" not in log


@pytest.mark.parametrize(("status", "given"), [(204, True), (304, True), (200, False)])
def test_only_what_has_no_content_is_given_a_type(status: int, given: bool) -> None:
    """The hook mends nothing that the document says."""
    response = SimpleNamespace(status_code=status, headers={})
    after_call(None, None, response)
    assert ("content-type" in response.headers) is given
