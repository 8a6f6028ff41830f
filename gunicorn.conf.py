"""How gunicorn serves Rollcall: ``gunicorn wsgi:app`` reads this file."""

import atexit
import fcntl
import gc
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

FOLDER_OF_METRICS = "rollcall-metrics-"
BEING_MADE = 60  # seconds; nobody needs that long from a folder to its lock


def make_folder_for_metrics():
    """Make the folder where the counts of all workers meet, and have it go with this process.

    prometheus_client looks at the variable when it is imported, by app or by us.
    """
    master, folder = os.getpid(), tempfile.mkdtemp(prefix=FOLDER_OF_METRICS)
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)  # with us and all workers, until death
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    # Workers inherit this, and end by themselves.
    atexit.register(lambda: os.getpid() == master and shutil.rmtree(folder))


def remove_abandoned_folders():
    """Remove the folders of masters that were killed: ours to remove, and locked by nobody."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_OF_METRICS}*"):
        with suppress(OSError):  # it is another user's, in use, or just being removed
            remove_if_abandoned(folder)


def remove_if_abandoned(folder):
    """Raises OSError, also where the folder is in use."""
    found = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        state = os.stat(found)
        if state.st_uid == os.geteuid() and state.st_mtime < time.time() - BEING_MADE:
            fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    finally:
        os.close(found)


if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    remove_abandoned_folders()
    make_folder_for_metrics()

gc.disable()  # as in wsgi.py

from gunicorn.errors import HaltServer  # noqa: E402
from prometheus_client.multiprocess import mark_process_dead  # noqa: E402

from app import create_app, token_file  # noqa: E402
from app.config import load_settings  # noqa: E402
from app.database import administering, bootstrap_database, forget_connections  # noqa: E402
from app.errors import ConfigurationError  # noqa: E402
from app.loopback import require_loopback  # noqa: E402
from app.metrics import bring_up_to_date  # noqa: E402
from migrations_bootstrap import BootstrapError  # noqa: E402

gc.enable()

try:
    settings = load_settings()
except ConfigurationError as error:
    sys.exit(f"rollcall: {error}")

bind = settings.address
workers = settings.workers
worker_class = "app.worker.Worker"
logger_class = "app.worker.Log"
threads = settings.threads
# How long a connection is kept on which nothing has been sent.
keepalive = 5
# Answers are sent by the worker's main thread, as slowly as clients take them.
sendfile = False
# For a worker that is stuck as a whole; a slow request of a thread does not count.
timeout = 60
graceful_timeout = 30
loglevel = settings.log_level.lower()
control_socket_disable = True

MANY = 8192  # file descriptors
RESERVED = 256  # of them, for the database, logs and the rest


def descriptors():
    """Let each worker open as many files as it is allowed to, up to MANY; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = max(soft, MANY if hard == resource.RLIM_INFINITY else min(hard, MANY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed


# Of each worker. With one more, the one that has waited longest is closed. An idle one takes 4 kB.
worker_connections = max(100, min(4096, descriptors() - RESERVED))

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def on_starting(server):
    """Bring the database up once, before the workers; stop with one line where that fails."""
    os.register_at_fork(
        before=hold_stops_back, after_in_parent=let_stops_in, after_in_child=be_mortal
    )
    try:
        settings = load_settings()  # once more: --env may have changed the environment
        require_loopback(settings, server.cfg.address)
        token = token_file.read_token(settings)
    except ConfigurationError as error:
        sys.exit(f"rollcall: {error}")
    try:
        with create_app().app_context():
            bootstrap_database()
            keep_admin_token(token)
    except (BootstrapError, ConfigurationError) as error:
        server.log.critical("%s", error)
        sys.exit(1)


def keep_admin_token(token):
    """Have the token that was read from a file, if one was, be good from now on."""
    if token is not None:
        with administering() as engine:
            token_file.keep_token(engine, token)
            engine.dispose()  # no worker is to have its connection


def pre_fork(server, worker):
    """Let no worker begin where it must not: the sockets may be others than were configured.

    They may come from systemd or from another process, or with a reload.
    """
    addresses = [listener.getsockname() for listener in server.LISTENERS]
    try:
        require_loopback(load_settings(), addresses)
    except ConfigurationError as error:
        raise HaltServer(f"rollcall: {error}", 1) from None


def when_ready(server):
    """Say where to look."""
    for address in map(str, server.LISTENERS):
        if address.startswith("http"):
            server.log.info("Swagger UI: %s/api/v1/", address)


def post_fork(server, worker):
    """Begin a worker's life with no connection that another process opened."""
    if server.cfg.preload_app:
        with worker.app.wsgi().app_context():
            forget_connections()


def worker_exit(server, worker):
    """Count what a worker did in its last second."""
    bring_up_to_date()


def child_exit(server, worker):
    """Take what a worker held, such as connections, out of the metrics; what it counted stays."""
    mark_process_dead(worker.pid)


def hold_stops_back():
    """Have the kernel keep signals to stop until we or the worker are ready for them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)


def let_stops_in():
    """Take signals to stop again, and what came meanwhile."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def be_mortal():
    """Have signals to stop end a new worker, which has nothing to finish yet.

    Until it sets its own handlers it has the master's. They would swallow the signal, and the
    master would wait for the worker until graceful_timeout is over.
    """
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)
    let_stops_in()
