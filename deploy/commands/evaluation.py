"""What `manta eval` does: what is asked for becomes conditions, played or read back, printed, and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deploy.config.config_errors import ConfigError
from deploy.config.load import validated
from deploy.report import comparison
from deploy.report.console import Console, write
from deploy.report.evaluation import FILE
from deploy.report.transcripts import show_transcripts, write_episodes
from deploy.run.evaluate import (
    Conditions,
    best_checkpoint,
    conditions_of,
    environment_id,
    environment_of,
    evaluate_checkpoint,
    executes_code,
    new_folder,
    parse_options,
    parse_seeds,
    suite_conditions,
)


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of the command."""

    checkpoint: str
    env: str | None
    like: Path | None
    suite: str | None
    best: bool
    model: str
    compare: str | None
    seeds: str
    options: Sequence[str]
    changes: Mapping[str, dict[str, object]]  # of conditions, by section
    out: Path | None
    show: int
    trust: bool


@dataclass(frozen=True, slots=True)
class _Asked:
    """Which tasks are played, and how."""

    env_id: str
    seeds: Sequence[int]
    conditions: Conditions


def run_evaluation(request: Request, console: Console) -> None:
    """Evaluate or read back, print the outcome and transcripts, and compare. ConfigError for what does not fit."""
    stored = comparison.is_stored(Path(request.checkpoint))
    other = request.compare
    if other is not None and stored and not comparison.is_stored(Path(other)):
        raise ConfigError(
            f"--compare {other}: nothing is played beside a stored evaluation; name another stored one"
        )
    if stored:
        folder = _read_back(request, console)
    else:
        checkpoint = best_checkpoint(request.checkpoint) if request.best else request.checkpoint
        asked = _asked(request)
        folder = request.out or new_folder(asked.env_id, Path("runs"))
        _play(checkpoint, asked, folder, request, console)
    if other is None:
        return
    against = Path(other)
    if not comparison.is_stored(against):
        against = folder / "compared"
        _play(other, asked, against, replace(request, model="", show=0), console)
    found = comparison.Comparison.of(comparison.stored_tasks(folder), comparison.stored_tasks(against))
    if not stored:
        found.save(folder / comparison.FILE)
    write(console, f"{request.checkpoint} against {other}:\n{found}")


def _asked(request: Request) -> _Asked:
    run = str(request.like or request.checkpoint)
    seeds: Sequence[int]
    if request.suite is None:
        env_id = environment_id(run, request.env or environment_of(run))
        seeds, conditions = parse_seeds(request.seeds), conditions_of(run, request.env, request.trust)
    elif request.env is None:
        env_id, seeds, conditions = suite_conditions(run, request.suite, request.trust)
    else:
        raise ConfigError(f"--suite {request.suite} has its environment; leave --env away")
    tree = conditions.model_dump() | request.changes[""]
    tree["env_options"] |= parse_options(request.options)
    for section in ("sampling", "agent", "engine"):
        tree[section] |= request.changes[section]
    return _Asked(env_id, seeds, validated(Conditions, tree, "manta eval"))


def _play(checkpoint: str, asked: _Asked, folder: Path, request: Request, console: Console) -> None:
    run = str(request.like or request.checkpoint)
    trusted = executes_code(checkpoint, run, asked.conditions, request.trust)
    conditions = asked.conditions.model_copy(update={"trust_remote_code": trusted})
    outcome = evaluate_checkpoint(checkpoint, asked.env_id, asked.seeds, conditions, folder, request.model)
    show_transcripts(console, folder, request.show)
    write(console, f"{outcome}\nepisodes and the engine's log: {folder} (--show N prints episodes)")


def _read_back(request: Request, console: Console) -> Path:
    """Print a stored evaluation; --out gets it as JSON."""
    folder = Path(request.checkpoint)
    majority = Conditions.model_validate({"majority": request.changes[""].get("majority", "none")}).majority
    outcome = comparison.stored_evaluation(folder, majority)
    if request.out is not None:
        if request.out.exists():
            raise ConfigError(f"{request.out} is there already; name a folder that is not")
        request.out.mkdir(mode=0o700, parents=True)
        write_episodes(folder, request.out)
        outcome.save(request.out / FILE)
    show_transcripts(console, folder, request.show)
    write(console, str(outcome))
    return folder
