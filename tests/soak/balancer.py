"""nginx in front of several services, with the configuration that docs/ shows."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.races import eventually
from tests.serving import ROOT, Service, free_port

SHOWN = ROOT / "docs" / "nginx.conf"


@contextmanager
def nginx(services: Sequence[Service], folder: Path) -> Iterator[Service]:
    """Balance three services; yield what clients take for one."""
    binary = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if binary is None:
        pytest.fail("nginx is not installed: apt-get install nginx-light", pytrace=False)
    port, log, configuration = free_port(), folder / "nginx.log", folder / "nginx.conf"
    configuration.write_text(configured(services, port))
    options = f"daemon off; pid {folder}/nginx.pid; error_log {log} warn;"
    log.touch()
    process = subprocess.Popen([binary, "-p", folder, "-c", configuration, "-g", options])
    balancer = Service(process, port, log)
    try:
        eventually(balancer.is_ready)
        yield balancer
    finally:
        balancer.stop()


def configured(services: Sequence[Service], port: int) -> str:
    """Return the configuration with the addresses of this machine."""
    text = SHOWN.read_text("utf-8").replace("10.0.0.4:80;", f"127.0.0.1:{port}; access_log off;")
    for number, service in enumerate(services, 1):
        shown = f"10.0.0.{number}:8000"
        assert shown in text
        text = text.replace(shown, f"127.0.0.1:{service.port}")
    assert "10.0.0." not in text
    return text
