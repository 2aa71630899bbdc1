"""A recipe checked without starting a run: what a run would refuse, what each process holds, what looks wrong.

The model needs its config.json alone, and data its rows; what is not on this machine is said, and the rest is checked.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, PretrainedConfig

from deploy.assembly.memory_plan import GIB, MemoryPlan, ModelFacts, Opponent, host_bytes
from deploy.assembly.models import tiny_architecture
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.policies import configurations, opponents_of
from deploy.config.resources import demand
from deploy.run.findings import (
    Finding,
    of_disk,
    of_host,
    of_job,
    of_memory,
    of_policies,
    of_recipe,
    of_shared_rows,
)
from deploy.run.job_size import Counts, DiskUse, JobSize, Node, nodes, row_counts
from deploy.run.mistakes import mistakes
from deploy.run.model_checks import check_model
from deploy.run.preflight import Preflight
from envs.datasets.files import DataAbsent
from rollout.wire.model_folder import looks_local


@dataclass(frozen=True, slots=True)
class Machine:
    """The machines that a run is meant for."""

    gpu_gib: float = 80.0
    gpus_per_node: int = 8

    @property
    def gpu_bytes(self) -> int:
        """Memory of a GPU."""
        return round(self.gpu_gib * GIB)


@dataclass(frozen=True, slots=True)
class MemoryOfPolicy:
    """What a policy's part of a run holds in memory and on disk."""

    model: ModelFacts
    plan: MemoryPlan
    disk: DiskUse


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found of a policy. memory: None without the model's configuration."""

    config: RunConfig
    size: JobSize
    memory: MemoryOfPolicy | None


@dataclass(frozen=True, slots=True)
class CheckedRun:
    """What was found of each policy, and of all together; no nodes and no disk where a policy's memory is not told."""

    policies: tuple[Checked, ...]
    nodes: tuple[Node, ...]
    disk: DiskUse | None
    findings: tuple[Finding, ...]

    @property
    def refused(self) -> bool:
        """Whether a run would be."""
        return any(each.certain for each in self.findings)


def check_recipe(config: RunConfig, machine: Machine, config_json: Path | None = None) -> CheckedRun:
    """Check a configuration, of several policies each. config_json: of a model which is not on this machine.

    ConfigError if that is broken.
    """
    given = None if config_json is None else _read(config_json)
    policies = [_Policy(each, given) for each in configurations(config).values()]
    checked = [_check(each, machine, policies) for each in policies]
    placed, disk, together = _together(checked, machine)
    found = {
        policy.config.policy: list(_findings(policy, each, machine))
        for policy, each in zip(policies, checked, strict=True)
    }
    said = dict.fromkeys([*of_policies(found), *together])
    return CheckedRun(tuple(checked), placed, disk, tuple(sorted(said, key=lambda each: not each.certain)))


