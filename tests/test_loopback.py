"""Without authentication the service is for its own machine alone."""

from __future__ import annotations

import os
import socket
import subprocess
from typing import Any

import pytest

from app.config import load_settings
from app.errors import ConfigurationError
from app.loopback import require_loopback
from tests.serving import GUNICORN, ROOT

OFF = load_settings({"ROLLCALL_AUTH": "off"})
ON = load_settings({"ROLLCALL_AUTH": "token"})
OUTSIDE: list[Any] = [
    ("0.0.0.0", 80),
    ("::", 80, 0, 0),
    ("", 80),
    ("192.0.2.1", 80),
    ("0", 80),
    ("nosuch.invalid", 80),
    ("x" * 70, 80),
    ("fe80::1", 80),
    (2, 80),
]


@pytest.mark.parametrize("address", OUTSIDE)
def test_an_address_that_others_reach_needs_authentication(address: Any) -> None:
    """Also a name that stands for nothing one knows of."""
    with pytest.raises(ConfigurationError, match=r"ROLLCALL_AUTH is off.*not a loopback address"):
        require_loopback(OFF, [("127.0.0.1", 80), address])
    require_loopback(ON, [address])


def test_this_machine_and_unix_sockets_need_none() -> None:
    """By address and by name; a descriptor is looked at when its socket is there."""
    inside = [("127.0.0.1", 80), ("127.8.8.8", 80), ("::1", 80, 0, 0), ("localhost", 80)]
    require_loopback(OFF, [*inside, "/run/rollcall.sock", b"\0abstract", "", 3])


def test_a_name_is_loopback_only_if_all_it_stands_for_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have several addresses."""
    known = [(0, 0, 0, "", ("127.0.0.1", 0)), (0, 0, 0, "", ("192.0.2.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: known)
    with pytest.raises(ConfigurationError, match=r"two\.faced"):
        require_loopback(OFF, [("two.faced", 80)])


def gunicorn(*arguments: str, files: tuple[int, ...] = (), **environment: str) -> tuple[int, str]:
    """Run it to its end; return its exit status and what it said."""
    done = subprocess.run(
        [GUNICORN, *arguments, "wsgi:app"],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        pass_fds=files,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "environment",
    [
        {"ROLLCALL_AUTH": "off", "BIND": "0.0.0.0"},
        {"GUNICORN_CMD_ARGS": "--bind 127.0.0.1:0 --bind :0 --env ROLLCALL_AUTH=off"},
    ],
)
def test_gunicorn_refuses_to_start(environment: dict[str, str]) -> None:
    """With one line, before it looks for a database, however it was told."""
    status, said = gunicorn(DATABASE_URL="postgresql://u@127.0.0.1:1/d", **environment)
    (line,) = [line for line in said.splitlines() if '"info"' not in line]
    assert (status, line.partition(", which")[0]) == (1, "rollcall: ROLLCALL_AUTH is off")


def test_gunicorn_looks_at_the_sockets_that_it_was_given(database_url: str) -> None:
    """By systemd or another process; no worker begins."""
    with socket.create_server(("0.0.0.0", 0)) as listener:
        status, said = gunicorn(
            f"--bind=fd://{listener.fileno()}",
            files=(listener.fileno(),),
            DATABASE_URL=database_url,
            ROLLCALL_AUTH="off",
        )
    assert status == 1
    assert "rollcall: ROLLCALL_AUTH is off" in said
    assert "Booting worker" not in said
    assert "Traceback" not in said


def test_make_run_turns_authentication_off_for_itself_only() -> None:
    """And binds loopback: anybody else has to say so."""
    done = subprocess.run(
        ["make", "--dry-run", "run"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "ROLLCALL_AUTH=${ROLLCALL_AUTH:-off} exec" in done.stdout
    assert load_settings({}).auth == "token"
    assert load_settings({}).bind == "127.0.0.1"
