"""Start programs, wait for them, and end them whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.roster import PROJECT

PATIENCE = 30.0  # seconds for a start, and for a stop


class BenchmarkError(Exception):
    """What ends the run with one line."""


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a program to its end, in the project's folder, and return what it printed.

    In a process group of its own, as all programs here: Ctrl-C is for the harness, which ends them
    in order.
    """
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, complaints = process.communicate()
    finally:
        stop(process)
    if process.returncode:
        last = (f"{printed}{complaints}".strip().splitlines() or ["it says nothing"])[-1]
        raise BenchmarkError(f"{Path(command[0]).name} failed: {last}")
    return printed


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Keep a program running, in the project's folder; what it prints goes to the log."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Ask a program to stop, and end all of its processes if it does not."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(PATIENCE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{what}: not within {PATIENCE:g} s")
        time.sleep(0.02)
