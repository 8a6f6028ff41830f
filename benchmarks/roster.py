"""Who is measured: Rollcall, its peers, and the two ends of the scale.

All take ``POST /api/v1/employees`` with a name, a department's id and a title, and answer 201 or
200 with JSON. All run two processes. A peer has the class of worker and the number of threads that
it did best with; see "Fairness" in docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from app.config import Settings

PROJECT = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent
PROCESSES = 2
THREADS = Settings().threads  # Rollcall's own number, unless a peer does better with another


@dataclass(frozen=True)
class Peer:
    """A service to start, and the layout of the tables it works on."""

    name: str
    about: str
    layout: str | None
    command: Sequence[str]
    answers_employee: bool = True  # not so the constant answer, and not so pgbench


@dataclass(frozen=True)
class Layout:
    """How the empty tables of a peer are made."""

    name: str
    command: Sequence[str]


def program(name: str) -> str:
    """Return the path of a program of the environment that we run in."""
    return str(PROGRAMS / name)


def gunicorn(
    application: str, worker_class: str = "app.worker.Worker", threads: int = THREADS
) -> list[str]:
    """Return the command that serves a WSGI application as Rollcall is served.

    With Rollcall's own worker, which shares connections out evenly: all threaded peers profit.
    """
    return [
        program("gunicorn"),
        "--config=benchmarks/peers/gunicorn.conf.py",
        f"--worker-class={worker_class}",
        f"--threads={threads}",
        f"--workers={PROCESSES}",
        application,
    ]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("rollcall", [program("flask"), "--app=wsgi", "init-db"]),
        Layout("article", [program("flask"), "--app=benchmarks.peers.article", "create-tables"]),
        Layout(
            "article_indexed",
            [program("flask"), "--app=benchmarks.peers.article", "create-tables", "--index"],
        ),
        Layout("django", [program("python"), "-m", "benchmarks.peers.django_app", "migrate"]),
        Layout("fastapi", [program("python"), "-m", "benchmarks.peers.fastapi_app"]),
    )
}

PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "rollcall",
            "this service, as `make run` starts it",
            "rollcall",
            [program("gunicorn"), "wsgi:app"],
        ),
        Peer(
            "rollcall_async",
            "the same under FastAPI and uvicorn, on asyncpg",
            "rollcall",
            [
                program("uvicorn"),
                "--log-level=warning",
                f"--workers={PROCESSES}",
                "asgi:app",
            ],
        ),
        Peer(
            "article",
            "the mixin as articles write it: look up, add, commit, sleep and try again; no index",
            "article",
            gunicorn("benchmarks.peers.article:app"),
        ),
        Peer(
            "article_indexed",
            "the same, on a table that has an index on the name after all",
            "article_indexed",
            gunicorn("benchmarks.peers.article:app"),
        ),
        Peer(
            "django",
            "Django and its REST framework: `get_or_create` on a unique key",
            "django",
            gunicorn("benchmarks.peers.django_app.wsgi:application", "sync", 1),
        ),
        Peer(
            "fastapi",
            "FastAPI, async SQLAlchemy and asyncpg: `ON CONFLICT DO NOTHING` on a unique key",
            "fastapi",
            [
                program("uvicorn"),
                "--log-level=warning",
                "--no-access-log",
                f"--workers={PROCESSES}",
                "benchmarks.peers.fastapi_app:app",
            ],
        ),
        Peer(
            "bare",
            "a Flask view that sends Rollcall's statement by psycopg2 and checks nothing: "
            "the ceiling of this stack",
            "rollcall",
            gunicorn("benchmarks.peers.bare:app"),
        ),
        Peer(
            "bare_prepared",
            "the same, prepared once a connection, as Rollcall does it",
            "rollcall",
            ["env", "BARE_PREPARED=1", *gunicorn("benchmarks.peers.bare:app")],
        ),
        Peer(
            "hello",
            "a Flask-RESTX resource with a constant answer and no database: "
            "what HTTP alone costs in this stack",
            None,
            gunicorn("benchmarks.peers.hello:app"),
            answers_employee=False,
        ),
        Peer(
            "pgbench",
            "Rollcall's statement without HTTP and Python: the limit of the database",
            "rollcall",
            [],
            answers_employee=False,
        ),
    )
}


def variant(name: str) -> Peer:
    """Return a peer by name; ``bare:8`` is bare with 8 threads, ``bare:sync`` with sync workers.

    So that anybody can see whether another configuration would do a peer more justice.
    """
    plain, _, configuration = name.partition(":")
    peer = PEERS[plain]
    if not configuration:
        return peer
    if program("gunicorn") not in peer.command:
        raise ValueError(f"{plain} does not run under gunicorn")
    if configuration == "sync":
        options = ["--worker-class=sync", "--threads=1"]
    else:
        options = [f"--threads={int(configuration)}"]
        if "--worker-class=sync" in peer.command:
            options.append("--worker-class=gthread")
    command = [*peer.command[:-1], *options, peer.command[-1]]  # the last of each option counts
    return replace(peer, name=name, command=command)
