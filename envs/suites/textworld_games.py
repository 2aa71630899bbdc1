"""TextWorld's games: generated from the seed, or made before by `tw-make`. Needs the extra textworld.

Observation: what the game says; then, unless `commands` is off, a line "commands: " with those that are possible now.
Action: one command, as a line of text. The game itself answers commands that it does not know.
Reward: the points that a command scores, of the game's most: an episode's return is its score / max_score.
Horizon: `max_turns` commands.
Levels: the options of a challenge: `tw-make CHALLENGE --help` lists them.
Ends: the game is won or lost (terminated), turns used up (truncated), no command or several lines (malformed).

Generating a game takes seconds, most of them in the compiler of Inform 7. Games are kept in a folder by challenge,
options and seed, so that siblings of a group and later runs find them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import textworld
from textworld.challenges import CHALLENGES

from envs.base import Info, TalkSpace, TextEnv, text_space
from envs.suites.rng_isolation import IsolatedRng

# Jericho says so of every generated game: the package reads scores itself.
warnings.filterwarnings("ignore", message="Game .* is not fully supported")

PREFIX = "textworld/"
FOLDER = "games"  # the id of games that lie in a folder
IDS = (*(f"{PREFIX}{name}" for name in sorted(CHALLENGES)), f"{PREFIX}{FOLDER}")
MAX_COMMAND = 256  # characters
COMMANDS = "commands: "
UNREADABLE = "That is no command."
INSTRUCTIONS = "You play a text adventure. Answer with one command and nothing else, such as: look\n"


def textworld_game(
    env_id: str,
    max_turns: int = 50,
    commands: bool = True,
    instructions: bool = True,
    folder: str | None = None,
    **options: Any,
) -> TextWorldGame:
    """A replica of "textworld/" and a challenge, or of "textworld/games". options: the challenge's own."""
    name = env_id.removeprefix(PREFIX)
    if name == FOLDER:
        return TextWorldGame(GameFolder(folder, options), max_turns, commands, instructions)
    return TextWorldGame(Challenge(name, folder, options), max_turns, commands, instructions)


class GameFolder:
    """Games that were made before; the seed modulo their number says which. ValueError if there are none."""

    def __init__(self, folder: str | None, options: dict[str, Any]) -> None:
        if folder is None or options:
            raise ValueError(
                f"{FOLDER} takes the option folder and no other of a game, got {sorted(options)}"
            )
        endings = (".z8", ".ulx")
        self._files = sorted(each for each in Path(folder).expanduser().glob("*") if each.suffix in endings)
        if not self._files:
            raise ValueError(
                f"folder={folder} holds no games; make some: tw-make custom --output {folder}/0.z8"
            )
        if bare := next((each for each in self._files if not each.with_suffix(".json").exists()), None):
            raise ValueError(f"{bare} has no .json beside it, which holds the score; make it with tw-make")

    def file(self, seed: int) -> Path:
        return self._files[seed % len(self._files)]


class Challenge:
    """A challenge of the package: a game for each seed. ValueError for an unknown name and wrong options."""

    def __init__(self, name: str, folder: str | None, options: dict[str, Any]) -> None:
        if name not in CHALLENGES:
            raise ValueError(f"no challenge {name!r}; use one of: {', '.join((*sorted(CHALLENGES), FOLDER))}")
        self._name = name
        self._settings = _settings(name, options)
        told = json.dumps([textworld.__version__, name, self._settings], sort_keys=True, default=str)
        kept = folder or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._folder = Path(kept) / "manta-textworld" / sha256(told.encode()).hexdigest()[:16]
        self._generators = IsolatedRng()

    def file(self, seed: int) -> Path:
        """The game of a seed, generated if no process has done so before."""
        game = self._folder / f"{seed}.z8"
        if not game.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            # Made beside and moved, the game last: another process never sees half of one.
            with tempfile.TemporaryDirectory(dir=self._folder) as beside:
                made = Path(self._generate(seed, f"{beside}/{seed}.z8"))
                shutil.move(made.with_suffix(".json"), game.with_suffix(".json"))
                os.replace(made, game)
        return game

    def _generate(self, seed: int, path: str) -> str:
        options = textworld.GameOptions()
        options.seeds = seed
        options.path = path
        self._generators.seed(seed)
        with self._generators.entered():
            textworld.g_rng.set_seed(seed)
            game = CHALLENGES[self._name][1](self._settings, options)
            made: str = textworld.generator.compile_game(game, options)
        return made


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; tw-make CHALLENGE --help says what there is")


