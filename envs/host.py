"""Where a replica of an environment lives; whoever plays on it awaits its answers wherever that is."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Self, runtime_checkable

import gymnasium as gym
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from pydantic import BaseModel, ConfigDict, Field, model_validator

from envs.adapters import TextAdapter
from envs.base import Info, Observation, Snapshots
from envs.reference import awaited

Env = gym.Env[Any, str]  # text or chat messages in, text out: see envs.base
Outcome = tuple[Observation, float, bool, bool, Info]  # as gymnasium.Env.step returns it
Amount = Annotated[float, Field(ge=0.0001)]  # of a resource; Ray counts in ten thousandths

_STATELESS = (TextAdapter, OrderEnforcing, PassiveEnvChecker)  # once reset


class HostSettings(BaseModel):
    """Where replicas live. A process costs memory and about a tenth of a millisecond a step; it can be killed.

    On a Ray cluster such a process has an actor before it: about 70 MB more, and some milliseconds a step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    where: Literal["auto", "inline", "process", "ray"] = Field(
        "auto",
        description="inline: in the rollout worker, each replica in a thread of its own, left behind when it does not "
        "answer in time; process: each replica in a process of its own, killed when it does not answer in time; ray: "
        "in such a process on any node of the cluster; auto: inline for Manta's and Gymnasium's own environments, "
        "process for all others",
    )
    cpus_per_replica: float = Field(
        1.0, ge=0, description="where='ray': CPUs a replica claims from the cluster, of which a part will do"
    )
    resources: dict[str, Amount] = Field(
        default_factory=dict,
        description="where='ray': what else a replica claims, {cpu_node = 0.01} say; it is put on no node without it",
    )
    start_seconds: float = Field(60.0, gt=0, description="wall clock for a replica to start")
    reset_seconds: float = Field(
        60.0,
        gt=0,
        description="wall clock for a replica to reset; for a foreign agent to ask for its first completion",
    )
    step_seconds: float = Field(
        60.0,
        gt=0,
        description="wall clock for a replica to take a step; for a foreign agent to ask again or to end",
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


class Inline:
    """A replica on the thread that awaits it: nothing between, and nothing that could stop it.

    env: the environment. Its methods may be coroutines.
    """

    reusable = True

    def __init__(self, env: Env) -> None:
        spec = env.unwrapped.spec
        said = env.has_wrapper_attr("nondeterministic") and env.get_wrapper_attr("nondeterministic")
        self.nondeterministic = bool(said) or (spec is not None and spec.nondeterministic)
        self.env = env
        self._told = env if isinstance(env, Told) else None
        self._state = reach(env)

    async def reset(self, seed: int) -> Observation:
        observation: Observation = (await awaited(self.env.reset(seed=seed)))[0]
        return observation

    async def step(self, action: str) -> Outcome:
        outcome: Outcome = await awaited(self.env.step(action))
        return outcome

    def sampled(self, sampled: Sampled) -> None:
        if self._told is not None:
            self._told.sampled(sampled)

    def snapshot(self) -> bytes | None:
        return None if self._state is None else self._state.snapshot()

    async def restore(self, snapshot: bytes) -> None:
        self.load(snapshot)

    def load(self, snapshot: bytes) -> None:
        """`restore`, for a caller that does not await."""
        if self._state is None:
            raise RuntimeError("the environment offers no snapshots, so it can not go on from one")
        self._state.restore(snapshot)

    async def close(self) -> None:
        close: Callable[[], Any] = self.env.close
        await awaited(close())


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
