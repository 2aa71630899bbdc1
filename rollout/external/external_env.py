"""A foreign agent as an environment: its requests are observations, the policy's completions are actions.

    reset    the program is started for one episode; its first request is the observation
    step     the action answers that request; the next request is the observation, or the program's verdict ends the
             episode

A request that extends the last one (its messages, the policy's answer unchanged, new messages) is observed as the new
messages: the conversation continues by delta, and sampled tokens stay as sampled. Any other request is observed whole,
in a new segment, and so is a request after a truncated answer (`stop`). A request that the policy's chat template
refuses gets an error, and is not observed.
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
from envs.hosting.host import EnvironmentFailed, HostSettings, Outcome, TokenUsage
from envs.registry import EnvironmentUnknown
from envs.user_functions import load_function, settled
from rollout.chat.chat import Chat, ChatError, TooLong
from rollout.chat.long_text import off_loop
from rollout.external.openai_format import ChatReply, ChatRequest, Refused, answer, plain
from rollout.external.program import (
    FunctionAgent,
    ProgramAgent,
    RunningAgent,
    as_command,
    environment,
    in_thread,
)
from rollout.external.session import EpisodeVerdict, PendingRequest, ProgramExit, Session

if TYPE_CHECKING:
    from rollout.external.endpoint import Endpoint

PROGRAM = "program"  # the environment's id
_LEAVE_TIMEOUT_SECONDS = 2.0  # for a program to exit by itself after its verdict


class ProgramOptions(BaseModel):
    """Options of the environment "program"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: tuple[str, ...] = Field((), description="program and its arguments; started once per episode")
    function: str = Field(
        "",
        description='alternative to command: a function "module:function", called with (base_url, api_key, '
        "task)",
    )
    reward: str = Field(
        "",
        description='function "module:function" that returns the reward, called with (task, messages, output) '
        "when the program has ended without an error. Not set: the program reports its reward",
    )
    reward_seconds: float = Field(
        60.0,
        gt=0,
        description="time limit for the reward function, seconds; an episode that exceeds it has failed",
    )
    task: dict[str, Any] = Field(
        default_factory=dict, description="values passed to the program as its task, beside the seed"
    )

    @classmethod
    def read(cls, options: dict[str, Any]) -> ProgramOptions:
        """Validate options. Raises EnvironmentUnknown, one line, for invalid ones and missing functions."""
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
            raise EnvironmentUnknown(f"environment {PROGRAM}: task.seed is set by each episode; remove it")
        return read


class ForeignAgents:
    """Creates the replicas of a worker's foreign agents, which share one endpoint; the first one starts it."""

    def __init__(self, chat: Chat | None = None) -> None:
        self._chat = chat
        self._endpoint: Endpoint | None = None
        # Programs that start compete for the processors, and a stuck one must leave room for others.
        self._starting = asyncio.Semaphore(2 * len(os.sched_getaffinity(0)) + 2)

    def replica(self, options: dict[str, Any], host: HostSettings, apart: bool = False) -> ForeignAgent:
        """A replica whose program is not started yet. Raises EnvironmentUnknown. apart: a function gets a process."""
        read = ProgramOptions.read(options)
        if self._endpoint is None:
            from rollout.external.endpoint import Endpoint  # a web server, which most runs do not need

            self._endpoint = Endpoint()
        host = host.model_copy(update={"where": "process"}) if apart else host
        return ForeignAgent(self._endpoint, read, host, self._starting, self._chat)

    async def close(self) -> None:
        """Close the endpoint; the pool closes the replicas."""
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            await endpoint.close()