class _Policy:
    """A policy of the recipe; what its own check and those of policies that meet it need is found once."""

    def __init__(self, config: RunConfig, given: PretrainedConfig | None) -> None:
        self.config = config
        self._given = given
        self.no_model = _absent_model(config, given is not None)
        self.rows, self.no_data = _rows(config)
        here = self.no_model is None
        self.preflight = Preflight(config, model=here, data=self.no_data is None, architecture=given)

    @cached_property
    def architecture(self) -> PretrainedConfig | None:
        """The model's configuration; None where it is not known."""
        if self._given is None and self.config.tiny is not None:
            return tiny_architecture(self.config, self.preflight.tokenizer)
        known = self._given is not None or self.no_model is None
        return self.preflight.architecture if known else None

    @property
    def facts(self) -> ModelFacts | None:
        """What the memory plan needs of the model; None where that is not known."""
        return self._read[0]

    @property
    def misfit(self) -> str:
        """Why the model cannot be trained as the recipe says, such as an adapter of layers that there are not."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[ModelFacts | None, str]:
        if self.architecture is None:
            return None, ""
        try:
            return ModelFacts.of(self.architecture, self.config), ""
        except ValueError as error:
            return None, str(error)


def _check(policy: _Policy, machine: Machine, policies: Sequence[_Policy]) -> Checked:
    config, model = policy.config, policy.facts
    size = JobSize.of(config, policy.rows)
    if model is None:
        return Checked(config, size, None)
    met = () if config.league is None else opponents_of(config)
    # As far as their models are known here.
    opponents = [
        Opponent(other.config.policy, other.config, other.facts)
        for other in policies
        if other.config.policy in met and other.facts is not None
    ]
    plan = MemoryPlan.of(config, model, machine.gpu_bytes, opponents)
    return Checked(config, size, MemoryOfPolicy(model, plan, DiskUse.of(config, model, size)))


def _findings(policy: _Policy, checked: Checked, machine: Machine) -> Iterator[Finding]:
    """What was found of a policy alone."""
    config = policy.config
    yield from (each for each in (policy.no_model, policy.no_data) if each is not None)
    yield from (Finding(each, certain=True) for each in _refusals(policy.preflight))
    if policy.misfit:
        yield Finding(policy.misfit, certain=True)
    yield from of_recipe(config)
    yield from of_job(config, checked.size)
    if (memory := checked.memory) is not None:
        yield from of_memory(config, memory.model, memory.plan, machine.gpu_bytes)
        assert policy.architecture is not None
        yield from of_shared_rows(config, policy.architecture, memory.plan, machine.gpu_bytes)


def _together(
    checked: Sequence[Checked], machine: Machine
) -> tuple[tuple[Node, ...], DiskUse | None, list[Finding]]:
    """The nodes and the disk of all policies, where their memory is told, and what was found of these."""
    config, here = checked[0].config, all(_is_for_here(each.config) for each in checked)
    found = list(_cores([each.config for each in checked])) if here else []
    told = [(each.config, each.memory) for each in checked if each.memory is not None]
    if len(told) < len(checked):
        return (), None, found
    disk = DiskUse.together([memory.disk for _, memory in told])
    if here:
        free = psutil.virtual_memory().available + psutil.swap_memory().free
        found += of_host(host_bytes([memory.plan for _, memory in told]), int(free))
        found += of_disk(config, disk, shutil.disk_usage(Path.cwd()).free)
    try:
        placed = nodes([(own, memory.plan) for own, memory in told], machine.gpus_per_node)
    except ValueError as error:  # an actor too large for a node
        return (), disk, [*found, Finding(str(error), certain=True)]
    return tuple(placed), disk, found


def _refusals(preflight: Preflight) -> list[str]:
    """What a run would be refused for; a fault that several checks meet is named once."""
    found: dict[str, None] = {}
    for each in preflight.checks():
        try:
            each()
        except mistakes() as error:
            found[str(error)] = None
    return list(found)


def _absent_model(config: RunConfig, described: bool) -> Finding | None:
    """That the model is not on this machine, or not whole; described: its configuration is given."""
    path = config.learner.model.path
    if not path:
        return None
    if looks_local(path) or Path(path).exists():
        try:
            check_model(path)
        except mistakes() as error:
            return Finding(str(error), certain=not described)
        return None
    if isinstance(try_to_load_from_cache(path.partition("@")[0], "config.json"), str):
        return None
    rest = (
        "its memory is told by --config-json"
        if described
        else "for its memory give its config.json: --config-json"
    )
    return Finding(f"model {path} is not on this machine: its tokenizer and prompts are not checked; {rest}")


def _rows(config: RunConfig) -> tuple[list[Counts], Finding | None]:
    """Rows of every environment's data; that one's is not on this machine, and cannot be fetched now."""
    counts: list[Counts] = []
    said = None
    for environment in config.environments:
        try:
            counts.append(row_counts(environment))
        except mistakes() as error:
            counts.append((None, None))
            if isinstance(error.__cause__, DataAbsent):
                said = Finding(f"{error}; its rows, prompts and rewards are not checked")
    return counts, said


def _read(config_json: Path) -> PretrainedConfig:
    if not config_json.exists():
        raise ConfigError(f"--config-json {config_json}: there is no such file; give the model's config.json")
    try:
        read: PretrainedConfig = AutoConfig.from_pretrained(str(config_json), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--config-json {config_json}: {reason}") from error
    return read


def _cores(policies: Sequence[RunConfig]) -> Iterator[Finding]:
    wanted, cores = demand(*policies)["CPU"], len(os.sched_getaffinity(0))
    if wanted > cores:
        yield Finding(
            f"the run reserves {wanted:g} CPUs, but this machine has {cores}; lower rollout.workers, "
            "rollout.cpus_per_worker or cluster.learner_cpus",
            certain=True,
        )


def _is_for_here(config: RunConfig) -> bool:
    return not config.cluster.joins and "GPU" not in demand(config)
