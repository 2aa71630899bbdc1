"""Toolbox and ToolEnv: the tools of a replica, and the wrapper that answers a policy's tool calls.

    policy -- text with calls -->  ToolEnv  -- text without -->  environment
           <-- tool messages ----      |
                                    Toolbox: every call gets a result, also if it is unknown, invalid, failed or slow

Anything a policy writes and anything a tool does becomes an observation. Texts about errors are printable ASCII, since
they repeat the policy's words and every tokenizer must be able to encode them.
"""

from __future__ import annotations

import json
import threading
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import gymnasium as gym

from envs.base import Info, Message, Observation, TalkSpace, messages_of, text_space
from envs.call_thread import CallAbandoned, abandon
from envs.tools.tool import InvalidArguments, Schema, Tool, ToolRefused, ToolUnavailable, echo, line
from envs.tools.tool_calls import CallFault, MalformedCall, Style, ToolCall, parse_calls, spoken, write_call
from envs.user_functions import settled

_FAULTS = {
    CallFault.UNCLOSED: "it is not closed",
    CallFault.INVALID_JSON: "it is not valid JSON",
    CallFault.NOT_AN_OBJECT: "it is not a JSON object",
    CallFault.NO_NAME: "it has no name",
    CallFault.BAD_ARGUMENTS: "its arguments cannot be read",
}


class CallOutcome(StrEnum):
    """Outcome of a tool call; the values are names of metrics."""

    OK = "ok"
    CUT = "cut"  # the result was too long and is truncated
    INVALID = "invalid"  # the call could not be parsed
    UNKNOWN_TOOL = "unknown_tool"
    WRONG_ARGUMENTS = "wrong_arguments"
    FAILED = "failed"  # the tool raised
    TIMED_OUT = "timed_out"
    GONE = "gone"  # the tool's server has ended
    SPENT = "spent"  # the episode's budget of calls is used up
    FORBIDDEN = "forbidden"  # by the agent part `forbid`


def call_outcomes(info: Info) -> dict[str, int]:
    """The numbers of answered calls in an info, by `CallOutcome`; unknown keys are ignored."""
    counts = info.get("tools")
    if not isinstance(counts, Mapping):
        return {}
    return {each.value: count for each in CallOutcome if isinstance(count := counts.get(each.value), int)}


@dataclass(frozen=True)
class ToolResult:
    """The text that a policy gets for a call, and the outcome."""

    text: str
    outcome: CallOutcome


class ToolSource(Protocol):
    """Provider of tools with a lifetime of its own, such as a server.

    A source enforces its own time limits: its tools raise TimeoutError, and no other limit applies to them.
    """

    @property
    def tools(self) -> Sequence[Tool]: ...

    @property
    def repeatable(self) -> bool:
        """Whether its tools return the same results for the same sequence of calls after a reset."""
        ...

    def renew(self) -> None:
        """Prepare for an episode: restart what has ended. Raises if that is impossible."""
        ...

    def close(self) -> None: ...


