"""The base model of a run, built if no checkpoint is named, and the learner over it."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

from blake3 import blake3
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from deploy.assembly.fetching import fetch
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.environments import environment_names
from envs import registry
from learner.model.source import pinned
from learner.model.tiny import build_tiny, tiny_config
from learner.model.tiny_vision import build_tiny_vision
from learner.model.tokenizer import build_tokenizer
from learner.parallel.ranks import ALONE, Ranks
from learner.training import checkpoint
from learner.training.learner import Learner
from rollout.wire.model_folder import companions
from rollout.wire.whole_file import replace_file

COMPANIONS_FILE = "model.json"  # in a run folder: checksums of the files beside its base model's weights
TEACHER_FILE = "teacher.json"  # the same of the teacher of a run that distils one
_SOURCE = "@"  # key of the model's own name in that file; no file is called so


def model_path(config: RunConfig, run_folder: Path) -> str:
    """The name of the base model from which any node gets its folder (`fetch`): a path, or an id with a commit.

    A tiny model is first built in the run folder, any other fetched to this machine. A run continues with the commit
    that it began with. ConfigError for a model that cannot be fetched, and for one whose tokenizer or configuration has
    changed since the run began, since the same text would then have other tokens.
    """
    kept = run_folder / COMPANIONS_FILE
    named = config.learner.model.path if config.tiny is None else _tiny(config, run_folder)
    if not Path(named).exists():
        named = _began(kept).get(_SOURCE, named)
    return _unchanged(named, kept)


def teacher_path(config: RunConfig, run_folder: Path) -> str:
    """The same of the teacher that the run distils; empty without one.

    Of a teacher that is a run, the checkpoint that was its newest when this run began.
    """
    distill, kept = config.learner.algorithm.distill, run_folder / TEACHER_FILE
    if distill is None:
        return ""
    return _unchanged(_began(kept).get(_SOURCE) or model_of(distill.teacher), kept)


def model_of(named: str) -> str:
    """The model's folder in a run's newest checkpoint, or with @VERSION in that version's; any other name as it is.

    ConfigError, one line, for a run without such a checkpoint.
    """
    folder, at, version = named.rpartition("@")
    run, number = (Path(folder), int(version)) if at and version.isdigit() else (Path(named), None)
    return str(stored_checkpoint(run, number) / checkpoint.MODEL) if _is_run(run) else named


def stored_checkpoint(run: Path, version: int | None = None) -> Path:
    """The folder of a run's checkpoint of this version, or of its newest whole one. ConfigError, CheckpointError."""
    folder = checkpoint.latest(run) if version is None else checkpoint.whole(run, version)
    if folder is None:
        kept = ", ".join(map(str, checkpoint.versions(run))) or "none"
        asked = "no whole checkpoint" if version is None else f"no checkpoint of version {version}"
        raise ConfigError(f"{run} has {asked}; stored versions: {kept}")
    return folder


def _is_run(folder: Path) -> bool:
    return (folder / checkpoint.ROOT).is_dir()


def _unchanged(named: str, kept: Path) -> str:
    """The pinned name of a model whose small files are what they were when the run began; fetched to this machine."""
    began = _began(kept)
    folder = Path(fetch(named))
    source = pinned(named, folder)
    found = {name: blake3(content).hexdigest() for name, content in companions(folder).items()}
    if not began:
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_file(kept, json.dumps({_SOURCE: source} | found, indent=1), several=True)
        return source
    began.pop(_SOURCE, None)
    if other := sorted(name for name in began.keys() | found.keys() if began.get(name) != found.get(name)):
        raise ConfigError(
            f"model {named}: {other[0]} has changed since this run began; restore it, or start another run"
        )
    return source


def _began(kept: Path) -> dict[str, str]:
    """What the first call stored; empty before it."""
    if not kept.is_file():
        return {}
    try:
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(f"{kept}: broken file ({error}); remove it if the model is unchanged") from error


def _tiny(config: RunConfig, run_folder: Path) -> str:
    """The folder of a tiny model, built unless it exists."""
    tiny = config.tiny
    assert tiny is not None
    folder = run_folder / "base"
    if not folder.is_dir():
        aside = run_folder / ".base.part"  # an interrupted build leaves no incomplete model
        shutil.rmtree(aside, ignore_errors=True)
        tokenizer = tiny_tokenizer(config, aside)
        build = partial(build_tiny_vision, pixels=tiny.pixels) if tiny.pixels else build_tiny
        build(
            aside,
            tokenizer,
            layers=tiny.layers,
            width=tiny.width,
            heads=tiny.heads,
            head_width=tiny.head_width,
            mlp=tiny.mlp,
            context=config.rollout.context_tokens,
            tie=tiny.tie,
            seed=config.seed,
        )
        aside.rename(folder)
    return str(folder)


def tiny_architecture(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig | None:
    """The configuration of a run's tiny model, without building it; None for one with vision."""
    tiny = config.tiny
    assert tiny is not None
    if tiny.pixels:
        return None
    found: PretrainedConfig = tiny_config(
        tokenizer,
        tiny.layers,
        tiny.width,
        tiny.heads,
        tiny.head_width,
        tiny.mlp,
        config.rollout.context_tokens,
        tiny.tie,
    )
    return found


def tiny_tokenizer(config: RunConfig, folder: Path) -> PreTrainedTokenizerBase:
    """Build the tokenizer of a tiny model into `folder`."""
    assert config.tiny is not None
    environments = config.environments if config.tiny.environment_words else ()
    said = [word for each in environments for word in registry.words(each.id)]
    return build_tokenizer(folder, [*config.tiny.words, *said])


def build_learner(config: RunConfig, path: str, ranks: Ranks = ALONE, teacher: str = "") -> Learner:
    """Build the learner of a run and run its largest possible row once. ModelError if that exceeds memory.

    path, teacher: as `model_path` and `teacher_path` return them.
    """
    model, algorithm = config.learner.model.model_copy(update={"path": path}), config.learner.algorithm
    if algorithm.distill is not None:
        distill = algorithm.distill.model_copy(update={"teacher": teacher})
        algorithm = algorithm.model_copy(update={"distill": distill})
    settings = config.learner.model_copy(update={"model": model, "algorithm": algorithm})
    temperature = config.sampling.temperature
    names = environment_names(config.environments)
    learner = Learner(settings, config.seed, temperature, config.steps, ranks, config.stages, names)
    learner.rehearse(config.rollout.context_tokens)
    return learner
