"""What commands that take long have in common: progress, Ctrl-C, and an end in one line."""

from __future__ import annotations

import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import click
import psycopg2
from psycopg2 import extensions
from sqlalchemy.exc import SQLAlchemyError

from app.errors import RollcallError, UnknownReference, UnknownTable
from migrations_bootstrap import BootstrapError

PROGRESS_EVERY = 5.0  # seconds, where there is no terminal
REDRAW_EVERY = 0.2  # seconds, on a terminal
STOPPED = 130  # the exit status that shells give after Ctrl-C
LOOK_UP_EVERY = 0.2  # seconds, while the server works

# Back to the first column, and clear what is there.
CLEAR = "\r\x1b[K"


def now_and_then() -> Callable[[str], None]:
    """Return what prints a line, unless it printed another just now."""
    printed = time.monotonic()

    def say(line: str) -> None:
        nonlocal printed
        if time.monotonic() - printed >= PROGRESS_EVERY:
            printed = time.monotonic()
            click.echo(line, err=True)

    return say


def words(error: Exception) -> str:
    """Return what an operator needs of an error, in one line: of the database's, its own words."""
    original = getattr(error, "orig", None)
    primary = getattr(getattr(original, "diag", None), "message_primary", None)
    said = str(primary or original or error).strip().partition("\n")[0]
    return " ".join(said.split()) or "the database is away"


@contextmanager
def one_line_ends() -> Iterator[None]:
    """End a command with one line, and an exit status, for an error and for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("Stopped.", err=True)
        raise SystemExit(STOPPED) from None
    except UnknownReference as error:
        raise click.ClickException(f"ROLLCALL_SOFT_REFERENCES: {error}") from None
    except UnknownTable as error:
        raise click.ClickException(f"{error}: run flask init-db first") from None
    except (RollcallError, BootstrapError, SQLAlchemyError) as error:
        raise click.ClickException(words(error)) from None


class Progress:
    """Says on standard error how far it is: in place on a terminal, a line now and then elsewhere.

    ``in_place`` is False where standard output may be the same terminal, and busy.
    """

    def __init__(self, in_place: bool = True) -> None:
        self.state = "connecting"
        self._in_place = in_place and sys.stderr.isatty()
        self._started = time.monotonic()
        self._say = self._redraw if self._in_place else now_and_then()
        self._drawn = 0.0

    def update(self, state: str) -> None:
        """Note what is being done, and say it if it is time to."""
        self.state = state
        self.tick()

    def tick(self) -> None:
        """Say how far it is, if it is time to."""
        self._say(f"{self.state}, {time.monotonic() - self._started:.0f} s")

    def clear(self) -> None:
        """Leave the terminal's line empty."""
        if self._drawn:
            click.echo(CLEAR, nl=False, err=True)
            self._drawn = 0.0

    def _redraw(self, line: str) -> None:
        if time.monotonic() - self._drawn >= REDRAW_EVERY:
            self._drawn = time.monotonic()
            click.echo(f"{CLEAR}{line}", nl=False, err=True)


@contextmanager
def progress(in_place: bool = True) -> Iterator[Progress]:
    """Yield what shows progress, also while the server works, which Ctrl-C then ends."""
    shown = Progress(in_place)
    try:
        with interruptible(shown.tick):
            yield shown
    finally:
        shown.clear()


@contextmanager
def interruptible(tick: Callable[[], object]) -> Iterator[None]:
    """Let Ctrl-C end a statement that the server works on, and call ``tick`` while it does.

    psycopg2 otherwise looks up only when there is an answer. Its callback is for the process, and
    for nothing else than a command. Python interrupts its main thread alone: the others, which may
    wait for a lock, look whether it was.
    """
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def wait(connection: Any) -> None:
        try:
            while state := connection.poll():
                if interrupted.is_set():
                    raise KeyboardInterrupt
                reading, writing = state == extensions.POLL_READ, state == extensions.POLL_WRITE
                descriptor = [connection.fileno()]
                select.select(descriptor * reading, descriptor * writing, [], LOOK_UP_EVERY)
                tick()
        except KeyboardInterrupt:
            with suppress(psycopg2.Error):  # still connecting, or gone
                connection.cancel()
            raise

    before = extensions.get_wait_callback()
    extensions.set_wait_callback(wait)
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # in the background a shell has it ignored
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        extensions.set_wait_callback(before)
