"""The model that a run begins with, built where none is named, and the learner over it."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from deploy.config.config import RunConfig
from envs import registry
from learner.model.tiny import build_tiny
from learner.model.tiny_vision import build_tiny_vision
from learner.model.tokenizer import build_tokenizer
from learner.parallel.ranks import ALONE, Ranks
from learner.training.learner import Learner


def model_path(config: RunConfig, run_folder: Path) -> str:
    """Where the base model lies; a tiny one is built into the run folder first."""
    tiny = config.tiny
    if tiny is None:
        return config.learner.model.path
    folder = run_folder / "base"
    if not folder.is_dir():
        aside = run_folder / ".base.part"  # a process that ends on its way leaves no half of a model
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


def tiny_tokenizer(config: RunConfig, folder: Path) -> PreTrainedTokenizerBase:
    """Build the tokenizer of a tiny model into `folder`."""
    assert config.tiny is not None
    said = registry.words(config.env.id) if config.tiny.environment_words else ()
    return build_tokenizer(folder, [*config.tiny.words, *said])


def build_learner(config: RunConfig, path: str, ranks: Ranks = ALONE) -> Learner:
    """The learner of a run, with the largest row it can meet tried once. ModelError where that does not fit."""
    model = config.learner.model.model_copy(update={"path": path})
    settings = config.learner.model_copy(update={"model": model})
    learner = Learner(settings, config.seed, config.sampling.temperature, config.steps, ranks)
    learner.rehearse(config.rollout.context_tokens)
    return learner