def _settings(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """A challenge's settings from options, read by the package's own parser of `tw-make`."""
    parser = _Parser(add_help=False)
    CHALLENGES[name][2](parser)
    given: list[str] = []
    for option, value in options.items():
        flag = f"--{option.replace('_', '-')}"
        if flag not in parser._option_string_actions:
            flag = f"--{option}"
        given += [flag] if value is True else [] if value is False else [flag, str(value)]
    return vars(parser.parse_args(given))


class TextWorldGame(TextEnv):
    """The environment.

    games: where the game of a seed comes from. max_turns: commands before truncation. commands: list what is possible.
    instructions: begin with the rules in English. ValueError for other values.
    """

    action_space = text_space(MAX_COMMAND)
    observation_space = TalkSpace()

    def __init__(
        self,
        games: GameFolder | Challenge,
        max_turns: int = 50,
        commands: bool = True,
        instructions: bool = True,
    ) -> None:
        if max_turns < 1:
            raise ValueError(f"max_turns={max_turns} leaves no turn to play; use 1 or more")
        self._games = games
        self._max_turns = max_turns
        self._commands = commands
        self._opening = INSTRUCTIONS if instructions else ""
        self._game: Any = None
        self._state: Any = None
        self._turns = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        self.close()
        asked = textworld.EnvInfos(
            admissible_commands=True,
            won=True,
            score=True,
            max_score=True,
            policy_commands=True,
            objective=True,
        )
        drawn = int(self.np_random.integers(2**31)) if seed is None else seed
        self._game = textworld.start(str(self._games.file(drawn)), asked)
        self._state = self._game.reset()
        self._turns = 0
        return self._opening + self._observed(
            _without_banner(self._state.feedback, self._state.objective)
        ), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if self._game is None:
            raise RuntimeError("step() was called without a running game; call reset() first")
        command = action.strip()
        if not command or len(command) > MAX_COMMAND or not command.isprintable():
            self.close()
            return UNREADABLE, 0.0, True, False, {"malformed": True, "success": False}
        self._turns += 1
        before = self._state.score
        self._state, score, done = self._game.step(command)
        reward = (score - before) / self._state.max_score
        truncated = not done and self._turns >= self._max_turns
        info: Info = {"success": bool(self._state.won)} if done or truncated else {}
        if done or truncated:
            self.close()
        return self._observed(self._state.feedback), reward, bool(done), truncated, info

    def close(self) -> None:
        if self._game is not None:
            self._game.close()
            self._game = None

    @property
    def walkthrough(self) -> list[str]:
        """Commands that win from here, as the package plans them; for tests and demonstrations."""
        return list(self._state.policy_commands)

    def _observed(self, said: str) -> str:
        prompt = re.compile(r"\n>[^\n]*\Z")  # and the status line of a terminal behind it
        lines = [line.rstrip() for line in prompt.sub("", said.strip()).strip().splitlines()] or [""]
        text = "\n".join(
            line for line, after in zip(lines, [*lines[1:], "end"], strict=True) if line or after
        )
        if self._commands and self._state.admissible_commands:
            text = f"{text}\n{COMMANDS}{', '.join(self._state.admissible_commands)}"
        return text


def _without_banner(said: str, objective: str) -> str:
    """The opening without the package's name in large letters, which is a hundred tokens of no meaning."""
    return said[said.index(objective) :] if objective and objective in said else said


class Player:
    """Tries the listed command that it tried least where it stands, those of the objective first; errs at random.

    One per episode; it needs `commands`.
    """

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)
        self._objective: set[str] = set()
        self._tried: Counter[str] = Counter()

    def act(self, observation: str) -> str:
        """The next command. ValueError where none are listed."""
        said, found, listed = observation.rpartition(f"\n{COMMANDS}")
        if not found:
            raise ValueError("the scripted player needs the option commands")
        words = set(said.lower().replace(".", " ").replace(",", " ").split())
        self._objective = self._objective or words
        commands = [each for each in listed.split(", ") if each not in ("look", "inventory")] or ["look"]
        if self._rng.random() < self._error_rate:
            return str(self._rng.choice(commands))
        named = {each: sum(word in self._objective for word in each.split()[1:]) for each in commands}
        best = min(commands, key=lambda each: (self._tried[each], each.startswith("examine"), -named[each]))
        self._tried[best] += 1
        return best
