"""Tools: typed Python functions that a policy may call, and the wrapper that answers its calls.

    policy -- text with calls -->  ToolEnv  -- text without -->  environment
           <-- tool messages ----      |
                                    Toolbox: unknown, wrong, failed, too slow, too long: each an answer with its reason

Whatever a policy writes and whatever a tool does becomes an observation. What is said of a mistake is printable ASCII,
since it repeats what the policy wrote, and no tokenizer may choke on that.
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
from envs.call_thread import LeftBehind, leave_behind
from envs.tools.tool import Schema, Tool, ToolGone, ToolRefused, WrongArguments, echo, line
from envs.tools.tool_calls import BadCall, Call, Fault, Style, parse_calls, spoken, write_call
from envs.user_functions import settled

_FAULTS = {
    Fault.UNCLOSED: "it is not closed",
    Fault.INVALID_JSON: "it is not valid JSON",
    Fault.NOT_AN_OBJECT: "it is not a JSON object",
    Fault.NO_NAME: "it has no name",
    Fault.BAD_ARGUMENTS: "its arguments cannot be read",
}


class Reason(StrEnum):
    """What became of a call."""

    OK = "ok"
    CUT = "cut"  # the result was too long, and is shown in part
    INVALID = "invalid"  # not to be read as a call
    UNKNOWN_TOOL = "unknown_tool"
    WRONG_ARGUMENTS = "wrong_arguments"
    FAILED = "failed"  # the tool raised
    TIMED_OUT = "timed_out"
    GONE = "gone"  # what the tool belongs to (a server) is no more
    SPENT = "spent"  # the episode's calls are used up


def answers_by_reason(info: Info) -> dict[str, int]:
    """How many calls an info says were answered, by `Reason`; what else may be under that name is left out."""
    counts = info.get("tools")
    if not isinstance(counts, Mapping):
        return {}
    return {reason.value: count for reason in Reason if isinstance(count := counts.get(reason.value), int)}


@dataclass(frozen=True)
class Answer:
    """What a policy is told of a call."""

    text: str
    reason: Reason


class Source(Protocol):
    """Something that brings tools with it and must be closed: a server.

    How long a call may take is its own affair: its tools raise TimeoutError, and no other limit is put on them.
    """

    @property
    def tools(self) -> Sequence[Tool]: ...

    @property
    def repeatable(self) -> bool:
        """Whether its tools answer the same calls, in the same order after a reset, in the same way."""
        ...

    def renew(self) -> None:
        """Make ready for an episode: start again what has ended. Raises where that is impossible."""
        ...

    def close(self) -> None: ...


class Toolbox:
    """The tools of one replica, and what a policy is told when it calls them.

    max_result_chars: of an answer; what is longer is cut, and says so. call_seconds: wall clock for a call of one of
    `tools` (a source keeps its own limit); None has no limit and costs nothing. With a limit a call runs in a thread of
    its own, and one that takes longer is left behind: it ends when it next executes Python, and inside a call into C it
    goes on beside the episode, with whatever it holds or changes, until that returns. Until then the same tool is not
    called again. Tools that need more than that belong in an environment with a process of its own, or behind a server.
    """

    def __init__(
        self,
        tools: Iterable[Tool | Callable[..., Any]] = (),
        sources: Sequence[Source] = (),
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
            twice = [name for name, count in Counter(tool.name for tool in given).items() if count > 1]
            raise ToolRefused(f"two tools are called {' and '.join(twice)}; a name must be one tool's")
        if max_result_chars < 1:
            raise ValueError(f"max_result_chars={max_result_chars} shows nothing; use 1 or more")
        if call_seconds is not None and not 0 < call_seconds <= threading.TIMEOUT_MAX:
            raise ValueError(f"call_seconds={call_seconds} must be more than 0, or None for no limit")
        self._max_chars = max_result_chars
        self._seconds = call_seconds
        self._left_behind: dict[str, threading.Thread] = {}

    @property
    def repeatable(self) -> bool:
        """Whether every source is; functions are taken to be."""
        return all(source.repeatable for source in self._sources)

    def schemas(self) -> list[Schema]:
        """All tools in the form chat templates take; the caller's own copy."""
        copied: list[Schema] = json.loads(json.dumps([tool.schema for tool in self._tools.values()]))
        return copied

    def has(self, call: Call | BadCall) -> bool:
        """Whether there is a tool of the name that is called."""
        return isinstance(call, Call) and call.name in self._tools

    def named(self, call: Call | BadCall) -> Call | BadCall:
        """A call of the plain form with its arguments under their names instead of their places."""
        if isinstance(call, BadCall) or call.name not in self._tools:
            return call
        properties = self._tools[call.name].parameters.get("properties", ())
        places = {str(place): name for place, name in enumerate(properties, start=1)}
        return Call(call.name, {places.get(key, key): value for key, value in call.arguments.items()})

    def answer(self, call: Call | BadCall) -> Answer:
        """Do what a call asks for. Raises nothing that a call or a tool could bring about."""
        answer = self._answer(call)
        # A tokenizer can spell any text but half a surrogate pair, which JSON's escapes can bring in.
        shown = answer.text[: self._max_chars].encode("utf-8", "replace").decode()
        if len(answer.text) <= self._max_chars:
            return Answer(shown, answer.reason)
        said = f"{shown}... ({len(answer.text)} characters, cut to {self._max_chars})"
        return Answer(said, Reason.CUT if answer.reason is Reason.OK else answer.reason)

    def renew(self) -> None:
        """Make ready for an episode."""
        for source in self._sources:
            source.renew()

    def close(self) -> None:
        """Close what the tools belong to."""
        for source in self._sources:
            source.close()

    def _answer(self, call: Call | BadCall) -> Answer:
        if isinstance(call, BadCall):
            return Answer(f"That is no call: {_FAULTS[call.why]}.", Reason.INVALID)
        tool = self._tools.get(call.name)
        if tool is None:
            have = ", ".join(self._tools) or "none"
            return Answer(f"There is no tool {echo(call.name)}; there is: {have}.", Reason.UNKNOWN_TOOL)
        if self._seconds is None or call.name not in self._functions:
            return _run(tool, call.arguments)
        return self._run_within(tool, call.arguments, self._seconds)

    def _run_within(self, tool: Tool, arguments: dict[str, Any], seconds: float) -> Answer:
        before = self._left_behind.get(tool.name)
        if before is not None and before.is_alive():
            return Answer(f"{tool.name} is still busy with an earlier call.", Reason.TIMED_OUT)
        answers: list[Answer] = []

        def run() -> None:
            with suppress(LeftBehind):
                answers.append(_run(tool, arguments))

        # A daemon: an interpreter that ends does not wait for it.
        thread = threading.Thread(target=run, name=f"tool-{tool.name}", daemon=True)
        thread.start()
        thread.join(seconds)
        if answers:
            return answers[0]
        self._left_behind[tool.name] = thread
        leave_behind(thread)
        return Answer(f"{tool.name} took longer than {seconds:g} s.", Reason.TIMED_OUT)


