"""Say on what, with what and how it was measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.load import BURST, CONNECTIONS, require_wrk
from benchmarks.plan import Plan
from benchmarks.postgres import SETTINGS, Databases
from benchmarks.results import Results
from benchmarks.roster import PROCESSES, THREADS

PACKAGES = (
    "flask",
    "flask-restx",
    "flask-sqlalchemy",
    "sqlalchemy",
    "marshmallow",
    "psycopg2-binary",
    "gunicorn",
    "django",
    "djangorestframework",
    "fastapi",
    "pydantic",
    "uvicorn",
    "uvloop",
    "httptools",
    "asyncpg",
)


def describe(results: Results, databases: Databases, plan: Plan) -> None:
    """Put into the results what a reader needs to judge them."""
    results.machine = {
        "processor": processor(),
        "cores used": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "file system of the data": file_system(databases.server.home),
    }
    results.versions = {
        "Python": platform.python_version(),
        "PostgreSQL": str(databases.ask("SHOW server_version")[0][0]).split()[0],
        "wrk": wrk_version(),
        **{package: version(package) for package in PACKAGES},
    }
    settings = ", ".join(f"{name} = {value}" for name, value in SETTINGS.items())
    results.conditions = {
        "date": f"{datetime.now(timezone.utc):%d %B %Y}",
        "rounds": str(plan.rounds),
        "each measurement": f"{plan.seconds:g} s in bursts of {BURST} s, "
        f"after {plan.warm_up:g} s of warm-up",
        "connections": str(CONNECTIONS),
        "processes of each service": str(PROCESSES),
        "threads of each of Rollcall's": str(THREADS),
        "PostgreSQL's settings": f"as it comes (fsync on), {settings}",
    }


def processor() -> str:
    """Return the processor's name."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def file_system(folder: Path) -> str:
    """Return the type of the file system that a folder is on."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next(mounts[parent] for parent in (folder, *folder.parents) if parent in mounts)


def wrk_version() -> str:
    """Return wrk's version; it prints that with its help, and fails."""
    said = subprocess.run([require_wrk(), "-v"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"wrk (\S+)", said)
    return found[1] if found else "unknown"
