"""Where a replica of an environment lives; whoever plays on it awaits its answers wherever that is."""

from __future__ import annotations

import asyncio
import inspect
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, Protocol, Self, runtime_checkable

import gymnasium as gym
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from pydantic import BaseModel, ConfigDict, Field, model_validator

from envs.adapters import TextAdapter
from envs.base import Info, Observation, Snapshots
from envs.call_thread import CallThread, Overdue
from envs.own_frames import told
from envs.user_functions import awaited

Env = gym.Env[Any, str]  # text or chat messages in, text out: see envs.base
Outcome = tuple[Observation, float, bool, bool, Info]  # as gymnasium.Env.step returns it
Amount = Annotated[float, Field(ge=0.0001)]  # of a resource; Ray counts in ten thousandths

_CLOSE_SECONDS = 2.0  # what an environment is given to close
_STATELESS = (TextAdapter, OrderEnforcing, PassiveEnvChecker)  # once reset


class HostSettings(BaseModel):
    """Where replicas live. A process costs memory and about a tenth of a millisecond a step; it can be killed.

    On a Ray cluster such a process has an actor before it: about 70 MB more, and some milliseconds a step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    where: Literal["auto", "inline", "process", "ray"] = Field(
        "auto",
        description="where environment replicas run. inline: in the rollout worker, a thread each; a replica "
        "that exceeds a time limit is abandoned. process: in a process each, which is killed when "
        "it exceeds a time limit. ray: in such a process on any node of the cluster. auto: "
        "inline for Manta's and Gymnasium's own environments, process for all others",
    )
    cpus_per_replica: float = Field(
        1.0,
        ge=0,
        description="CPUs reserved on the Ray cluster per replica; fractions allowed. Only with where='ray'",
    )
    resources: dict[str, Amount] = Field(
        default_factory=dict,
        description="custom Ray resources reserved per replica, as in {cpu_node = 0.01}; a replica is placed "
        "only on a node that offers them. Only with where='ray'",
    )
    start_seconds: float = Field(
        60.0,
        gt=0,
        description="time limit for a replica to start, seconds. Raise it for environments that load large "
        "files",
    )
    reset_seconds: float = Field(
        60.0,
        gt=0,
        description="time limit for a reset, seconds; for an external agent, the time until its first request",
    )
    step_seconds: float = Field(
        60.0,
        gt=0,
        description="time limit for a step, seconds; for an external agent, the time until its next request "
        "or its end. An episode that exceeds it has failed",
    )

    @model_validator(mode="after")
    def _claims_are_made_of_a_cluster(self) -> Self:
        if self.where != "ray" and (self.resources or self.cpus_per_replica != 1.0):
            raise ValueError(
                f"cpus_per_replica and resources are claimed from a Ray cluster, but where={self.where!r}; "
                "use where='ray', or leave them away"
            )
        if known := sorted({"CPU", "GPU", "memory", "object_store_memory"} & set(self.resources)):
            raise ValueError(
                f"resources are those that the cluster's nodes were given names for, and {known[0]} is Ray's own; "
                "CPUs are cpus_per_replica"
            )
        return self

    def without_ray(self) -> HostSettings:
        """The same limits where there is no cluster: a process of this machine in place of an actor's."""
        if self.where != "ray":
            return self
        return self.model_copy(update={"where": "process", "resources": {}, "cpus_per_replica": 1.0})

    @property
    def claims(self) -> dict[str, float]:
        """What each replica claims from a cluster, in Ray's names."""
        return {"CPU": self.cpus_per_replica} | self.resources


class EnvironmentFailed(RuntimeError):
    """An environment raised, died or gave no answer. It costs one episode and that replica."""


class EnvironmentRefused(EnvironmentFailed):
    """It was not made, being asked for wrongly: the message is for whoever asked."""


class EnvironmentStuck(EnvironmentFailed):
    """It gave no answer in time."""


class NoRoom(EnvironmentFailed):
    """No node of the cluster had room for it in time."""


