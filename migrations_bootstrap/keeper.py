"""Keep one PostgreSQL server for as long as somebody uses it.

embedded.py runs this file by its path, in a process of its own, so it imports the standard library
only. Four lock files say what is true, and the kernel lets go of them whatever way a process ends:

- `users.lock`: every process that uses the server shares it; whoever gets it alone is the last one;
- `start.lock`: held by the one process that is just now looking after the start;
- `keeper.lock`: held by the keeper for its life;
- `server.lock`: inherited by initdb, postgres and its backends, so it is free when *all* of them
  are gone. A server started earlier meets "pre-existing shared memory block is still in use".
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

PORT = 5432  # nothing listens on it: it is the end of the socket's name
POLL = 0.1  # seconds between two looks at the server and its users
STOP_PATIENCE = 30.0  # seconds for a fast shutdown, which writes a checkpoint
QUIT_PATIENCE = 5.0  # seconds for an immediate one, which does not
PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Loaded before any fork, and a function that does nothing where there is no prctl (macOS).
prctl: Callable[[int, int], object] = getattr(ctypes.CDLL(None), "prctl", lambda *_: 0)


class Task(NamedTuple):
    """What a keeper is told to run; JSON on its command line."""

    directory: str  # holds the lock files
    home: str  # holds `data`; belongs to the server's user
    sockets: str  # holds the socket; belongs to the server's user
    binaries: str
    settings: dict[str, str]
    account: dict[str, Any]  # Popen's user, group and extra_groups; empty: the keeper's own


def try_lock(descriptor: int, operation: int) -> bool:
    """Tell whether `descriptor` holds the flock now."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take_lock(path: Path, operation: int, patience: float) -> int:
    """Return a descriptor, closed on exec, that holds a flock on `path`.

    Raises TimeoutError when others kept it for `patience` seconds. Closing the descriptor gives the
    lock back, unless a fork has copied it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + patience
    while not try_lock(descriptor, operation):
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise TimeoutError(f"{path} was locked by another process for {patience:g} s")
        time.sleep(0.01)
    return descriptor


def give_back(descriptor: int) -> None:
    """Unlock, even if a fork in another thread has copied the descriptor meanwhile, and close."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def postmaster_file(home: str) -> list[str]:
    """Return the lines of postmaster.pid: the process id, six others, then the status."""
    with contextlib.suppress(FileNotFoundError):
        return Path(home, "data", "postmaster.pid").read_text(errors="replace").splitlines()
    return []


def accepts(sockets: str) -> bool:
    """Tell whether a server listens on the socket in that folder."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        return client.connect_ex(f"{sockets}/.s.PGSQL.{PORT}") == 0


def is_ready(home: str, sockets: str) -> bool:
    """Tell whether the server takes connections.

    The file of a killed server still says ready, so the socket is asked too. A new server writes
    "starting" into the file before it opens the socket: both together cannot be wrong.
    """
    return [line.strip() for line in postmaster_file(home)[7:]] == ["ready"] and accepts(sockets)


def die_with_keeper(keeper: int) -> None:
    """Have Linux interrupt this process when the keeper is killed; runs between fork and exec.

    After the change of user, which clears the death signal. The keeper may be gone already.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGINT)
    if os.getppid() != keeper:
        os._exit(1)


def forget_stale_pid(lock_file: Path, data: Path) -> None:
    """Remove a PostgreSQL lock file that names a process which is no postmaster of `data`.

    PostgreSQL believes any live process of its user, and in a restarted container the numbers begin
    again at 1. A postmaster's working directory is its data. Without /proc nothing is removed.
    """
    with contextlib.suppress(FileNotFoundError, IndexError):
        process = Path("/proc", lock_file.read_text().split()[0].lstrip("-"), "cwd")
        if Path("/proc/self").exists() and not is_same_folder(process, data):
            lock_file.unlink()


def is_same_folder(link: Path, folder: Path) -> bool:
    """Tell whether both lead to one folder; a dead process's, or another user's, leads nowhere."""
    try:
        return os.path.samefile(link, folder)
    except OSError:
        return False


def stop(server: subprocess.Popen[bytes]) -> None:
    """Stop the server and wait until it is gone, the gentlest way it obeys."""
    for number, patience in ((signal.SIGINT, STOP_PATIENCE), (signal.SIGQUIT, QUIT_PATIENCE)):
        server.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience)
    server.kill()
    server.wait()


