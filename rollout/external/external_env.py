"""A foreign agent as an environment: its requests are observations, the policy's completions are actions.

    reset    the program is started for one episode; the first request it makes is the observation
    step     that request is answered; the next one is the observation, or the program's verdict ends the episode

A request whose messages are those of the last one, the policy's answer as it was given, and new ones, is observed as
the new ones: the conversation goes on by delta, and what was sampled stays as it was sampled. Any other request is
observed whole, and begins a segment of its own; so is one after an answer that was given in part (`stop`). A request
that the policy's chat template refuses is answered with an error, and nothing is observed.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from envs.base import Info, Message, Observation
from envs.gate import admitted
from envs.hosting.host import EnvironmentFailed, HostSettings, Outcome, Sampled
from envs.registry import EnvironmentUnknown
from envs.user_functions import load_function, settled
from rollout.chat.chat import Chat, ChatError, TooLong
from rollout.chat.long_text import off_loop
from rollout.external.openai_format import Answer, Asked, Refused, answer, plain
from rollout.external.program import Called, Program, Running, as_command, environment, in_thread
from rollout.external.session import Call, Left, Session, Verdict

if TYPE_CHECKING:
    from rollout.external.endpoint import Endpoint

PROGRAM = "program"  # the environment's id
_LEAVE_SECONDS = 2.0  # for a program to end by itself after its verdict


class ProgramOptions(BaseModel):
    """The options of the environment "program"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: tuple[str, ...] = Field(
        (), description="the program and its arguments, started anew for each episode"
    )
    function: str = Field(
        "", description='in place of a command: "module:function", called with (base_url, api_key, task)'
    )
    reward: str = Field(
        "",
        description='"module:function", called with (task, messages, output) after the program ended well, for what '
        "the episode came to; without one the program says it",
    )
    reward_seconds: float = Field(60.0, gt=0, description="wall clock for the function `reward` to return")
    task: dict[str, Any] = Field(
        default_factory=dict, description="what is given to the program beside the seed"
    )

    @classmethod
    def read(cls, options: dict[str, Any]) -> ProgramOptions:
        """Raises EnvironmentUnknown, one line, where they do not fit or name functions that are not there."""
        try:
            read = cls.model_validate(options)
            for reference in filter(None, (read.function, read.reward)):
                load_function(reference)
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            have = ", ".join(cls.model_fields)
            raise EnvironmentUnknown(f"environment {PROGRAM}: {faults}; its options: {have}") from None
        except ValueError as error:
            raise EnvironmentUnknown(f"environment {PROGRAM}: {error}") from error
        if bool(read.command) == bool(read.function):
            raise EnvironmentUnknown(f"environment {PROGRAM}: give either command or function in its options")
        if "seed" in read.task:
            raise EnvironmentUnknown(f"environment {PROGRAM}: task.seed is each episode's own; leave it away")
        return read


class ForeignAgents:
    """Makes the replicas of a worker's foreign agents, which share one endpoint; it is served from the first one on."""

    def __init__(self, host: HostSettings, chat: Chat | None = None) -> None:
        self._host = host
        self._chat = chat
        self._endpoint: Endpoint | None = None
        # Programs that start compete for the processors, and a stuck one must leave room for others.
        self._starting = asyncio.Semaphore(2 * len(os.sched_getaffinity(0)) + 2)

    def replica(self, options: dict[str, Any], apart: bool = False) -> ForeignAgent:
        """A replica whose program is not started yet. Raises EnvironmentUnknown. apart: a function gets a process."""
        read = ProgramOptions.read(options)
        if self._endpoint is None:
            from rollout.external.endpoint import Endpoint  # a web server, which most runs do without

            self._endpoint = Endpoint()
        host = self._host.model_copy(update={"where": "process"}) if apart else self._host
        return ForeignAgent(self._endpoint, read, host, self._starting, self._chat)

    async def close(self) -> None:
        """End the endpoint; replicas are closed by whoever has them."""
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            await endpoint.close()


