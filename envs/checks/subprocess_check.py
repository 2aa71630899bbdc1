"""An environment in a process of its own, which can be killed: whether it can be sent there, answers in time, lives on.

Whatever is asked of an environment in this process was asked there before, where that can be: an answer that never
comes is then a finding, and nobody waits for it here.
"""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress

from envs.checks.findings import Finding
from envs.checks.recording import Record, Trouble, asking, play, shown
from envs.hosting.host import Env, EnvironmentFailed, EnvironmentRefused, EnvironmentStuck, HostSettings
from envs.hosting.subprocess_env import SubprocessEnv
from envs.registry import EnvironmentUnknown, Player

START_SECONDS = 60.0  # for an interpreter, the imports and the environment to be made


class Unfit(Exception):
    """Nothing more can be examined."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding


def made(recipe: Callable[[], Env]) -> Env:
    """What a recipe makes, here. Raises Trouble, and EnvironmentUnknown as it is: a person's mistake is no finding."""
    try:
        with asking("making it"):
            return recipe()
    except Trouble as trouble:
        if isinstance(trouble.error, EnvironmentUnknown):
            raise trouble.error from None
        raise


@asynccontextmanager
async def process(
    recipe: Callable[[], Env], seconds: float, findings: list[Finding]
) -> AsyncIterator[SubprocessEnv | None]:
    """A replica in a process of its own, or None and a finding where its recipe cannot be sent there.

    Raises what `made` does, and Unfit where the process is lost.
    """
    try:
        pickle.dumps(recipe)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        findings.append(
            Finding("pickling", f"its recipe cannot be pickled: {shown(str(error))}", "making it")
        )
        yield None
        return
    limits = HostSettings(
        where="process", start_seconds=START_SECONDS, reset_seconds=seconds, step_seconds=seconds
    )
    try:
        with _losing("making it in a process of its own", START_SECONDS):
            replica = await SubprocessEnv.start(recipe, limits)
    except Trouble as trouble:
        if isinstance(trouble.error, EnvironmentRefused):
            raise EnvironmentUnknown(str(trouble.error)) from None
        raise
    try:
        yield replica
    finally:
        await replica.close()


async def played_apart(
    replica: SubprocessEnv,
    player: Callable[[int], Player],
    seeds: Sequence[int],
    unreadable: Sequence[str],
    turns: int,
    seconds: float,
) -> Record | Trouble:
    """The first seed's episode there, or the first error: what is raised there is looked at here, too.

    Every seed is played, every action that nobody can read is said, and a step is taken behind the end.
    """
    told: list[Record | Trouble] = []
    for seed in seeds:
        try:
            with _losing(f"in a process of its own, seed {seed}", seconds):
                told.append(await play(replica, seed, player(seed), turns))
        except Trouble as trouble:
            told.append(trouble)
    for action in unreadable:
        where = f"in a process of its own, seed {seeds[0]}, action {shown(repr(action))}"
        with suppress(Trouble), _losing(where, seconds):
            await replica.reset(seeds[0])
            await replica.step(action)
            await replica.step(action)
    return next((each for each in told if isinstance(each, Trouble)), told[0])


@contextmanager
def _losing(where: str, seconds: float) -> Iterator[None]:
    """Around requests to a process: Trouble for what the environment raised, Unfit where the process is lost."""
    try:
        yield
    except EnvironmentStuck:
        raise Unfit(Finding("time", f"no answer within {seconds:g} s", where)) from None
    except EnvironmentFailed as error:
        if error.__cause__ is not None:  # the environment's own error
            raise Trouble(where, error) from error
        raise Unfit(Finding("death", str(error), where)) from None
