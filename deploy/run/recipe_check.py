"""A recipe checked without starting a run: what a run would refuse, what each process holds, what looks wrong.

The model needs its config.json alone, and data its rows; what is not on this machine is said, and the rest is checked.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, PretrainedConfig

from deploy.assembly.memory_plan import GIB, MemoryPlan, ModelFacts, Opponent
from deploy.assembly.models import tiny_architecture
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.policies import configurations, opponents_of
from deploy.config.resources import demand
from deploy.run.findings import Finding, of_disk, of_job, of_memory, of_recipe
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
class MemoryOfRun:
    """What a run holds in memory and on disk, and the nodes that carry it."""

    model: ModelFacts
    plan: MemoryPlan
    disk: DiskUse
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found. memory: None without the model's configuration."""

    config: RunConfig
    size: JobSize
    memory: MemoryOfRun | None
    findings: tuple[Finding, ...]

    @property
    def refused(self) -> bool:
        """Whether a run would be."""
        return any(each.certain for each in self.findings)


def check_recipe(config: RunConfig, machine: Machine, config_json: Path | None = None) -> list[Checked]:
    """Check a configuration, of several policies that of each. config_json: of a model which is not on this machine.

    ConfigError if that is broken.
    """
    given = None if config_json is None else _read(config_json)
    own = list(configurations(config).values())
    return [_check(each, machine, given, own) for each in own]


def _check(
    config: RunConfig, machine: Machine, given: PretrainedConfig | None, policies: Sequence[RunConfig]
) -> Checked:
    no_model, (rows, no_data) = _absent_model(config, given is not None), _rows(config)
    preflight = Preflight(config, model=no_model is None, data=no_data is None, architecture=given)
    findings = [each for each in (no_model, no_data) if each is not None]
    findings += [Finding(each, certain=True) for each in _refusals(preflight)]
    size = JobSize.of(config, rows)
    memory, of_its_memory = None, [*_cores(config, policies)]
    if (architecture := _architecture(preflight, config, no_model is None, given)) is not None:
        try:
            memory = _memory(config, architecture, size, machine, _opponents(config, given, policies))
        except ValueError as error:  # an adapter of layers that there are not, an actor too large for a node
            of_its_memory.append(Finding(str(error), certain=True))
        else:
            of_its_memory += _of_memory(config, memory, machine)
    said = dict.fromkeys([*findings, *of_recipe(config), *of_job(config, size), *of_its_memory])
    return Checked(config, size, memory, tuple(sorted(said, key=lambda each: not each.certain)))


def _opponents(
    config: RunConfig, given: PretrainedConfig | None, policies: Sequence[RunConfig]
) -> Iterator[Opponent]:
    """The policies whose versions a policy meets, as far as their models are known here."""
    for other in policies if config.league is not None else ():
        if other.policy not in opponents_of(config):
            continue
        described = given is not None
        here = _absent_model(other, described) is None
        preflight = Preflight(other, model=here, data=False, architecture=given)
        if (architecture := _architecture(preflight, other, here, given)) is not None:
            yield Opponent(other.policy, other, ModelFacts.of(architecture, other))


def _memory(
    config: RunConfig,
    architecture: PretrainedConfig,
    size: JobSize,
    machine: Machine,
    opponents: Iterator[Opponent],
) -> MemoryOfRun:
    model = ModelFacts.of(architecture, config)
    plan = MemoryPlan.of(config, model, machine.gpu_bytes, list(opponents))
    placed = nodes(config, plan, machine.gpus_per_node)
    return MemoryOfRun(model, plan, DiskUse.of(config, model, size), tuple(placed))


def _of_memory(config: RunConfig, memory: MemoryOfRun, machine: Machine) -> Iterator[Finding]:
    here = _is_for_here(config)
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    yield from of_memory(config, memory.model, memory.plan, machine.gpu_bytes, int(free) if here else None)
    yield from of_disk(config, memory.disk, shutil.disk_usage(Path.cwd()).free if here else None)


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
    try:
        read: PretrainedConfig = AutoConfig.from_pretrained(str(config_json), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--config-json {config_json}: {reason}") from error
    return read


def _architecture(
    preflight: Preflight, config: RunConfig, here: bool, given: PretrainedConfig | None
) -> PretrainedConfig | None:
    if given is not None:
        return given
    if config.tiny is not None:
        return tiny_architecture(config, preflight.tokenizer)
    return preflight.architecture if here else None


def _cores(config: RunConfig, policies: Sequence[RunConfig]) -> Iterator[Finding]:
    wanted, cores = demand(*policies)["CPU"], len(os.sched_getaffinity(0))
    if _is_for_here(config) and wanted > cores:
        yield Finding(
            f"the run reserves {wanted:g} CPUs, but this machine has {cores}; lower rollout.workers, "
            "rollout.cpus_per_worker or cluster.learner_cpus",
            certain=True,
        )


def _is_for_here(config: RunConfig) -> bool:
    return not config.cluster.joins and "GPU" not in demand(config)
