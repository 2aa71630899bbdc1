"""Hosting of environment replicas: the interface to one, settings, errors, and a replica in this process."""

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
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from envs.adapters import TextAdapter
from envs.base import Info, Observation, Snapshots
from envs.call_thread import CallThread, CallTimeout
from envs.code_lines import describe_error
from envs.user_functions import awaited

Env = gym.Env[Any, str]  # observations are text or chat messages, actions text: see envs.base
Outcome = tuple[Observation, float, bool, bool, Info]  # as gymnasium.Env.step returns it
Amount = Annotated[float, Field(ge=0.0001)]  # of a resource; Ray's resolution


def _custom(resources: dict[str, float]) -> dict[str, float]:
    if known := sorted({"CPU", "GPU", "memory", "object_store_memory"} & set(resources)):
        raise ValueError(
            f"resources are custom resources of the cluster's nodes, and {known[0]} is built into Ray; CPUs and GPUs "
            "have options of their own"
        )
    return resources


CustomResources = Annotated[dict[str, Amount], AfterValidator(_custom)]  # by the names that nodes offer

CLOSE_SECONDS = 2.0  # limit for an environment to close
_STATELESS = (TextAdapter, OrderEnforcing, PassiveEnvChecker)  # wrappers without state after reset


class HostSettings(BaseModel):
    """Where replicas run. A process costs memory and about 0.1 ms per step; it can be killed.

    On a Ray cluster an actor owns the process, at about 70 MB more and some milliseconds per step.
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
    resources: CustomResources = Field(
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
    def _resources_need_a_cluster(self) -> Self:
        if self.where != "ray" and (self.resources or self.cpus_per_replica != 1.0):
            raise ValueError(
                f"cpus_per_replica and resources are claimed from a Ray cluster, but where={self.where!r}; "
                "use where='ray', or omit them"
            )
        return self

    def without_ray(self) -> HostSettings:
        """The same limits without a cluster: where="ray" becomes "process"."""
        if self.where != "ray":
            return self
        return self.model_copy(update={"where": "process", "resources": {}, "cpus_per_replica": 1.0})

    @property
    def claims(self) -> dict[str, float]:
        """The resources that each replica claims from a cluster, in Ray's names."""
        return {"CPU": self.cpus_per_replica} | self.resources


class EnvironmentFailed(RuntimeError):
    """An environment raised, died or did not answer. It costs one episode and that replica."""


class EnvironmentRefused(EnvironmentFailed):
    """The environment was not made because it was requested wrongly; the message is for the user."""


class EnvironmentTimeout(EnvironmentFailed):
    """The environment did not answer in time."""


class ClusterFull(EnvironmentFailed):
    """No node of the cluster had room for the replica in time."""


class Replica(Protocol):
    """One environment, used by one episode at a time. Raises what the environment raises."""

    nondeterministic: bool  # declared by the environment: the same seed and actions may give another episode
    reusable: bool  # whether it may be reset for another episode

    async def reset(self, seed: int) -> Observation: ...

    async def step(self, action: str) -> Outcome: ...

    def sampled(self, sampled: TokenUsage) -> None:
        """Record the token usage of the turn that the next step executes."""
        ...

    def snapshot(self) -> bytes | None:
        """The state after the last step, which did not end the episode; None if the environment has no snapshots."""
        ...

    async def restore(self, snapshot: bytes) -> None:
        """Continue from a snapshot of another replica, after a reset with the same seed."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Token counts of a sampled turn."""

    prompt_tokens: int  # the whole context before the turn
    completion_tokens: int
    cut: bool  # ended by the token limit (finish reason "length")


@runtime_checkable
class SamplingAware(Protocol):
    """Optional interface of an environment: receives the token usage of a turn before its step."""

    def sampled(self, sampled: TokenUsage) -> None: ...


