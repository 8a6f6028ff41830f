"""docs/api.md: every request that it shows is answered as it says."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

from flask.testing import FlaskClient

PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text("utf-8")
LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
HOST = "localhost:8000"


def send(client: FlaskClient, command: str, tag: str) -> Any:
    """Do what curl would do."""
    words = shlex.split(command.replace("$TAG", tag.replace('"', r"\"")))
    values = dict(pairwise(words))
    given = [value for option, value in pairwise(words) if option == "-H"]
    (url,) = [word for word in words if word.startswith(HOST)]
    return client.open(
        url.removeprefix(HOST),
        method=values.get("-X", "POST" if "-d" in values else "GET"),
        data=values.get("-d"),
        headers=[header.split(": ", 1) for header in given],
    )


def test_every_request_is_answered_as_the_page_says(client: FlaskClient) -> None:
    """In its order, on an empty directory."""
    tag, said = "", []
    for line in LINES:
        if line.startswith("TAG="):
            (url,) = re.findall(rf"{HOST}(\S+)", line)
            tag = client.get(url).headers["ETag"]
            continue
        command, _, status = line.partition("  # ")
        said.append((command, int(status), send(client, command, tag).status_code))
    assert len(said) > 15
    assert [(command, answered) for command, _, answered in said] == [
        (command, status) for command, status, _ in said
    ]
    assert {status for _, status, _ in said} == {200, 201, 304, 404, 409, 412, 422}
