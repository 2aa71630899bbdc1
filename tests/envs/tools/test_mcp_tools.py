"""An MCP server's tools over stdio, against a real server made with the official package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from mcp_types import CallToolResult

from envs.child_process import bound_to_parent
from envs.tools import mcp_tools
from envs.tools.mcp_tools import McpServer
from envs.tools.tool import ToolRefused
from envs.tools.tool_calls import ToolCall
from envs.tools.tool_env import CallOutcome, Toolbox, ToolResult

SCRIPT = '''
import os, time
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("tiny", log_level="ERROR")
kept = []

@server.tool()
def add(a: int, b: int) -> int:
    """The sum of two numbers."""
    return a + b

@server.tool()
def keep(word: str) -> str:
    """Keep a word; all that were kept."""
    kept.append(word)
    return " ".join(kept)

@server.tool()
def pid() -> str:
    return str(os.getpid())

@server.tool()
def fail() -> str:
    raise ToolError("on purpose")

@server.tool()
def hang() -> str:
    time.sleep(600)

@server.tool()
def die() -> str:
    os._exit(3)

server.run()
'''


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[McpServer]:
    """One server for all tests, in their order: its start is most of what they take."""
    script = tmp_path_factory.mktemp("mcp") / "server.py"
    script.write_text(SCRIPT, encoding="utf-8")
    server = McpServer(sys.executable, [str(script)])
    yield server
    server.close()


def answer(server: McpServer, tool: str, **arguments: object) -> ToolResult:
    return Toolbox(sources=[server], call_seconds=None).answer(ToolCall(tool, arguments))


def test_a_servers_tools_are_tools(server: McpServer) -> None:
    add = next(schema["function"] for schema in Toolbox(sources=[server]).schemas() if "sum" in str(schema))
    assert (add["name"], add["description"]) == ("add", "The sum of two numbers.")
    assert add["parameters"]["required"] == ["a", "b"]
    assert answer(server, "add", a=2, b=3) == ToolResult("5", CallOutcome.OK)


def test_what_a_server_refuses_is_told_apart(server: McpServer) -> None:
    assert answer(server, "multiply", a=2).outcome is CallOutcome.UNKNOWN_TOOL
    failed = answer(server, "fail")
    assert failed.outcome is CallOutcome.FAILED and "on purpose" in failed.text
    wrong = answer(server, "add", a="two", b=3)
    assert wrong.outcome is CallOutcome.FAILED and "two" in wrong.text, (
        "the server judges its arguments, as it says"
    )
    assert "\n" not in failed.text + wrong.text


def test_a_call_that_takes_too_long_is_given_up_and_the_server_goes_on(
    server: McpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(server, "_call_seconds", 0.2)
        assert answer(server, "hang").outcome is CallOutcome.TIMED_OUT
    assert answer(server, "add", a=2, b=3) == ToolResult("5", CallOutcome.OK)


def test_a_dead_server_is_an_answer_and_starts_again_for_the_next_episode(server: McpServer) -> None:
    assert answer(server, "keep", word="one").text == "one"
    server.renew()
    assert answer(server, "keep", word="two").text == "one two", "a server that lives is left alone"
    assert answer(server, "die").outcome is CallOutcome.GONE
    assert answer(server, "add", a=2, b=3).outcome is CallOutcome.GONE
    server.renew()
    assert answer(server, "keep", word="three").text == "three"


def test_closing_ends_the_process(server: McpServer) -> None:
    pid = int(answer(server, "pid").text)
    server.close()
    server.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert answer(server, "add", a=2, b=3).outcome is CallOutcome.GONE


def test_a_fresh_server_is_started_anew_once_it_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[SimpleNamespace] = []

    def connect(name: str, *_: object) -> SimpleNamespace:
        said = CallToolResult(content=[])
        begun.append(SimpleNamespace(gone=False, tools=[], call=lambda *_: said, close=lambda: None))
        return begun[-1]

    monkeypatch.setattr(mcp_tools, "_Connection", connect)
    server = McpServer(sys.executable, fresh=True)
    server.renew()
    assert len(begun) == 1, "a server that nobody has called is fresh"
    server.call("any", {})
    server.renew()
    assert len(begun) == 2


@pytest.mark.parametrize(
    ("command", "args", "seconds", "says"),
    [
        ("no-such-command", [], 1.0, "no command 'no-such-command'"),
        (sys.executable, ["-c", "raise SystemExit(3)"], 30.0, "did not start"),
        # As a server does that was written for another release of the package.
        (
            "python",
            ["-c", "import mcp.server.fastmcp"],
            30.0,
            "did not start: ModuleNotFoundError: .*fastmcp",
        ),
        (sys.executable, ["-c", "import time; time.sleep(600)"], 1.0, "listed no tools within 1 s"),
    ],
)
def test_a_server_that_does_not_start_is_refused(
    command: str, args: list[str], seconds: float, says: str
) -> None:
    with pytest.raises(ToolRefused, match=says) as refused:
        McpServer(command, args, start_seconds=seconds)
    assert "\n" not in str(refused.value)


def test_python_is_the_interpreter_that_runs_manta(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\nexit 7\n", encoding="utf-8")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("python", "python3"):
        told = subprocess.run(
            bound_to_parent([name, "-c", "import sys; print(sys.executable)"]),
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        assert told.stdout.strip() == sys.executable


def test_the_server_of_the_documentation_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "agents.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```python\n(.*?MCPServer.*?)```", page, re.DOTALL)
    script = tmp_path / "server.py"
    script.write_text(text, encoding="utf-8")
    server = McpServer("python", [str(script)])
    try:
        assert answer(server, "word_count", text="one two  three").text == "3"
    finally:
        server.close()
