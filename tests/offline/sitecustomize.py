"""No connection leaves this machine. Python imports a module of this name at its start when its directory is on
PYTHONPATH.

`tests/conftest.py` puts it there, so that processes started by tests are held to it, too. It covers sockets that Python
opens; a C library with sockets of its own would pass, and none of those in use here has any.
"""

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

LOCAL = ("127.0.0.1", "::1", "localhost")


def block_network() -> None:
    """Make every connection to another machine an `OSError` that names the address; calling it again does nothing."""
    if getattr(socket.socket, "blocked", False):
        return
    for name, position in (("connect", 0), ("connect_ex", 0), ("sendto", -1)):
        setattr(socket.socket, name, _guarded(getattr(socket.socket, name), position))
    socket.socket.blocked = True  # type: ignore[attr-defined]
    socket.getaddrinfo = _guarded_lookup(socket.getaddrinfo)


def _guarded(original: Callable[..., Any], position: int) -> Callable[..., Any]:
    def call(self: socket.socket, *arguments: Any) -> Any:
        if self.family != socket.AF_UNIX:
            _require_local(arguments[position][0])
        return original(self, *arguments)

    return call


def _guarded_lookup(original: Callable[..., Any]) -> Callable[..., Any]:
    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if host is not None and not _is_address(host):  # an address is not looked up anywhere; a server binds to one
            _require_local(host)
        return original(host, *arguments, **options)

    return look_up


def _is_address(host: Any) -> bool:
    try:
        ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host))
    except ValueError:
        return False
    return True


def _require_local(host: Any) -> None:
    name = host.decode() if isinstance(host, bytes) else str(host)
    if name not in LOCAL:
        raise OSError(f"{name}: the test suite runs without network")


block_network()
