"""Every recipe that ships learns: its algorithm, the real learner, episodes sampled from the learner's own model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.config.load import load_config
from learner.algorithm.schedule import OptimSettings
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from learner.settings import ModelSettings
from learner.stages.settings import SftSettings
from learner.training.learner import Learner
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory, Turn
from tests.learner.staged import learned

WORDS = ("left", "down", "right", "up")
TURNS, GROUPS, GROUP_SIZE, STEPS = 2, 8, 8, 35
GAMES = 42  # steps of self-play
OPTIM = OptimSettings(learning_rate=3e-3)
RECIPES = sorted(
    p.name.removesuffix(".toml") for p in files("deploy.recipes").iterdir() if p.name.endswith("toml")
)


class Echo:
    """The game: say the word that was just said; two turns, half a point for each."""

    def __init__(self, folder: Path) -> None:
        tokenizer = build_tokenizer(folder, WORDS)
        build_tiny(folder, tokenizer, layers=1, width=32, heads=2, mlp=64, context=32, seed=3)
        self.words = [tokenizer.convert_tokens_to_ids(word) for word in WORDS]
        self.rng = np.random.default_rng(0)

    def play(
        self, choose: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], version: int
    ) -> list[Group]:
        """`choose`: [E, T] token ids -> the next token and its logprob for each of E episodes."""
        asked = self.rng.integers(0, len(WORDS), (GROUPS, TURNS)).repeat(GROUP_SIZE, axis=0)
        history = np.zeros((len(asked), 0), np.int32)
        steps: list[list[Turn]] = [[] for _ in asked]
        for turn in range(TURNS):
            said = np.array(self.words, np.int32)[asked[:, turn]]
            prompts = np.stack([np.full(len(asked), 5 + turn, np.int32), said], axis=1)
            history = np.concatenate([history, prompts], axis=1)
            chosen, logprobs = choose(history)
            history = np.concatenate([history, chosen[:, None]], axis=1)
            for episode, mine in enumerate(steps):
                reward = 0.5 * (chosen[episode] == said[episode])
                ids, by = np.int32([chosen[episode]]), np.int32([version])
                logprob = np.float32([logprobs[episode]])
                mine.append(Turn(turn, 0, str(said), "", prompts[episode], ids, logprob, by, reward, "stop"))
        return [self._group(number, steps) for number in range(GROUPS)]

    def _group(self, number: int, steps: list[list[Turn]]) -> Group:
        task = Task.of("echo", number)
        mine = steps[number * GROUP_SIZE : (number + 1) * GROUP_SIZE]
        episodes = [
            Trajectory(number, 0, index, task, tuple(some), EndReason.TERMINATED)
            for index, some in enumerate(mine)
        ]
        return Group(Slot(number, 0, task, 0), tuple(episodes))

    def at_random(self, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = self.rng.choice(self.words, len(history)).astype(np.int32)
        return chosen, np.full(len(history), -np.log(len(WORDS)))


def _sampler(learner: Learner, seed: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def choose(history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logprobs = _logits(learner, torch.from_numpy(history).long()).log_softmax(-1)
        chosen = torch.multinomial(logprobs.exp(), 1, generator=generator)
        return chosen[:, 0].numpy().astype(np.int32), logprobs.gather(1, chosen)[:, 0].numpy()

    return choose


def _logits(learner: Learner, ids: torch.Tensor) -> torch.Tensor:
    """Logits after each row: rows of one length, packed one after the other."""
    count, length = ids.shape
    borders = torch.arange(0, (count + 1) * length, length, dtype=torch.int32)
    positions = torch.arange(length).repeat(count)
    model = learner.policy.model
    logits: torch.Tensor = model(
        input_ids=ids.reshape(1, -1),
        position_ids=positions[None],
        use_cache=False,
        cu_seq_lens_q=borders,
        max_length_q=length,
        logits_to_keep=torch.arange(length - 1, count * length, length),
    ).logits[0]
    return logits


def _learner(recipe: str, folder: Path) -> Learner:
    """The recipe's algorithm on a tiny model; a loss of ratios uses every batch twice: they are not all one.

    Without constraints, since the game costs nothing.
    """
    settings = load_config(recipe).learner
    changes: dict[str, object] = {"epochs": 2 if settings.algorithm.loss.has_ratio else 1, "constraints": ()}
    if critic := settings.algorithm.critic:
        changes["critic"] = critic.model_copy(update={"optim": OPTIM, "warmup_steps": 2})
    return Learner(
        settings.model_copy(
            update={
                "model": ModelSettings(path=str(folder)),
                "optim": OPTIM,
                "algorithm": settings.algorithm.model_copy(update=changes),
            }
        ),
        stages=[SftSettings(optim=OptimSettings(learning_rate=1e-2), epochs=2, episodes_per_step=16)],
    )


def _taught(recipe: str, echo: Echo, folder: Path) -> Learner:
    """That says the words, any of them."""
    learner = _learner(recipe, folder)
    learned(learner, [group for _ in range(4) for group in echo.play(echo.at_random, 0)])
    return learner


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns(recipe: str, tmp_path: Path) -> None:
    echo = Echo(tmp_path)
    learner = _taught(recipe, echo, tmp_path)
    rewards = []
    for step in range(STEPS):
        rewards.append(learner.step(echo.play(_sampler(learner, step), learner.version))["reward"])
    assert np.mean(rewards[:3]) < 0.35  # one word in four is right by chance
    assert np.mean(rewards[-5:]) > 0.65


def against_itself(group: Group, words: list[int]) -> Group:
    """The same as a game of two sides: the first says a word, the second wins by saying it too."""
    games = []
    for episode in group.trajectories:
        first, second = episode.turns
        said, answer = int(first.action_ids[0]), int(second.action_ids[0])
        lost = float(said in words and answer != said)
        steps = (replace(first, reward=0.0), replace(second, seat=1, reward=lost))
        games.append(replace(episode, turns=steps))
    return replace(group, trajectories=tuple(games))


@pytest.mark.parametrize("recipe", ["grpo", "reinforce_pp", "ppo"])
def test_in_self_play_each_side_learns_for_itself(recipe: str, tmp_path: Path) -> None:
    echo = Echo(tmp_path)
    learner = _taught(recipe, echo, tmp_path)
    won = []
    for step in range(GAMES):
        games = [
            against_itself(group, echo.words) for group in echo.play(_sampler(learner, step), learner.version)
        ]
        won.append(learner.step(games)["reward"])  # the first side's
    assert np.mean(won[:3]) > 0.6  # three words in four are others
    assert np.mean(won[-5:]) < 0.25