class Toolbox:
    """The tools of one replica, and the results of their calls.

    max_result_chars: longer results are truncated, with a note. call_seconds: wall-clock limit for a call of one of
    `tools` (sources have their own limits); None for no limit and no overhead. With a limit, a call runs in a thread of
    its own. A call that exceeds it is abandoned: its thread ends when it next executes Python bytecode, and a call into
    C continues beside the episode until it returns. Until then the same tool is not called again. Tools that need
    stronger isolation belong in an environment with a process of its own, or behind a server.
    """

    def __init__(
        self,
        tools: Iterable[Tool | Callable[..., Any]] = (),
        sources: Sequence[ToolSource] = (),
        *,
        max_result_chars: int = 2000,
        call_seconds: float | None = 10.0,
    ) -> None:
        self._sources = tuple(sources)
        given = [each if isinstance(each, Tool) else Tool.of(each) for each in tools]
        self._functions = frozenset(tool.name for tool in given)
        given += [tool for source in self._sources for tool in source.tools]
        self._tools = {tool.name: tool for tool in given}
        if len(self._tools) < len(given):
            duplicates = [name for name, count in Counter(tool.name for tool in given).items() if count > 1]
            raise ToolRefused(f"two tools are named {' and '.join(duplicates)}; give each a name of its own")
        if max_result_chars < 1:
            raise ValueError(f"max_result_chars={max_result_chars} shows nothing; use 1 or more")
        if call_seconds is not None and not 0 < call_seconds <= threading.TIMEOUT_MAX:
            raise ValueError(f"call_seconds={call_seconds} must be more than 0, or None for no limit")
        self._max_chars = max_result_chars
        self._seconds = call_seconds
        self._abandoned: dict[str, threading.Thread] = {}

    @property
    def repeatable(self) -> bool:
        """Whether every source is repeatable; functions are assumed to be."""
        return all(source.repeatable for source in self._sources)

    def schemas(self) -> list[Schema]:
        """The schemas of all tools in the form that chat templates take; a fresh copy."""
        copied: list[Schema] = json.loads(json.dumps([tool.schema for tool in self._tools.values()]))
        return copied

    def has(self, call: ToolCall | MalformedCall) -> bool:
        """Whether a tool of the called name exists."""
        return isinstance(call, ToolCall) and call.name in self._tools

    def named(self, call: ToolCall | MalformedCall) -> ToolCall | MalformedCall:
        """A plain call with argument names in place of positions."""
        if isinstance(call, MalformedCall) or call.name not in self._tools:
            return call
        properties = self._tools[call.name].parameters.get("properties", ())
        places = {str(place): name for place, name in enumerate(properties, start=1)}
        return ToolCall(call.name, {places.get(key, key): value for key, value in call.arguments.items()})

    def answer(self, call: ToolCall | MalformedCall) -> ToolResult:
        """Execute a call. Errors of the call or the tool become results; nothing is raised."""
        answer = self._answer(call)
        # Tokenizers cannot encode lone surrogates, which JSON escapes can introduce.
        shown = answer.text[: self._max_chars].encode("utf-8", "replace").decode()
        if len(answer.text) <= self._max_chars:
            return ToolResult(shown, answer.outcome)
        text = f"{shown}... ({len(answer.text)} characters, cut to {self._max_chars})"
        return ToolResult(text, CallOutcome.CUT if answer.outcome is CallOutcome.OK else answer.outcome)

    def renew(self) -> None:
        """Prepare all sources for an episode."""
        for source in self._sources:
            source.renew()

    def close(self) -> None:
        """Close all sources."""
        for source in self._sources:
            source.close()

    def _answer(self, call: ToolCall | MalformedCall) -> ToolResult:
        if isinstance(call, MalformedCall):
            return ToolResult(f"That is no call: {_FAULTS[call.why]}.", CallOutcome.INVALID)
        tool = self._tools.get(call.name)
        if tool is None:
            have = ", ".join(self._tools) or "none"
            return ToolResult(
                f"There is no tool {echo(call.name)}; there is: {have}.", CallOutcome.UNKNOWN_TOOL
            )
        if self._seconds is None or call.name not in self._functions:
            return _run(tool, call.arguments)
        return self._run_within(tool, call.arguments, self._seconds)

    def _run_within(self, tool: Tool, arguments: dict[str, Any], seconds: float) -> ToolResult:
        before = self._abandoned.get(tool.name)
        if before is not None and before.is_alive():
            return ToolResult(f"{tool.name} is still busy with an earlier call.", CallOutcome.TIMED_OUT)
        answers: list[ToolResult] = []

        def run() -> None:
            with suppress(CallAbandoned):
                answers.append(_run(tool, arguments))

        # A daemon, so that interpreter exit does not wait for it.
        thread = threading.Thread(target=run, name=f"tool-{tool.name}", daemon=True)
        thread.start()
        thread.join(seconds)
        if answers:
            return answers[0]
        self._abandoned[tool.name] = thread
        abandon(thread)
        return ToolResult(f"{tool.name} took longer than {seconds:g} s.", CallOutcome.TIMED_OUT)


def _run(tool: Tool, arguments: dict[str, Any]) -> ToolResult:
    try:
        return ToolResult(_shown(settled(tool.run(arguments))), CallOutcome.OK)
    except InvalidArguments as error:
        return ToolResult(f"{tool.name} was not called: {line(str(error))}.", CallOutcome.WRONG_ARGUMENTS)
    except ToolUnavailable as error:
        return ToolResult(f"{tool.name} is gone: {line(str(error))}.", CallOutcome.GONE)
    except TimeoutError as error:
        return ToolResult(f"{tool.name} took too long: {line(str(error))}.", CallOutcome.TIMED_OUT)
    except (Exception, SystemExit) as error:
        # A tool is user code and may raise anything. The policy must be able to read that and continue: this is the one
        # place that catches everything for tools.
        return ToolResult(
            f"{tool.name} failed: {line(f'{type(error).__name__}: {error}')}.", CallOutcome.FAILED
        )


def _shown(result: Any) -> str:
    if isinstance(result, str):
        return result
    return "done" if result is None else json.dumps(result, ensure_ascii=False, default=str)


