"""The tools of an MCP server (Model Context Protocol), which runs as a process of its own and is spoken to over stdio.

    any thread        start, call, close: they wait, with a limit
    a thread          its event loop, the client, and the life of the connection from start to close
    a process         the server; the kernel kills it when that thread ends, however it ends

One server belongs to one replica of an environment. What it holds is its own: a reset does not reset it.
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

from envs.child_process import found, leashed
from envs.tools.tool import Tool, ToolGone, ToolRefused, WrongArguments, line

log = logging.getLogger(__name__)
server_log = logging.getLogger("mcp_server")  # what it says is no warning of ours

T = TypeVar("T")

CLOSE_SECONDS = 10.0  # the client itself kills a server that does not end by itself, within about seven
MOST_PAGES = 100  # of a list of tools that never ends

# Beside what the client lets a server inherit: by these a run's processes and their files are found when it is over.
_INHERITED = ("MANTA_RUN", "TMPDIR")


class McpServer:
    """A server that was started with `command` and `args`, and its tools.

    start_seconds: wall clock to start and to name its tools. call_seconds: for one call; the server is told that a call
    which took longer is no longer wanted. fresh: start the server anew for every episode. repeatable: see
    `envs.tools.tool_env.Source`. environment: variables beside the few that a server inherits (HOME, PATH and the
    like). Raises ToolRefused when it does not start.
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
        if found(command) is None:
            raise ToolRefused(f"MCP server {name!r} can not be started: there is no command {command!r}")
        # Nothing else would end a server that does not mind its input being closed.
        program, *arguments = leashed([command, *args])
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
        """Start a server that has ended anew, and with `fresh` any that was called."""
        if self._connection.gone or (self._fresh and self._called):
            self._connection.close()
            self._connection = self._connect()
            self._called = False

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """What a tool says. Raises ToolGone, TimeoutError, WrongArguments; RuntimeError where the tool failed."""
        self._called = True
        result = self._connection.call(name, arguments, self._call_seconds)
        if result.is_error:
            raise RuntimeError(_text(result))
        return _text(result)

    def close(self) -> None:
        """End the server."""
        self._connection.close()


class _Connection:
    """One process of a server, and the thread that speaks with it."""

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
        self._life = self._begin(self._live())
        self.tools = self._wait_for_tools(start_seconds)

    def call(self, name: str, arguments: dict[str, Any], seconds: float) -> CallToolResult:
        if self.gone or self._client is None:
            raise ToolGone("its server has ended")
        asked = self._begin(self._client.call_tool(name, arguments))
        try:
            return asked.result(seconds)
        except TimeoutError:
            asked.cancel()
            raise TimeoutError(f"its server was given {seconds:g} s") from None
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                self.gone = True
                raise ToolGone("its server has ended") from error
            if error.code == INVALID_PARAMS:
                raise WrongArguments(error.message) from error
            raise

    def close(self) -> None:
        """End the server and the thread; what does not end in time is logged and left to the kernel."""
        self.gone = True
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._closing.set)
        wait([self._life], CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() or not self._life.done():
            log.warning("MCP server %s did not end within %g s", self._name, CLOSE_SECONDS)
        else:
            self._loop.close()

    async def _live(self) -> None:
        # Entered and left by one task, as the client demands; calls are other tasks of the same loop.
        with self._stderr.writing() as stderr:
            async with Client(stdio_client(self._parameters, errlog=stderr)) as self._client:
                self._started.set_result(await _listed(self._client))
                await self._closing.wait()

    def _begin(self, doing: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(doing, self._loop)

    def _wait_for_tools(self, seconds: float) -> list[McpTool]:
        either: list[Future[Any]] = [self._started, self._life]
        wait(either, seconds, FIRST_COMPLETED)
        if self._started.done():
            return self._started.result()
        if self._life.done():
            why = self._stderr.last_line(1.0) or line(repr(_innermost(self._life.exception())))
        else:
            why = f"it named no tools within {seconds:g} s"
            self._life.cancel()
        self.close()
        raise ToolRefused(f"MCP server {self._name!r} did not start: {why}")


class _Stderr:
    """What a server writes to stderr: logged as it comes, with the last line kept for an error."""

    def __init__(self) -> None:
        self._last = ""
        self._ended = threading.Event()

    @contextmanager
    def writing(self) -> Iterator[TextIO]:
        """The end of a pipe for one process; a thread reads the other end until nobody can write any more."""
        reading, writing = os.pipe()
        threading.Thread(target=self._pass_on, args=(reading,), name="mcp stderr", daemon=True).start()
        with open(writing, "w", encoding="utf-8") as end:
            yield end

    def last_line(self, seconds: float) -> str:
        """The last line that says something, once the process has ended; it may take `seconds` to be read."""
        self._ended.wait(seconds)
        return line(self._last)

    def _pass_on(self, reading: int) -> None:
        with open(reading, encoding="utf-8", errors="replace") as lines:
            for text in lines:
                self._last = text.strip() or self._last
                server_log.warning("an MCP server writes: %r", text.rstrip())
        self._ended.set()


def _innermost(error: BaseException | None) -> BaseException | None:
    """The first error of nested groups: task groups wrap what went wrong."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _listed(client: Client) -> list[McpTool]:
    tools: list[McpTool] = []
    cursor: str | None = None
    for _ in range(MOST_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            return tools
    raise RuntimeError(f"its list of tools has more than {MOST_PAGES} pages")


def _text(result: CallToolResult) -> str:
    """The text of a result; other kinds of content are named."""
    if not result.content and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(
        block.text if isinstance(block, TextContent) else f"[{block.type}]" for block in result.content
    )
