"""Servers on the loopback interface: a listening socket, and serving on it until the process is told to stop."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from deploy.config.config_errors import ConfigError

LOOPBACK = "127.0.0.1"


def listen(port: int) -> socket.socket:
    """A listening socket on the loopback interface; port 0 is a free one. ConfigError if the port is taken.

    Clients that connect before the server runs are served once it does.
    """
    try:
        return socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise ConfigError(
            f"port {port}: {os.strerror(error.errno or 0)}; choose another with --port, 0 for a free one"
        ) from error


def address(listener: socket.socket) -> str:
    """The address under which clients on this machine reach a listening socket."""
    return f"http://{LOOPBACK}:{listener.getsockname()[1]}"


def serve_until_told(serving: Coroutine[Any, Any, None]) -> None:
    """Run a server until SIGINT or SIGTERM."""
    with suppress(KeyboardInterrupt):
        asyncio.run(serving)
