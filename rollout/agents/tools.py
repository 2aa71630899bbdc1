"""Tools as a part of an agent: a `ToolEnv` around the environment, with the tools that a recipe names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from envs.tools.tool import ToolRefused
from envs.tools.tool_calls import Style
from envs.tools.tool_env import Toolbox, ToolEnv, ToolSource
from envs.user_functions import load_function
from rollout.agents.part import Env


class ServerSettings(BaseModel):
    """An MCP server over stdio. Every replica of an environment starts its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: str = Field(
        description="executable that starts the server; each environment replica starts its own"
    )
    args: tuple[str, ...] = Field((), description="arguments of the command")
    environment: dict[str, str] = Field(
        {},
        description="environment variables of the server, beside the few that are inherited (HOME, PATH and "
        "similar)",
    )
    start_seconds: float = Field(
        30.0, gt=0, description="time limit for the server to start and list its tools, seconds"
    )
    call_seconds: float = Field(30.0, gt=0, description="time limit for one call, seconds")
    fresh: bool = Field(
        False,
        description="start a new server for every episode. False keeps one server and its state over all "
        "episodes of the replica",
    )
    repeatable: bool = Field(
        False,
        description="declare that the same calls after a reset give the same answers. An episode that lost "
        "its worker then continues by repeating its calls; with false it starts again",
    )

    def start(self) -> ToolSource:
        """Start the server. ToolRefused if it does not start."""
        # The package is large, and needed only with a server.
        from envs.tools.mcp_tools import McpServer

        return McpServer(
            self.command,
            self.args,
            environment=self.environment,
            start_seconds=self.start_seconds,
            call_seconds=self.call_seconds,
            fresh=self.fresh,
            repeatable=self.repeatable,
        )


class ToolsSettings(BaseModel):
    """Tools that the policy may call in any turn."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["tools"] = "tools"
    functions: tuple[str, ...] = Field(
        (),
        description='Python functions offered as tools, each "module:function"; type hints and docstring '
        "describe it to the policy",
    )
    servers: tuple[ServerSettings, ...] = Field(
        (), description="MCP servers (stdio); all of their tools are offered"
    )
    style: Style = Field(
        "hermes",
        description="syntax of a tool call. hermes: JSON within <tool_call> tags. plain: one line, "
        '"name(value, value)", for models too small for JSON',
    )
    max_calls: int = Field(
        16, ge=0, description="most tool calls per episode; further ones are refused with a text"
    )
    grace: int = Field(
        2, ge=0, description="refused calls that are tolerated; one more truncates the episode"
    )
    max_result_chars: int = Field(
        2000,
        gt=0,
        description="longest result shown to the policy, characters; a longer one is cut, and the text says "
        "so",
    )
    call_seconds: float | None = Field(
        10.0,
        gt=0,
        description="time limit for a call of a function, seconds; not set: no limit. A function that exceeds "
        "it continues in its thread and is not called again until it returns. Servers have their "
        "own limit",
    )

    @field_validator("functions")
    @classmethod
    def _named(cls, functions: tuple[str, ...]) -> tuple[str, ...]:
        for each in functions:
            module, _, name = each.partition(":")
            if not module or not name:
                raise ValueError(f'{each!r} names no function; write "module:function"')
        return functions

    def wrap(self, env: Env) -> Env:
        """Wrap an environment in these tools. ToolRefused for a function that cannot be a tool, or a failed server."""
        with ExitStack() as started:
            sources = []
            for server in self.servers:
                sources.append(server.start())
                started.callback(sources[-1].close)
            toolbox = Toolbox(
                [_tool(each) for each in self.functions],
                sources,
                max_result_chars=self.max_result_chars,
                call_seconds=self.call_seconds,
            )
            wrapped = ToolEnv(env, toolbox, style=self.style, max_calls=self.max_calls, grace=self.grace)
            started.pop_all()  # the environment closes them from now on
        return wrapped


def _tool(reference: str) -> Callable[..., Any]:
    try:
        return load_function(reference)
    except ValueError as error:
        raise ToolRefused(f"tool {error}") from error