class ForeignAgent:
    """A `Replica`, for one episode. chat: what requests have to be rendered by; without one none is refused for it."""

    nondeterministic = True
    reusable = False

    def __init__(
        self,
        endpoint: Endpoint,
        options: ProgramOptions,
        host: HostSettings,
        starting: asyncio.Semaphore,
        chat: Chat | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._options = options
        self._host = host
        self._starting = starting
        self._chat = chat
        self._history = History()
        self._task: dict[str, Any] = {}
        self._session: Session | None = None
        self._running: Running | None = None
        self._call: Call | None = None  # what `step` answers
        self._sampled = Sampled(0, 0, cut=False)
        self._turn = 0

    async def reset(self, seed: int) -> Observation:
        """The first request. Raises EnvironmentFailed where none comes."""
        if self._task:
            raise RuntimeError("a foreign agent was reset twice; a replica is for one episode")
        self._task = self._options.task | {"seed": seed}
        self._session = self._endpoint.open()
        async with admitted(self._starting):
            self._running = await self._start(self._session)
            observed = await self._observe("ask for a completion", self._host.reset_seconds, "reset_seconds")
        if isinstance(observed, Verdict):
            raise EnvironmentFailed("its program came to an end without asking for a completion")
        return observed

    def sampled(self, sampled: Sampled) -> None:
        self._sampled = sampled

    async def step(self, action: str) -> Outcome:
        """Answer the request, and hear what the program does with it."""
        if self._call is None:
            raise RuntimeError("step() was called where no request waits for an answer")
        call, said = self._call, self._sampled
        answered = answer(
            call.asked, action, self._turn, said.cut, said.prompt_tokens, said.completion_tokens
        )
        self._turn += 1
        self._history = self._history.answered(answered)
        self._call = None
        assert self._session is not None
        self._session.reply(call, answered)
        observed = await self._observe("ask again or end", self._host.step_seconds, "step_seconds")
        if not isinstance(observed, Verdict):
            return observed, 0.0, False, False, {}
        await self.close(_LEAVE_SECONDS)
        return _outcome(observed)

    def snapshot(self) -> bytes | None:
        return None

    async def restore(self, snapshot: bytes) -> None:
        raise RuntimeError("a foreign agent offers no snapshots")

    async def close(self, grace: float = 0.0) -> None:
        """See the program ended, after `grace` seconds, and its key refused."""
        session, self._session = self._session, None
        running, self._running = self._running, None
        try:
            if running is not None:
                await running.end(grace)
        finally:
            if session is not None:
                self._endpoint.end(session)

    async def _start(self, session: Session) -> Running:
        url, options, task = self._endpoint.base_url, self._options, self._task
        if options.function and self._host.where != "process":
            return Called(load_function(options.function), url, session.key, task, session.leave)
        command, more = as_command(options.function) if options.function else (options.command, {})
        return await Program.start(command, environment(url, session.key, task) | more, session.leave)

    async def _observe(self, what: str, seconds: float, limit: str) -> list[Message] | Verdict:
        """What the program asks next, as far as the policy's template takes it, or what the episode came to."""
        while isinstance(heard := await self._hear(what, seconds, limit), Call):
            history, observed = self._history.going_on(heard.asked)
            try:
                await off_loop(observed, partial(self._render, observed))
            except TooLong:
                pass  # the agent finds it as well, and the episode ends by it
            except ChatError as error:
                heard.refuse(Refused(400, "invalid_request", str(error)))
                continue
            self._call, self._history = heard, history
            return observed
        return await self._judged(heard) if isinstance(heard, Left) else heard

    def _render(self, observed: list[Message]) -> None:
        # The agent will ask for the same tokens, and be given these.
        if self._chat is not None:
            begins = not self._history.messages or observed[0].get("forget")
            self._chat.opening(observed) if begins else self._chat.delta(observed, ())

    async def _hear(self, what: str, seconds: float, limit: str) -> Call | Verdict | Left:
        assert self._session is not None
        assert self._running is not None
        try:
            async with asyncio.timeout(seconds) as clock:
                return await self._session.next()
        except TimeoutError:
            if not clock.expired():
                raise
            said = self._running.said()
            await self.close()
            raise EnvironmentFailed(
                f"its program did not {what} within {seconds:g} s (env.host.{limit}) and was ended{said}"
            ) from None

    async def _judged(self, left: Left) -> Verdict:
        if left.failure is not None:
            raise EnvironmentFailed(left.failure) from left.error
        value = left.result
        if self._options.reward:
            value = await self._said_by_reward(left.output)
        if value is None:
            raise EnvironmentFailed(
                'its program ended without a reward: post one, have its last line be {"reward": ...}, return one from '
                "its function, or name a function in env.options.reward"
            )
        return Verdict.read(value)

    async def _said_by_reward(self, output: str) -> Any:
        """What the function `reward` returns. Raises EnvironmentFailed where it raises or does not return in time."""
        name, seconds = f"the reward function {self._options.reward}", self._options.reward_seconds
        judge = load_function(self._options.reward)
        returned: asyncio.Future[Left] = asyncio.get_running_loop().create_future()

        def settle(left: Left) -> None:
            if not returned.done():  # nobody waits any more
                returned.set_result(left)

        in_thread(lambda: settled(judge(self._task, self._history.messages, output)), name, settle)
        try:
            async with asyncio.timeout(seconds) as clock:
                left = await returned
        except TimeoutError:
            if not clock.expired():
                raise
            raise EnvironmentFailed(
                f"{name} did not return within {seconds:g} s (env.options.reward_seconds)"
            ) from None
        if left.failure is not None:
            raise EnvironmentFailed(left.failure) from left.error
        return left.result


@dataclass(frozen=True, slots=True)
class History:
    """The conversation as the program last had it, the policy's answer included."""

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    whole: bool = True  # the answer was given as it was sampled, to its end

    def going_on(self, asked: Asked) -> tuple[History, list[Message]]:
        """The history with this request, and what is new to the policy in it, or everything, to begin anew with."""
        known = len(self.messages)
        same = self.whole and asked.tools == self.tools and asked.messages[:known] == self.messages
        goes_on = same and 0 < known < len(asked.messages)
        directions: Message = {} if asked.max_tokens is None else {"max_tokens": asked.max_tokens}
        if not goes_on:
            directions |= ({"tools": asked.tools} if asked.tools else {}) | (
                {"forget": True} if known else {}
            )
        first, *others = asked.messages[known:] if goes_on else asked.messages
        return History(asked.messages, asked.tools), [first | directions, *others]

    def answered(self, given: Answer) -> History:
        return replace(self, messages=[*self.messages, plain(given.message)], whole=given.whole)


def _outcome(verdict: Verdict) -> Outcome:
    info: Info = {"malformed": True} if verdict.end == "malformed" else {}
    if verdict.success is not None:
        info["success"] = verdict.success
    if verdict.rewards is not None:
        info["rewards"] = dict(verdict.rewards)
    truncated = verdict.end == "truncated"
    return "", verdict.reward, not truncated, truncated, info