class Keeper:
    """Runs the server. Single-threaded: the death signal is tied to the thread that forks."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.home = Path(task.home)
        self.data = self.home / "data"
        self.users = os.open(Path(task.directory, "users.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        self.told_to_stop = False

    def tell_to_stop(self, _number: int, _frame: FrameType | None) -> None:
        self.told_to_stop = True

    def run(self) -> None:
        """Return when nobody needs the server any more and it is stopped.

        Raises RuntimeError when the server gave up by itself. One that was killed is started again.
        """
        while self.wanted():
            server = self.start()
            try:
                self.watch(server)
            finally:
                stop(server)
        with contextlib.suppress(OSError):  # not empty when it is the home
            os.rmdir(self.task.sockets)

    def wanted(self) -> bool:
        """Tell whether anybody uses the server.

        When nobody does, the users' lock is the keeper's from here on: who comes now waits until
        the keeper is gone.
        """
        return not self.told_to_stop and not try_lock(self.users, fcntl.LOCK_EX)

    def watch(self, server: subprocess.Popen[bytes]) -> None:
        """Return when the server is not wanted any more or was killed."""
        while self.wanted() and server.poll() is None:
            time.sleep(POLL)
        if server.returncode and server.returncode > 0:
            raise RuntimeError(f"postgres gave up with status {server.returncode}")

    def start(self) -> subprocess.Popen[bytes]:
        """Start postgres as soon as nothing is left of the one before, making its data first."""
        self.stop_orphan()
        lock = take_lock(Path(self.task.directory, "server.lock"), fcntl.LOCK_EX, STOP_PATIENCE)
        try:
            if not self.data.exists():
                self.make_data(lock)
            forget_stale_pid(self.data / "postmaster.pid", self.data)
            forget_stale_pid(Path(self.task.sockets, f".s.PGSQL.{PORT}.lock"), self.data)
            return self.spawn("postgres", *self.options(), lock=lock)
        finally:
            os.close(lock)  # from now on only the server holds it

    def stop_orphan(self) -> None:
        """Stop a server that outlived its keeper, as it does without a death signal (macOS)."""
        if accepts(self.task.sockets):
            # As the server's user, whose file it is: a wrong number in it does no harm then.
            command = [
                "/bin/sh",
                "-c",
                'kill -INT "$@"',
                "sh",
                *postmaster_file(self.task.home)[:1],
            ]
            subprocess.run(command, check=False, **self.task.account)  # noqa: S603 - ours

    def make_data(self, lock: int) -> None:
        """Run initdb; `data` appears all at once, so that a killed start leaves none or all."""
        new = self.home / "data.new"
        if new.exists():
            shutil.rmtree(new)
        # --auth=trust: only the server's user can enter the folder of the socket.
        arguments = ["--username=postgres", "--auth=trust", "--locale=C.UTF-8", "--encoding=UTF8"]
        if self.task.settings.get("fsync") == "off":
            arguments.append("--no-sync")
        initdb = self.spawn("initdb", "-D", str(new), "--no-instructions", *arguments, lock=lock)
        if status := initdb.wait():
            raise RuntimeError(f"initdb gave up with status {status}")
        new.rename(self.data)

    def options(self) -> list[str]:
        """Return the command line of postgres; its own settings come last, so they win."""
        settings = {
            "max_connections": "200",
            **self.task.settings,
            "listen_addresses": "",
            "port": str(PORT),
            "unix_socket_directories": self.task.sockets,
            "unix_socket_permissions": "0700",
        }
        return ["-D", str(self.data), *(f"-c{name}={value}" for name, value in settings.items())]

    def spawn(self, program: str, *arguments: str, lock: int) -> subprocess.Popen[bytes]:
        """Start a program as the server's user, with nothing of the caller's environment."""
        return subprocess.Popen(  # noqa: S603 - the arguments are ours
            [f"{self.task.binaries}/{program}", *arguments],
            cwd=self.home,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "HOME": str(self.home)},
            pass_fds=[lock],
            preexec_fn=partial(die_with_keeper, os.getpid()),
            **self.task.account,
        )


def main(task: Task) -> None:
    """Go on as a daemon, once the keeper lock is held: who waits for this process may look at it.

    Raises TimeoutError when there is another keeper.
    """
    # Not at once: others take the lock for an instant to see whether there is a keeper.
    take_lock(Path(task.directory, "keeper.lock"), fcntl.LOCK_EX, patience=5)
    if os.fork():
        os._exit(0)  # so that the caller leaves no zombie
    os.chdir("/")
    keeper = Keeper(task)
    # A caller may have ignored or blocked any of these, and both are inherited.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, keeper.tell_to_stop)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    keeper.run()


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
