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

from tests.contract_hooks import after_call
from tests.serving import ROOT, Service, serving, settings_with_token

HERE = Path(__file__).parent
SCHEMATHESIS = str(Path(sys.executable).with_name("schemathesis"))


def test_the_service_does_what_its_document_says(database_url: str, tmp_path: Path) -> None:
    """With all of schemathesis's checks, and stateful; the same data in each run."""
    settings = settings_with_token(database_url, tmp_path)
    with serving(tmp_path, **settings) as service:
        said = compare(service, tmp_path, "--max-examples=10", "--generation-deterministic")
    assert "Tested: 18" in said


def compare(service: Service, folder: Path, *options: str) -> str:
    """Compare a service with its document; return what schemathesis says, who finds nothing."""
    done = subprocess.run(
        [
            SCHEMATHESIS,
            f"--config-file={HERE / 'schemathesis.toml'}",
            "run",
            f"http://127.0.0.1:{service.port}/api/v1/swagger.json",
            f"--header=Authorization: Bearer {(folder / 'token').read_text()}",
            "--checks=all",
            "--continue-on-failure",
            "--warnings=off",
            "--no-color",
            *options,
        ],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": "tests.contract_hooks",
            "SCHEMATHESIS_COVERAGE": "false",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unforeseen" not in service.log.read_text()
    return done.stdout


@pytest.mark.parametrize(("status", "given"), [(204, True), (304, True), (200, False)])
def test_only_what_has_no_content_is_given_a_type(status: int, given: bool) -> None:
    """The hook mends nothing that the document says."""
    response = SimpleNamespace(status_code=status, headers={})
    after_call(None, None, response)
    assert ("content-type" in response.headers) is given