class Replica(Protocol):
    """One environment, used by one episode at a time. Raises whatever the environment raises."""

    nondeterministic: bool  # the same seed and actions may lead elsewhere, as the environment says of itself
    reusable: bool  # whether another episode may follow on it

    async def reset(self, seed: int) -> Observation: ...

    async def step(self, action: str) -> Outcome: ...

    def sampled(self, sampled: Sampled) -> None:
        """How the turn came about that the next step brings."""
        ...

    def snapshot(self) -> bytes | None:
        """The state after the last step, which did not end the episode; None where the environment offers none."""
        ...

    async def restore(self, snapshot: bytes) -> None:
        """Go on from a snapshot of another replica; after a reset with the same seed."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Sampled:
    """How a turn came about."""

    prompt_tokens: int  # everything the policy had before it
    completion_tokens: int
    cut: bool  # it ended at the limit of tokens, not by itself


@runtime_checkable
class Told(Protocol):
    """What an environment may offer: to hear how a turn came about, before the step that brings what was said."""

    def sampled(self, sampled: Sampled) -> None: ...


class InProcessEnv:
    """A replica in this process. Its environment's methods may be coroutines.

    thread: makes the environment's calls, within the limits of `settings`. Without one they are made where they are
    awaited, with nothing between and nothing that could stop them.
    """

    reusable = True

    def __init__(
        self, env: Env, settings: HostSettings | None = None, thread: CallThread | None = None
    ) -> None:
        spec = env.unwrapped.spec
        said = env.has_wrapper_attr("nondeterministic") and env.get_wrapper_attr("nondeterministic")
        self.nondeterministic = bool(said) or (spec is not None and spec.nondeterministic)
        self._env = env
        self._told = env if isinstance(env, Told) else None
        self._state = reach(env)
        self._settings = settings or HostSettings()
        self._thread = thread
        self._sampled: Sampled | None = None
        self._snapshot: bytes | None = None

    @classmethod
    async def start(
        cls, make: Callable[[], Env], settings: HostSettings, gate: asyncio.Semaphore
    ) -> InProcessEnv:
        """Make the environment in a new thread, which has all its calls; `gate` bounds how many run at once."""
        thread = CallThread(gate)
        try:
            replica: InProcessEnv = await _within(
                thread, lambda: cls(make(), settings, thread), "start", settings.start_seconds
            )
        except BaseException:
            thread.end()
            raise
        return replica

    async def reset(self, seed: int) -> Observation:
        observation: Observation = (
            await self._call(lambda: self._env.reset(seed=seed), "reset", self._settings.reset_seconds)
        )[0]
        return observation

    async def step(self, action: str) -> Outcome:
        step = partial(self._step, action)
        outcome: Outcome
        outcome, self._snapshot = await self._call(step, "step", self._settings.step_seconds)
        return outcome

    def sampled(self, sampled: Sampled) -> None:
        self._sampled = sampled  # it goes with the step

    def snapshot(self) -> bytes | None:
        return self._snapshot

    async def restore(self, snapshot: bytes) -> None:
        if (state := self._state) is None:
            raise RuntimeError("the environment offers no snapshots, so it can not go on from one")
        await self._call(lambda: state.restore(snapshot), "restore", self._settings.reset_seconds)

    async def close(self) -> None:
        """Let the environment close; where it still owes an answer, as soon as it returns."""
        close: Callable[[], Any] = self._env.close
        if self._thread is None:
            await awaited(close())
        elif self._thread.busy:
            self._thread.end(last=close)
        else:
            try:
                await _within(self._thread, close, "close", _CLOSE_SECONDS)
            finally:
                self._thread.end()

    def _step(self, action: str) -> Any:
        """The outcome and the state behind it, or a coroutine that gives them."""
        if self._told is not None and self._sampled is not None:
            self._told.sampled(self._sampled)
        outcome: Any = self._env.step(action)
        return self._stepped(outcome) if inspect.isawaitable(outcome) else (outcome, self._kept(outcome))

    async def _stepped(self, pending: Awaitable[Outcome]) -> tuple[Outcome, bytes | None]:
        outcome = await pending
        return outcome, self._kept(outcome)

    def _kept(self, outcome: Outcome) -> bytes | None:
        if not isinstance(outcome, tuple) or len(outcome) != 5:
            raise TypeError(
                f"step() gave {outcome!r:.80}, not (observation, reward, terminated, truncated, info)"
            )
        _, _, terminated, truncated, _ = outcome
        return None if self._state is None or terminated or truncated else self._state.snapshot()

    async def _call(self, call: Callable[[], Any], what: str, seconds: float) -> Any:
        if self._thread is None:
            return await awaited(call())
        return await _within(self._thread, call, what, seconds)


async def _within(thread: CallThread, call: Callable[[], Any], what: str, seconds: float) -> Any:
    try:
        return await thread.ask(call, seconds)
    except Overdue as where:
        limit = {"start": "start_seconds", "step": "step_seconds"}.get(what, "reset_seconds")
        raise EnvironmentStuck(
            f"it did not {what} within {seconds:g} s (env.host.{limit}); its thread was left behind in {where}"
        ) from None
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
        raise EnvironmentFailed(f"it ended with {told(error)}") from error


def reach(env: Env) -> Snapshots | None:
    """What an environment offers of `Snapshots`, through Gymnasium's usual wrappers; None where it offers none.

    A wrapper of another kind may hold a state of its own: it must offer `Snapshots` itself.
    """
    limits = []
    while not isinstance(env, Snapshots):
        if isinstance(env, TimeLimit):
            limits.append(env)
        elif not isinstance(env, _STATELESS):
            return None
        env = env.env
    return _Counted(env, tuple(limits)) if limits else env


class _Counted:
    """An environment's snapshots, with the turns that the time limits around it have counted."""

    def __init__(self, inner: Snapshots, limits: tuple[TimeLimit[Any, Any], ...]) -> None:
        self._inner = inner
        self._limits = limits
        self._counts = struct.Struct(f"<{len(limits)}q")

    def snapshot(self) -> bytes:
        return self._counts.pack(*(limit._elapsed_steps for limit in self._limits)) + self._inner.snapshot()

    def restore(self, snapshot: bytes) -> None:
        self._inner.restore(snapshot[self._counts.size :])
        for limit, count in zip(self._limits, self._counts.unpack_from(snapshot), strict=True):
            limit._elapsed_steps = count
