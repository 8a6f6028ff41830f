"""Whether other machines can reach the service: without authentication they must not."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Any

from app.config import Settings
from app.errors import ConfigurationError


def require_loopback(settings: Settings, addresses: Iterable[Any]) -> None:
    """Raise ConfigurationError if authentication is off and an address is not loopback.

    Addresses are as sockets have them: host, port and more for an Internet socket, a path for a
    Unix socket. The number of a descriptor says nothing yet: look at its socket.
    """
    if settings.auth != "off":
        return
    for address in addresses:
        if isinstance(address, tuple) and not _is_loopback(str(address[0])):
            raise ConfigurationError(
                "ROLLCALL_AUTH is off, which is for this machine alone, and"
                f" {address[0] or 'the empty host'} is not a loopback address:"
                " set ROLLCALL_AUTH=token, or BIND to 127.0.0.1"
            )


def _is_loopback(host: str) -> bool:
    """Tell whether all that a host stands for is loopback; what stands for nothing is not."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(str(address[0])).is_loopback for *_, address in found)
