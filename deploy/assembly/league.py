"""The policies of a run that meet in games: what each worker needs to play as any of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from deploy.assembly.build import EngineFactory, agents_of, build_worker, load_chat
from deploy.assembly.fetching import fetch
from deploy.config.config import RunConfig
from deploy.config.policies import opponents_of
from learner.training.checkpoint import versions
from rollout.buffer.league import LeagueSettings
from rollout.buffer.new_groups import Owner
from rollout.episodes.opponents import Opponents, Seat
from rollout.episodes.worker import GroupBuffer, RolloutWorker
from rollout.wire.kept_versions import KeptVersions
from rollout.wire.weights import WeightUpdate

FOLDER = "versions"  # of a policy's folder: its versions as they were published


@dataclass(frozen=True, slots=True)
class Member:
    """A policy of the run: its configuration, its folder, and where its base model is."""

    config: RunConfig
    folder: Path

    @property
    def kept(self) -> KeptVersions:
        """Its versions that may be opponents."""
        return KeptVersions(self.folder / FOLDER)


class League:
    """The members of a run by the names of their policies; one where the run has one policy."""

    def __init__(self, members: Mapping[str, Member]) -> None:
        self._members = dict(members)

    @classmethod
    def alone(cls, config: RunConfig, folder: Path) -> League:
        """That of a run's only policy, which meets its own versions."""
        return cls({config.policy: Member(config, folder)})

    def owner(self, policy: str) -> Owner:
        """What a policy's replay buffer must know of its opponents."""
        config = self._members[policy].config
        return Owner(policy, config.league, opponents_of(config) if config.league else ())

    def keep(self, policy: str, update: WeightUpdate) -> None:
        """Store a new version of a policy; remove those that no group issued from its checkpoints on can meet."""
        member = self._members[policy]
        if (league := member.config.league) is None:
            return
        member.kept.keep(update)
        oldest = min([*versions(member.folder), update.version])
        lag = max(each.config.buffer.max_lag for each in self._members.values())
        member.kept.keep_only(needed(league, range(max(0, oldest - lag), update.version + 1)))

    async def build_worker(
        self,
        config: RunConfig,
        path: str,
        engine_factory: EngineFactory,
        name: str,
        replay_buffer: GroupBuffer,
    ) -> RolloutWorker:
        """A rollout worker of the policy `config` is of, with engines of its opponents; see `build_worker`."""
        opponents = self.opponents(config.policy, engine_factory, name)
        worker = await build_worker(config, path, engine_factory, name, replay_buffer, opponents)
        async with AsyncExitStack() as unfinished:
            unfinished.push_async_callback(worker.engine.close)
            unfinished.push_async_callback(worker.close)
            if opponents is not None:
                await opponents.begin(opponents_of(config))
            unfinished.pop_all()
        return worker

    def opponents(self, policy: str, engine_factory: EngineFactory, worker: str) -> Opponents | None:
        """Who plays the other seats for a worker of this policy; None without a league."""
        if (league := self._members[policy].config.league) is None:
            return None

        async def start(name: str, number: int) -> Seat:
            from deploy.assembly.models import model_path  # transformers: not every process needs it

            member = self._members[name]
            path = fetch(model_path(member.config, member.folder))
            engine = await engine_factory(member.config, f"{worker}-{name}-{number}", path)
            rollout, trusted = member.config.rollout, member.config.learner.model.trust_remote_code
            players, others = agents_of(
                member.config, engine, load_chat(path, rollout.context_tokens, trusted)
            )
            return Seat(engine, {key: player.agent for key, player in players.items()}, others)

        kept = {name: member.kept for name, member in self._members.items()}
        return Opponents(start, kept, league.engines)


def needed(league: LeagueSettings, issued: Iterable[int]) -> set[int]:
    """The versions that groups may meet which are issued at these versions."""
    return {each for version in issued for each in (version, *league.past(version))}
