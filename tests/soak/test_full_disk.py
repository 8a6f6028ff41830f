"""A disk that is really full: the tables are moved to a small file system."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migrations_bootstrap.embedded import server_account
from tests.faults import Site
from tests.ledger import stored, verify
from tests.races import eventually
from tests.serving import serving_as_it_is


@contextmanager
def small_disk() -> Iterator[Path]:
    """Mount a file system of a few megabytes, which only root can."""
    if os.geteuid() != 0:
        pytest.fail("a small file system can be mounted by root only: sudo make soak")
    folder = Path(tempfile.mkdtemp(prefix="rollcall-disk-", dir="/tmp"))
    folder.chmod(0o755)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


@contextmanager
def tables_on(site: Site, disk: Path) -> Iterator[None]:
    """Have the tables and their indexes there while the block lasts."""
    home = disk / "tables"
    home.mkdir()
    account = server_account()
    os.chown(home, account.uid, account.gid)
    site.execute(f"CREATE TABLESPACE small LOCATION '{home}'")
    move(site, "pg_default", "small")
    try:
        yield
    finally:
        move(site, "small", "pg_default")
        site.execute("DROP TABLESPACE small")


def move(site: Site, source: str, target: str) -> None:
    for kind in ("TABLE", "INDEX"):
        site.execute(f"ALTER {kind} ALL IN TABLESPACE {source} SET TABLESPACE {target}")


def fill(disk: Path) -> Path:
    """Take what room is left."""
    ballast = disk / "ballast"
    subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=4k"], capture_output=True)
    return ballast


def test_a_disk_without_room(either_url: str, tmp_path: Path) -> None:
    """ENOSPC where a table or an index grows: 503, and well as soon as there is room."""
    with small_disk() as disk, serving_as_it_is(either_url, tmp_path) as service:
        site = Site(service, either_url)
        with tables_on(site, disk):
            with site.under_load() as load, load.hit():
                ballast = fill(disk)
                eventually(lambda: load.has(503, 50), 60)
                ballast.unlink()
            found = stored(either_url)
    assert load.ill == []
    assert verify(load.answers, found) == []
    assert "could not extend file" in service.log.read_text()
