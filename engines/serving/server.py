"""Start, run and stop a server: bind, load, warm up, listen; on SIGTERM finish what was begun.

The socket is bound and listens before the engines are loaded, so a taken port fails in a moment, and whoever asks
meanwhile is told: alive, not ready, 503 for a request. After SIGTERM the server may go on for a while, not ready, until
balancers have learnt that (``--shutdown-delay-seconds``). Stopping loses nothing that has arrived: connections that
the kernel accepted are taken over, every request on an open connection is answered, and only then the engines go.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ipaddress
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import struct
import sys
import textwrap
import time
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

from engines.serving.app import Service
from engines.serving.http.connection import protocol_class
from engines.serving.http.open_files import require_open_files
from engines.serving.http.spare_connections import ROOM
from engines.serving.memory import map_large_blocks
from engines.serving.repository import EngineSource, Repository
from engines.serving.settings import ModelOptions, ServerOptions
from nxm_export.contract.choices import GATES
from nxm_export.errors import EngineUnavailable, ServeError

if TYPE_CHECKING:
    import uvicorn

log = logging.getLogger("nxm.serve")
_KEEP_ALIVE = 75  # seconds; longer than what clients and balancers keep idle connections for
_BACKLOG = 1024
_BURST = 64  # connections that are accepted in one turn of the event loop, before any of them is looked at
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h; not in Python's socket module
_TAKE_OVER = 0.25  # seconds; no less than a client's round trip


def serve(
    sources: Sequence[EngineSource], models: ModelOptions = ModelOptions(), options: ServerOptions = ServerOptions()
) -> None:
    """Serve engine directories until SIGTERM or SIGINT; the one call behind ``nxm serve``.

    Raises before it listens: `ServeError` for an address that is taken or not local without `allow_remote`, and for
    fewer open files than its connections need. Raises later what `engines.serving.model.open_model` raises for an
    engine that is refused.
    """
    _require_installed()
    if models.gate not in GATES:
        raise ServeError(f"unknown gate {models.gate!r}; choose one of {', '.join(GATES)}")
    _configure_log()
    map_large_blocks()
    listener = _bind(options)
    try:
        repository = Repository(sources, models)
        repository.require_admitted()
        require_open_files(options.connections.connections + ROOM + _BURST)
        service = Service(repository, options.requests, watch=options.watch, access_log=options.access_log)
        server = _server(service, options)
        url = f"http://{_host(listener)}:{listener.getsockname()[1]}"
        log.info("listening", extra={"facts": {"url": url}})
        server.run(sockets=[listener])
        if service.models.failure is not None:
            raise service.models.failure
    finally:
        listener.close()


def _bind(options: ServerOptions) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ServeError(f"--host {options.host}: no address, nor the name of one ({error})") from error
    if not ipaddress.ip_address(address[0]).is_loopback:  # what is bound, whatever it was called
        if not options.allow_remote:
            listener.close()
            raise ServeError(
                f"--host {options.host} is not this machine alone, and this server has no authentication; "
                "put a proxy before it, or say --allow-remote"
            )
        log.warning("no authentication: everybody who reaches this address may use and load it", extra={
            "facts": {"host": options.host}
        })  # fmt: skip
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ServeError(
            f"{options.host}:{options.port} cannot be bound ({error.strerror}); choose another "
            "--port (0 takes a free one)"
        ) from error
    listener.setblocking(False)
    return listener


def _server(service: Service, options: ServerOptions) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        """uvicorn's server with a stop that loses nothing."""

        stop_at = math.inf

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for listener in sockets or []:
                listener.listen(_BACKLOG)  # asyncio takes one number for this queue and for its burst

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if service.draining:
                self.force_exit = self.should_exit and sig == signal.SIGINT
                self.should_exit = True  # told again, it waits no longer
                return
            service.draining = True
            facts = {"signal": signal.Signals(sig).name, "delay_seconds": options.shutdown_delay}
            log.info("draining", extra={"facts": facts})
            self.stop_at = time.monotonic() + options.shutdown_delay

        async def on_tick(self, counter: int) -> bool:
            self.should_exit = self.should_exit or time.monotonic() >= self.stop_at
            return await super().on_tick(counter)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for listener in sockets or []:
                _turn_away(listener)
            await asyncio.sleep(_TAKE_OVER)  # handshakes end, and the loop accepts what the kernel has accepted
            await super().shutdown(sockets)

    config = uvicorn.Config(
        service.application(),
        http=protocol_class(service, options.connections),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(options.drain)),
        backlog=_BURST,
    )
    server = Server(config)
    service.models.give_up = lambda: setattr(server, "should_exit", True)
    return server


def _turn_away(listener: socket.socket) -> None:
    """Let no new connection in, and keep those that wait to be accepted.

    Closing a listening socket resets the connections in its queue, whose clients may have sent their request already.
    So a packet filter that drops every SYN is put on it first (Linux; elsewhere the few in the queue are lost). Nothing
    else may be dropped: whoever has our answer to its SYN is connected, as far as it knows, and only its ACK tells us.
    A client that comes now is refused once the socket is closed, before it has sent anything.
    """
    # Of the TCP header, where the filter begins: the byte that holds flags, and two of them.
    flags, syn, ack = 13, 0x02, 0x10
    program = b"".join(
        struct.pack("HBBI", *instruction)  # linux/filter.h: code, how far to jump if true and if false, operand
        for instruction in (
            (0x30, 0, 0, flags),  # load that byte
            (0x54, 0, 0, syn | ack),  # and
            (0x15, 0, 1, syn),  # SYN alone?
            (0x06, 0, 0, 0),  # drop
            (0x06, 0, 0, 0xFFFFFFFF),  # keep
        )
    )
    buffer = ctypes.create_string_buffer(program)
    fprog = struct.pack("HP", len(program) // 8, ctypes.addressof(buffer))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)


def _host(listener: socket.socket) -> str:
    host = str(listener.getsockname()[0])
    return f"[{host}]" if ":" in host else host


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and the facts of a record. In ASCII: whatever a client or a file is
    called, no control character reaches a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _TerminalLines(logging.Formatter):
    """The same for somebody who watches: time of day, event, facts, as wide as the terminal, hashes cut; in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        facts = [f"{name} {_plain(fact)}" for name, fact in getattr(record, "facts", {}).items()]
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        event = f"{time.strftime('%H:%M:%S', time.localtime(record.created))}  {level}{_plain(record.getMessage())}"
        line = f"{event}: {', '.join(facts)}" if facts else event
        width = shutil.get_terminal_size((80, 24)).columns
        folded = textwrap.fill(line, width, subsequent_indent=" " * 10, break_on_hyphens=False)
        traceback = self.formatException(record.exc_info).splitlines() if record.exc_info else []
        return "\n".join([folded, *map(_plain, traceback)])


def _plain(fact: object) -> str:
    """A fact of a log as ASCII without control characters."""
    text = json.dumps(fact, default=str)
    text = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", text).replace("\x7f", "\\u007f")
    return text[1:-1] if isinstance(fact, str) else text


def _configure_log() -> None:
    """Lines on stderr, of this package and of uvicorn's warnings: JSON, but on a terminal words."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_TerminalLines() if sys.stderr.isatty() else _JsonLines())
    for name, level in (("nxm.serve", logging.INFO), ("uvicorn", logging.WARNING), ("asyncio", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def _require_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("uvicorn", "starlette", "httptools", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise EngineUnavailable(f"serving needs {', '.join(missing)}; pip install 'nxm-export[serve]'")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its own threads would compete with the engine's