class ForeignAgent:
    """A `Replica` for one episode. chat: requests that it cannot render are refused; None: all are accepted."""

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
        self._history = ChatHistory()
        self._task: dict[str, Any] = {}
        self._session: Session | None = None
        self._running: RunningAgent | None = None
        self._call: PendingRequest | None = None  # the request that `step` answers
        self._sampled = TokenUsage(0, 0, cut=False)
        self._turn = 0

    async def reset(self, seed: int) -> Observation:
        """Start the program and return its first request. Raises EnvironmentFailed if there is none."""
        if self._task:
            raise RuntimeError("a foreign agent was reset twice; a replica is for one episode")
        self._task = self._options.task | {"seed": seed}
        self._session = self._endpoint.open()
        async with admitted(self._starting):
            self._running = await self._start(self._session)
            observed = await self._observe("ask for a completion", self._host.reset_seconds, "reset_seconds")
        if isinstance(observed, EpisodeVerdict):
            raise EnvironmentFailed("its program ended without a request for a completion")
        return observed

    def sampled(self, sampled: TokenUsage) -> None:
        self._sampled = sampled

    async def step(self, action: str) -> Outcome:
        """Answer the request, and wait for the program's next one or its verdict."""
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
        if not isinstance(observed, EpisodeVerdict):
            return observed, 0.0, False, False, {}
        await self.close(_LEAVE_TIMEOUT_SECONDS)
        return _outcome(observed)

    def snapshot(self) -> bytes | None:
        return None

    async def restore(self, snapshot: bytes) -> None:
        raise RuntimeError("a foreign agent offers no snapshots")

    async def close(self, grace: float = 0.0) -> None:
        """End the program, after `grace` seconds, and its session."""
        session, self._session = self._session, None
        running, self._running = self._running, None
        try:
            if running is not None:
                await running.end(grace)
        finally:
            if session is not None:
                self._endpoint.end(session)

    async def _start(self, session: Session) -> RunningAgent:
        url, options, task = self._endpoint.base_url, self._options, self._task
        if options.function and self._host.where != "process":
            return FunctionAgent(load_function(options.function), url, session.key, task, session.leave)
        command, more = as_command(options.function) if options.function else (options.command, {})
        return await ProgramAgent.start(command, environment(url, session.key, task) | more, session.leave)

    async def _observe(self, what: str, seconds: float, limit: str) -> list[Message] | EpisodeVerdict:
        """Wait for the program's next request that the policy's template accepts, or for the episode's verdict."""
        while isinstance(heard := await self._hear(what, seconds, limit), PendingRequest):
            history, observed = self._history.with_request(heard.asked)
            try:
                await off_loop(observed, partial(self._render, observed))
            except TooLong:
                pass  # the agent raises it again, which ends the episode
            except ChatError as error:
                heard.refuse(Refused(400, "invalid_request", str(error)))
                continue
            self._call, self._history = heard, history
            return observed
        return await self._judged(heard) if isinstance(heard, ProgramExit) else heard

    def _render(self, observed: list[Message]) -> None:
        # The agent will need the same tokens, which are then in the chat's cache.
        if self._chat is not None:
            begins = not self._history.messages or observed[0].get("reset_context")
            self._chat.opening(observed) if begins else self._chat.delta(observed, ())

    async def _hear(
        self, what: str, seconds: float, limit: str
    ) -> PendingRequest | EpisodeVerdict | ProgramExit:
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

    async def _judged(self, left: ProgramExit) -> EpisodeVerdict:
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
        return EpisodeVerdict.read(value)

    async def _said_by_reward(self, output: str) -> Any:
        """Call the function `reward`. Raises EnvironmentFailed if it raises or exceeds its time limit."""
        name, seconds = f"the reward function {self._options.reward}", self._options.reward_seconds
        judge = load_function(self._options.reward)
        returned: asyncio.Future[ProgramExit] = asyncio.get_running_loop().create_future()

        def settle(left: ProgramExit) -> None:
            if not returned.done():  # the wait may have timed out
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
class ChatHistory:
    """Messages of the program's last request, and the policy's answer to it."""

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    whole: bool = True  # whether the answer is the whole sampled text

    def with_request(self, asked: ChatRequest) -> tuple[ChatHistory, list[Message]]:
        """The history after this request, and its new messages, or all of them to restart the conversation."""
        known = len(self.messages)
        same = self.whole and asked.tools == self.tools and asked.messages[:known] == self.messages
        continues = same and 0 < known < len(asked.messages)
        directions: Message = {} if asked.max_tokens is None else {"max_tokens": asked.max_tokens}
        if not continues:
            directions |= ({"tools": asked.tools} if asked.tools else {}) | (
                {"reset_context": True} if known else {}
            )
        first, *others = asked.messages[known:] if continues else asked.messages
        return ChatHistory(asked.messages, asked.tools), [first | directions, *others]

    def answered(self, given: ChatReply) -> ChatHistory:
        return replace(self, messages=[*self.messages, plain(given.message)], whole=given.whole)


def _outcome(verdict: EpisodeVerdict) -> Outcome:
    info: Info = {"malformed": True} if verdict.end == "malformed" else {}
    if verdict.success is not None:
        info["success"] = verdict.success
    if verdict.rewards is not None:
        info["rewards"] = dict(verdict.rewards)
    truncated = verdict.end == "truncated"
    return "", verdict.reward, not truncated, truncated, info