def _run(tool: Tool, arguments: dict[str, Any]) -> Answer:
    try:
        return Answer(_shown(settled(tool.run(arguments))), Reason.OK)
    except WrongArguments as error:
        return Answer(f"{tool.name} was not called: {line(str(error))}.", Reason.WRONG_ARGUMENTS)
    except ToolGone as error:
        return Answer(f"{tool.name} is gone: {line(str(error))}.", Reason.GONE)
    except TimeoutError as error:
        return Answer(f"{tool.name} took too long: {line(str(error))}.", Reason.TIMED_OUT)
    except (Exception, SystemExit) as error:
        # A tool is anybody's code, called with anything, and may raise whatever there is. A policy must be able to read
        # of that and go on: this is the one place that catches everything for tools.
        return Answer(f"{tool.name} failed: {line(f'{type(error).__name__}: {error}')}.", Reason.FAILED)


def _shown(result: Any) -> str:
    if isinstance(result, str):
        return result
    return "done" if result is None else json.dumps(result, ensure_ascii=False, default=str)


class ToolEnv(gym.Wrapper[Observation, str, Observation, str]):
    """Gives an environment tools. Turns that call some are answered here; the environment sees all others.

    The tools' schemas stand on the first message of every conversation: after a reset, and where the environment has it
    begin anew; in the plain style each says so, under "style". A turn with calls, those in thoughts left out, is
    answered with a message a call, `{"role": "tool", "name": ..., "content": ...}`; what else was written in it is said
    to nobody. It pays nothing and ends nothing, and `info["tools"]` counts its answers by reason. Calls of tools that
    the environment itself announces go on to it: one ToolEnv may stand around another, if they differ in names and
    agree in style.

    max_calls: of an episode. Further ones are not made, and the answer says so; `grace` of them are forgiven, one more
    truncates the episode. verdict: the environment says whether an episode succeeded, so one truncated here did not.

    What a ToolEnv holds is how many calls were made, and what its tools hold: it offers no snapshots. An episode goes
    on after a loss by playing its actions again, which makes its calls again, unless a source is not `repeatable`.
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
        self._most = max_calls + grace
        self._verdict = verdict
        self._asked = 0
        self._theirs: frozenset[str] = frozenset()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self._toolbox.renew()
        observation, info = self.env.reset(seed=seed, options=options)
        self._asked = 0
        return self._announced(messages_of(observation)), info

    def step(self, action: str) -> tuple[Observation, float, bool, bool, Info]:
        _, calls = parse_calls(spoken(action), self._style)
        theirs = [call for call in calls if isinstance(call, Call) and self._is_theirs(call)]
        ours = [call for call in calls if not (isinstance(call, Call) and self._is_theirs(call))]
        said, reasons = self._answered(ours)
        if self._asked > self._most:
            verdict = {"success": False} if self._verdict else {}
            return said, 0.0, False, True, {"tools": dict(reasons)} | verdict
        if ours and not theirs:
            return said, 0.0, False, False, {"tools": dict(reasons)}
        reassigned = "\n".join(write_call(call, self._style) for call in theirs) if ours else action
        observation, reward, terminated, truncated, info = self.env.step(reassigned)
        messages = messages_of(observation)
        if messages[0].get("forget"):
            observation = messages = self._announced(messages)
        if not ours:
            return observation, float(reward), terminated, truncated, info
        info |= {"tools": dict(reasons + Counter(answers_by_reason(info)))}
        # Theirs come first: their first message may direct the agent (see envs.base).
        return [*messages, *said], float(reward), terminated, truncated, info

    def close(self) -> None:
        try:
            self._toolbox.close()
        finally:
            super().close()

    @property
    def nondeterministic(self) -> bool:
        """Whether the same calls may be answered otherwise, here or by what is wrapped; see envs.hosting.host."""
        inside = self.env.has_wrapper_attr("nondeterministic") and self.env.get_wrapper_attr(
            "nondeterministic"
        )
        return bool(inside) or not self._toolbox.repeatable

    def _announced(self, messages: list[Message]) -> list[Message]:
        """A conversation's beginning with all tools there are. ToolRefused where theirs and ours do not go together."""
        first, *others = messages
        theirs = first.get("tools", [])
        self._theirs = frozenset(schema["function"]["name"] for schema in theirs)
        schemas = self._toolbox.schemas()
        if twice := sorted(self._theirs & {schema["function"]["name"] for schema in schemas}):
            raise ToolRefused(f"two tools are called {' and '.join(twice)}; a name must be one tool's")
        if any(schema.get("style", "hermes") != self._style for schema in theirs):
            raise ToolRefused(
                f"tools around an environment whose own are called otherwise than style={self._style!r}; use its style"
            )
        if self._style == "plain":
            schemas = [schema | {"style": "plain"} for schema in schemas]
        return [first | {"tools": [*theirs, *schemas]}, *others]

    def _is_theirs(self, call: Call) -> bool:
        return call.name in self._theirs and not self._toolbox.has(call)

    def _answered(self, calls: list[Call | BadCall]) -> tuple[list[Message], Counter[str]]:
        said: list[Message] = []
        reasons: Counter[str] = Counter()
        for call in calls:
            self._asked += 1
            answer = self._answer(self._toolbox.named(call) if self._style == "plain" else call)
            # The name of what is no tool is not repeated: it is the policy's, and might be anything.
            name = call.name if isinstance(call, Call) and self._toolbox.has(call) else ""
            said.append({"role": "tool", "name": name, "content": answer.text})
            reasons[answer.reason.value] += 1
            if self._asked > self._most:
                break
        return said, reasons

    def _answer(self, call: Call | BadCall) -> Answer:
        if self._asked > self._max_calls:
            return Answer(f"All {self._max_calls} calls are made: answer without tools.", Reason.SPENT)
        return self._toolbox.answer(call)
