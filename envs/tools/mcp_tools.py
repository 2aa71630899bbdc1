"""Tools of an MCP server (Model Context Protocol), a child process connected over stdio.

    any thread        start, call, close: they block, with a limit
    one thread        the event loop, the client, and the connection from start to close
    a process         the server; the kernel kills it when that thread ends

One server belongs to one replica of an environment. Its state is its own; a reset of the environment does not reset it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, TextIO, TypeVar

from mcp import Client, MCPError, StdioServerParameters, stdio_client
from mcp import Tool as McpTool
from mcp_types import CONNECTION_CLOSED, INVALID_PARAMS, CallToolResult, TextContent

from envs.child_process import bound_to_parent, find_program
from envs.tools.tool import InvalidArguments, Tool, ToolRefused, ToolUnavailable, line

log = logging.getLogger(__name__)
server_log = logging.getLogger("mcp_server")  # the server's own output

T = TypeVar("T")

CLOSE_SECONDS = 10.0  # the client kills a server that does not end, within about seven seconds
MAX_PAGES = 100  # of the list of tools, which might not end

# Inherited in addition to the client's defaults: identifies a run's processes and files for clean-up.
_INHERITED = ("MANTA_RUN", "TMPDIR")


class McpServer:
    """A server started with `command` and `args`, and its tools.

    start_seconds: wall-clock limit to start and list its tools. call_seconds: limit per call; the server is told that a
    call which exceeded it is cancelled. fresh: start a new server for every episode. repeatable: see
    `envs.tools.tool_env.ToolSource`. environment: variables in addition to the few that a server inherits (HOME, PATH
    and the like). Raises ToolRefused if it does not start.
    """

    def __init__(
        self,
        command: str,
        args: Sequence[str] = (),
        *,
        environment: dict[str, str] | None = None,
        start_seconds: float = 30.0,
        call_seconds: float = 30.0,
        fresh: bool = False,
        repeatable: bool = False,
    ) -> None:
        self.repeatable = repeatable
        self._fresh = fresh
        self._call_seconds = call_seconds
        name = " ".join([command, *args])
        if find_program(command) is None:
            raise ToolRefused(f"MCP server {name!r} cannot be started: no command {command!r} on the PATH")
        # Otherwise a server that ignores the end of its input would never end.
        program, *arguments = bound_to_parent([command, *args])
        inherited = {each: os.environ[each] for each in _INHERITED if each in os.environ}
        parameters = StdioServerParameters(
            command=program, args=arguments, env=inherited | (environment or {}), cwd=os.getcwd()
        )
        self._connect = partial(_Connection, name, parameters, start_seconds)
        self._connection = self._connect()
        self._called = False
        self.tools = [
            Tool(each.name, each.description or "", each.input_schema, partial(self.call, each.name))
            for each in self._connection.tools
        ]

    def renew(self) -> None:
        """Restart a server that has ended, and with `fresh` any that was called."""
        if self._connection.gone or (self._fresh and self._called):
            self._connection.close()
            self._connection = self._connect()
            self._called = False

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Call a tool. Raises ToolUnavailable, TimeoutError, InvalidArguments; RuntimeError if the tool failed."""
        self._called = True
        result = self._connection.call(name, arguments, self._call_seconds)
        if result.is_error:
            raise RuntimeError(_text(result))
        return _text(result)

    def close(self) -> None:
        """Stop the server."""
        self._connection.close()


class _Connection:
    """One server process and the thread that communicates with it."""

    def __init__(self, name: str, parameters: StdioServerParameters, start_seconds: float) -> None:
        self.gone = False
        self._name = name
        self._parameters = parameters
        self._client: Client | None = None
        self._started: Future[list[McpTool]] = Future()
        self._closing = asyncio.Event()
        self._stderr = _Stderr()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"mcp {name}", daemon=True)
        self._thread.start()
        self._connected = self._begin(self._serve_connection())
        self.tools = self._wait_for_tools(start_seconds)

    def call(self, name: str, arguments: dict[str, Any], seconds: float) -> CallToolResult:
        if self.gone or self._client is None:
            raise ToolUnavailable("its server has ended")
        pending = self._begin(self._client.call_tool(name, arguments))
        try:
            return pending.result(seconds)
        except TimeoutError:
            pending.cancel()
            raise TimeoutError(f"its server was given {seconds:g} s") from None
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                self.gone = True
                raise ToolUnavailable("its server has ended") from error
            if error.code == INVALID_PARAMS:
                raise InvalidArguments(error.message) from error
            raise

    def close(self) -> None:
        """Stop the server and the thread; a process that outlives the limit is logged and left to the kernel."""
        self.gone = True
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._closing.set)
        wait([self._connected], CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() or not self._connected.done():
            log.warning("MCP server %s did not end within %g s", self._name, CLOSE_SECONDS)
        else:
            self._loop.close()

    async def _serve_connection(self) -> None:
        # The client must be entered and left by one task; calls are other tasks of the same loop.
        with self._stderr.writing() as stderr:
            async with Client(stdio_client(self._parameters, errlog=stderr)) as self._client:
                self._started.set_result(await _list_tools(self._client))
                await self._closing.wait()

    def _begin(self, doing: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(doing, self._loop)

    def _wait_for_tools(self, seconds: float) -> list[McpTool]:
        either: list[Future[Any]] = [self._started, self._connected]
        wait(either, seconds, FIRST_COMPLETED)
        if self._started.done():
            return self._started.result()
        if self._connected.done():
            why = self._stderr.last_line(1.0) or line(repr(_innermost(self._connected.exception())))
        else:
            why = f"it listed no tools within {seconds:g} s"
            self._connected.cancel()
        self.close()
        raise ToolRefused(f"MCP server {self._name!r} did not start: {why}")


class _Stderr:
    """Standard error of a server: logged line by line; the last line is kept for errors."""

    def __init__(self) -> None:
        self._last = ""
        self._ended = threading.Event()

    @contextmanager
    def writing(self) -> Iterator[TextIO]:
        """The write end of a pipe for one process; a thread reads the other end until all writers are closed."""
        reading, writing = os.pipe()
        threading.Thread(target=self._forward, args=(reading,), name="mcp stderr", daemon=True).start()
        with open(writing, "w", encoding="utf-8") as end:
            yield end

    def last_line(self, seconds: float) -> str:
        """The last non-empty line once the process has ended; waits up to `seconds` for it."""
        self._ended.wait(seconds)
        return line(self._last)

    def _forward(self, reading: int) -> None:
        with open(reading, encoding="utf-8", errors="replace") as lines:
            for text in lines:
                self._last = text.strip() or self._last
                server_log.warning("MCP server: %r", text.rstrip())
        self._ended.set()


def _innermost(error: BaseException | None) -> BaseException | None:
    """The first leaf of nested exception groups, as task groups raise them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _list_tools(client: Client) -> list[McpTool]:
    tools: list[McpTool] = []
    cursor: str | None = None
    for _ in range(MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            return tools
    raise RuntimeError(f"its list of tools has more than {MAX_PAGES} pages")


def _text(result: CallToolResult) -> str:
    """The text of a result; other content types are named in brackets."""
    if not result.content and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(
        block.text if isinstance(block, TextContent) else f"[{block.type}]" for block in result.content
    )