class InProcessEnv:
    """A replica in this process. The environment's methods may be coroutines.

    thread: makes the environment's calls, within the limits of `settings`. Without one, they are made directly in the
    event loop's thread, without limits. immediate: so are all steps, which return at once.
    """

    reusable = True

    def __init__(
        self,
        env: Env,
        settings: HostSettings | None = None,
        thread: CallThread | None = None,
        immediate: bool = False,
    ) -> None:
        spec = env.unwrapped.spec
        declared = env.has_wrapper_attr("nondeterministic") and env.get_wrapper_attr("nondeterministic")
        self.nondeterministic = bool(declared) or (spec is not None and spec.nondeterministic)
        self._env = env
        self._sampling_aware = env if isinstance(env, SamplingAware) else None
        self._snapshots = find_snapshots(env)
        self._settings = settings or HostSettings()
        self._thread = thread
        self._immediate = immediate
        self._sampled: TokenUsage | None = None
        self._snapshot: bytes | None = None

    @classmethod
    async def start(
        cls,
        make: Callable[[], Env],
        settings: HostSettings,
        gate: asyncio.Semaphore,
        immediate: bool = False,
    ) -> InProcessEnv:
        """Make the environment in a new thread, which makes its calls; `gate` bounds concurrent calls."""
        thread = CallThread(gate)
        try:
            replica: InProcessEnv = await _within(
                thread, lambda: cls(make(), settings, thread, immediate), "start", settings.start_seconds
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
        if self._immediate:
            outcome, self._snapshot = await awaited(step())
        else:
            outcome, self._snapshot = await self._call(step, "step", self._settings.step_seconds)
        return outcome

    def sampled(self, sampled: TokenUsage) -> None:
        self._sampled = sampled  # passed on with the next step

    def snapshot(self) -> bytes | None:
        return self._snapshot

    async def restore(self, snapshot: bytes) -> None:
        if (state := self._snapshots) is None:
            raise RuntimeError("restore() was called, but the environment has no snapshots")
        await self._call(lambda: state.restore(snapshot), "restore", self._settings.reset_seconds)

    async def close(self) -> None:
        """Close the environment, after the current call if one is still running."""
        close: Callable[[], Any] = self._env.close
        if self._thread is None:
            await awaited(close())
        elif self._thread.busy:
            self._thread.end(last=close)
        else:
            try:
                await _within(self._thread, close, "close", CLOSE_SECONDS)
            finally:
                self._thread.end()

    def _step(self, action: str) -> Any:
        """The outcome and the snapshot after it, or a coroutine of both."""
        if self._sampling_aware is not None and self._sampled is not None:
            self._sampling_aware.sampled(self._sampled)
        outcome: Any = self._env.step(action)
        return self._stepped(outcome) if inspect.isawaitable(outcome) else (outcome, self._state_of(outcome))

    async def _stepped(self, pending: Awaitable[Outcome]) -> tuple[Outcome, bytes | None]:
        outcome = await pending
        return outcome, self._state_of(outcome)

    def _state_of(self, outcome: Outcome) -> bytes | None:
        if not isinstance(outcome, tuple) or len(outcome) != 5:
            raise TypeError(
                f"step() returned {outcome!r:.80}; return (observation, reward, terminated, truncated, info)"
            )
        _, _, terminated, truncated, _ = outcome
        return None if self._snapshots is None or terminated or truncated else self._snapshots.snapshot()

    async def _call(self, call: Callable[[], Any], what: str, seconds: float) -> Any:
        if self._thread is None:
            return await awaited(call())
        return await _within(self._thread, call, what, seconds)


def limit_text(call: str, seconds: float) -> str:
    """A time limit with its option, for an error: "60 s (env.host.step_seconds)"."""
    option = {"start": "start_seconds", "step": "step_seconds"}.get(call, "reset_seconds")
    return f"{seconds:g} s (env.host.{option})"


async def _within(thread: CallThread, call: Callable[[], Any], what: str, seconds: float) -> Any:
    try:
        return await thread.ask(call, seconds)
    except CallTimeout as where:
        late = f"it did not {what} within {limit_text(what, seconds)}"
        raise EnvironmentTimeout(f"{late}; its thread was abandoned in {where}") from None
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
        raise EnvironmentFailed(f"it ended with {describe_error(error)}") from error


def find_snapshots(env: Env) -> Snapshots | None:
    """The `Snapshots` of an environment, seen through Gymnasium's stateless wrappers; None if it has none.

    A wrapper of another kind may hold state: it must implement `Snapshots` itself.
    """
    limits = []
    while not isinstance(env, Snapshots):
        if isinstance(env, TimeLimit):
            limits.append(env)
        elif not isinstance(env, _STATELESS):
            return None
        env = env.env
    return _WithElapsedSteps(env, tuple(limits)) if limits else env


class _WithElapsedSteps:
    """An environment's snapshots, together with the step counts of the TimeLimit wrappers around it."""

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
