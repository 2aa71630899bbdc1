"""Checks of an environment in a child process, which can be killed: pickling, time limits, and survival.

Everything that is called in this process is called in the child first, if possible. A call that never returns is then a
violation, and this process does not hang.
"""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress

from envs.checks.findings import Issue
from envs.checks.recording import EnvRaised, Record, env_call, play, shown
from envs.hosting.host import Env, EnvironmentFailed, EnvironmentRefused, EnvironmentTimeout, HostSettings
from envs.hosting.subprocess_env import SubprocessEnv
from envs.registry import EnvironmentUnknown, Player

START_SECONDS = 60.0  # to start an interpreter, import, and make the environment


class CheckAborted(Exception):
    """No further checks are possible."""

    def __init__(self, violation: Issue) -> None:
        self.violation = violation


def make_env(factory: Callable[[], Env]) -> Env:
    """Call a factory in this process. Raises EnvRaised; EnvironmentUnknown (a user's mistake) passes through."""
    try:
        with env_call("making it"):
            return factory()
    except EnvRaised as failed:
        if isinstance(failed.error, EnvironmentUnknown):
            raise failed.error from None
        raise


@asynccontextmanager
async def child_replica(
    factory: Callable[[], Env], seconds: float, findings: list[Issue]
) -> AsyncIterator[SubprocessEnv | None]:
    """A replica in a child process; None and a violation if its factory cannot be pickled.

    Raises what `make_env` does, and CheckAborted if the process dies.
    """
    try:
        pickle.dumps(factory)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        findings.append(Issue("pickling", f"its factory cannot be pickled: {shown(str(error))}", "making it"))
        yield None
        return
    limits = HostSettings(
        where="process", start_seconds=START_SECONDS, reset_seconds=seconds, step_seconds=seconds
    )
    try:
        with _process_errors("making it in a child process", START_SECONDS):
            replica = await SubprocessEnv.start(factory, limits)
    except EnvRaised as failed:
        if isinstance(failed.error, EnvironmentRefused):
            raise EnvironmentUnknown(str(failed.error)) from None
        raise
    try:
        yield replica
    finally:
        await replica.close()


async def play_in_child(
    replica: SubprocessEnv,
    player: Callable[[int], Player],
    seeds: Sequence[int],
    unreadable: Sequence[str],
    turns: int,
    seconds: float,
) -> Record | EnvRaised:
    """The first seed's episode in the child process, or the first error there.

    Plays every seed, sends every unparsable action, and takes a step after the end.
    """
    results: list[Record | EnvRaised] = []
    for seed in seeds:
        try:
            with _process_errors(f"in a child process, seed {seed}", seconds):
                results.append(await play(replica, seed, player(seed), turns))
        except EnvRaised as failed:
            results.append(failed)
    for action in unreadable:
        where = f"in a child process, seed {seeds[0]}, action {shown(repr(action))}"
        with suppress(EnvRaised), _process_errors(where, seconds):
            await replica.reset(seeds[0])
            await replica.step(action)
            await replica.step(action)
    return next((each for each in results if isinstance(each, EnvRaised)), results[0])


@contextmanager
def _process_errors(where: str, seconds: float) -> Iterator[None]:
    """Wrap calls into the child: EnvRaised if the environment raised, CheckAborted if the process is lost."""
    try:
        yield
    except EnvironmentTimeout:
        raise CheckAborted(Issue("time", f"no answer within {seconds:g} s", where)) from None
    except EnvironmentFailed as error:
        if error.__cause__ is not None:  # the environment's own error
            raise EnvRaised(where, error) from error
        raise CheckAborted(Issue("death", str(error), where)) from None