class ToolEnv(gym.Wrapper[Observation, str, Observation, str]):
    """Wrapper that gives an environment tools. It answers turns with tool calls; all other turns go to the environment.

    The tools' schemas are attached to the first message of every conversation: after a reset, and when the environment
    resets the context; plain schemas carry "style". A turn with calls (outside thoughts) is answered with one message
    per call, `{"role": "tool", "name": ..., "content": ...}`; other text in it is dropped. Such a turn has no reward
    and does not end the episode, and `info["tools"]` counts the outcomes. Calls of tools that the environment itself
    announces are passed on: ToolEnvs may be nested if their tools differ in names and agree in style.

    max_calls: calls per episode. Further calls are not executed, and the result says so; `grace` of them are tolerated,
    the next one truncates the episode. verdict: the environment reports success, so an episode truncated here failed.

    The state of a ToolEnv is the number of calls and the state of its tools, so it offers no snapshots. An episode is
    resumed by replaying its actions, calls included, unless a source is not `repeatable`.
    """

    def __init__(
        self,
        env: gym.Env[Any, str],
        toolbox: Toolbox,
        *,
        style: Style = "hermes",
        max_calls: int = 16,
        grace: int = 2,
        verdict: bool = False,
    ) -> None:
        super().__init__(env)
        if style not in typing.get_args(Style):
            raise ValueError(f"style={style!r} must be {' or '.join(typing.get_args(Style))}")
        if max_calls < 0 or grace < 0:
            raise ValueError(f"max_calls={max_calls} and grace={grace} must be 0 or more")
        self.observation_space = TalkSpace()
        self.action_space = text_space()
        self._toolbox = toolbox
        self._style = style
        self._max_calls = max_calls
        self._max_with_grace = max_calls + grace
        self._verdict = verdict
        self._call_count = 0
        self._inner_tools: frozenset[str] = frozenset()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self._toolbox.renew()
        observation, info = self.env.reset(seed=seed, options=options)
        self._call_count = 0
        return self._with_schemas(messages_of(observation)), info

    def step(self, action: str) -> tuple[Observation, float, bool, bool, Info]:
        _, calls = parse_calls(spoken(action), self._style)
        inner = [call for call in calls if isinstance(call, ToolCall) and self._is_inner(call)]
        own = [call for call in calls if not (isinstance(call, ToolCall) and self._is_inner(call))]
        results, outcomes = self._answer_all(own)
        if self._call_count > self._max_with_grace:
            verdict = {"success": False} if self._verdict else {}
            return results, 0.0, False, True, {"tools": dict(outcomes)} | verdict
        if own and not inner:
            return results, 0.0, False, False, {"tools": dict(outcomes)}
        passed_on = "\n".join(write_call(call, self._style) for call in inner) if own else action
        observation, reward, terminated, truncated, info = self.env.step(passed_on)
        messages = messages_of(observation)
        if messages[0].get("reset_context"):
            observation = messages = self._with_schemas(messages)
        if not own:
            return observation, float(reward), terminated, truncated, info
        info |= {"tools": dict(outcomes + Counter(call_outcomes(info)))}
        # The environment's messages come first: the first may carry directions to the agent (see envs.base).
        return [*messages, *results], float(reward), terminated, truncated, info

    def close(self) -> None:
        try:
            self._toolbox.close()
        finally:
            super().close()

    @property
    def nondeterministic(self) -> bool:
        """Whether results may differ between runs, here or in the wrapped environment; see envs.hosting.host."""
        inside = self.env.has_wrapper_attr("nondeterministic") and self.env.get_wrapper_attr(
            "nondeterministic"
        )
        return bool(inside) or not self._toolbox.repeatable

    def _with_schemas(self, messages: list[Message]) -> list[Message]:
        """Attach all tools to the first message. ToolRefused if the environment's tools and these conflict."""
        first, *others = messages
        inner = first.get("tools", [])
        self._inner_tools = frozenset(schema["function"]["name"] for schema in inner)
        schemas = self._toolbox.schemas()
        if duplicates := sorted(self._inner_tools & {schema["function"]["name"] for schema in schemas}):
            raise ToolRefused(f"two tools are named {' and '.join(duplicates)}; give each a name of its own")
        if any(schema.get("style", "hermes") != self._style for schema in inner):
            raise ToolRefused(
                f"style={self._style!r} differs from the style of the environment's own tools; use theirs"
            )
        if self._style == "plain":
            schemas = [schema | {"style": "plain"} for schema in schemas]
        return [first | {"tools": [*inner, *schemas]}, *others]

    def _is_inner(self, call: ToolCall) -> bool:
        return call.name in self._inner_tools and not self._toolbox.has(call)

    def _answer_all(self, calls: list[ToolCall | MalformedCall]) -> tuple[list[Message], Counter[str]]:
        results: list[Message] = []
        outcomes: Counter[str] = Counter()
        for call in calls:
            self._call_count += 1
            answer = self._answer(self._toolbox.named(call) if self._style == "plain" else call)
            # An unknown tool's name is not repeated, since the policy may have written anything.
            name = call.name if isinstance(call, ToolCall) and self._toolbox.has(call) else ""
            results.append({"role": "tool", "name": name, "content": answer.text})
            outcomes[answer.outcome.value] += 1
            if self._call_count > self._max_with_grace:
                break
        return results, outcomes

    def _answer(self, call: ToolCall | MalformedCall) -> ToolResult:
        if self._call_count > self._max_calls:
            return ToolResult(
                f"All {self._max_calls} calls are made: answer without tools.", CallOutcome.SPENT
            )
        return self._toolbox.answer(call)
