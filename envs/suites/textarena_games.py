"""TextArena's games for one and two, unmodified, as one seat plays them. Needs the extra textarena.

Observation: what the game has said to the agent's seat since its last move, a line "[GAME] ..." or "[Player 1] ..."
each; first of all the game's own prompt. The agent's own words are not said back. The package's wrappers that put the
whole history into every observation are left away, since an agent keeps its own; those of actions stay.
Action: whatever the game reads, mostly something in square brackets.
Reward, Horizon, Moves, Opponents: see `envs/suites/turn_taking.py`. A game for one is paid what it pays, within [0, 1];
one for two, 1 for a win, 0.5 for a draw, 0 for a loss. The games judge moves themselves: most warn once, then end.

The package draws from the global generators and prints; both are kept from others. NLTK's downloads come to nothing:
word games need its data on the machine, and games that ask a model over the network cannot be played.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nltk

from envs.registry import Env
from envs.suites.rng_isolation import Generators, quiet
from envs.suites.turn_taking import RANDOM, Result, TurnGame, Verdict, scaled

with quiet():
    import textarena
    from textarena.envs.registration import ENV_REGISTRY

PREFIX = "textarena/"
_GAMES = sorted(
    name for name in ENV_REGISTRY if re.search(r"-v\d+$", name)
)  # their variants have longer names
IDS = tuple(f"{PREFIX}{name}" for name in _GAMES)
WORD_LISTS = ("words", "averaged_perceptron_tagger_eng")

# What games raise that lack a key for a model, files, another package or a newer Python, or do not take an option.
_UNMADE = (ValueError, TypeError, LookupError, AttributeError, ImportError, OSError, SyntaxError)
_LISTED = re.compile(r"(?:available|valid) (?:moves|actions): (.+)", re.IGNORECASE)
_BRACKETED = re.compile(r"\[[^\[\]]+\]")
_LONG_NUMBER = re.compile(r"\d{19}")  # games read numbers with int(), which raises at thousands of digits


def textarena_game(
    env_id: str, seat: int | None = None, opponent: str = RANDOM, max_turns: int = 100, **options: Any
) -> Env:
    """A replica of "textarena/" and the package's own id. options: the game's own; others: see TurnGame.

    opponent="random" works where the game lists the moves that are available; it has no meaning in games for one.
    """
    return TurnGame(TextArenaGame(env_id.removeprefix(PREFIX), options), seat, opponent, max_turns)


class TextArenaGame:
    """A `Game` of TextArena. ValueError for a name, an option, or a game that cannot be played here."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name = name
        self._generators = Generators()
        with self._generators.entered(), _nothing_downloaded():
            self._game = _made(name, options)
            self.seats = self._seats()
        self._env = self._game
        self._told: dict[int, str] = {}  # to each seat, what was last

    def start(self, seed: int) -> None:
        self._generators.seed(seed)
        self._env = self._game
        for wrapper in ENV_REGISTRY[self.name].default_wrappers or ():
            if issubclass(wrapper, textarena.ActionWrapper):
                self._env = wrapper(self._env)
        with self._generators.entered():
            self._env.reset(num_players=self.seats, seed=seed)
        self._told = dict.fromkeys(range(self.seats), "")

    @property
    def to_move(self) -> int:
        return int(self._game.state.current_player_id)

    def told(self, seat: int) -> str:
        state, alone = self._game.state, self.seats == 1
        if seat == self.to_move and not state.done:
            with self._generators.entered():
                _, messages = self._game.get_observation()
        else:
            messages, state.observations[seat] = state.observations[seat], []
        said = [
            f"[{'GAME' if sender == textarena.GAME_ID else state.role_mapping.get(sender, f'Player {sender}')}] {text}"
            for sender, text, kind in messages
            if sender != seat and not (alone and kind == textarena.ObservationType.PLAYER_ACTION)
        ]
        if state.done:
            said.append(f"[GAME] {state.game_info[seat].get('reason', '')}")
        self._told[seat] = "\n".join(said)
        return self._told[seat]

    def moves(self) -> list[str] | None:
        listed = _LISTED.findall(self._told[self.to_move])
        return _BRACKETED.findall(listed[-1]) or None if listed else None

    def judged(self, move: str) -> Verdict:
        return "fine" if move and not _LONG_NUMBER.search(move) else "unreadable"

    def play(self, move: str) -> None:
        with self._generators.entered():
            self._env.step(action=move)

    def result(self, seat: int) -> Result | None:
        state = self._game.state
        if not state.done:
            return None
        if state.rewards is None:
            raise RuntimeError(f"{self.name} ended without a reward")
        reward = float(state.rewards.get(seat, 0.0))
        at_fault = bool(state.game_info[seat].get("invalid_move"))
        return Result(scaled(reward, 0.0 if self.seats == 1 else -1.0, 1.0), at_fault)

    def _seats(self) -> int:
        """For how many the game is: two, or one."""
        for seats in (2, 1):  # some made for two take one, and come to nothing
            try:
                self._game.reset(num_players=seats, seed=0)
            except (AssertionError, ValueError):
                continue
            return seats
        raise ValueError(f"{self.name} is not for one or two players")


def _made(name: str, options: dict[str, Any]) -> Any:
    """The game without its wrappers."""
    if name not in ENV_REGISTRY:
        close = difflib.get_close_matches(name, ENV_REGISTRY, n=3, cutoff=0.4) or ["TicTacToe-v0"]
        raise ValueError(f"there is no game {name!r}; did you mean {' or '.join(close)}?")
    try:
        env = textarena.make(name, **options)
    except _UNMADE as error:
        if type(error) is LookupError:  # NLTK's own, no subclass of it
            lists = " ".join(WORD_LISTS)
            what = f"needs word lists of NLTK, which are not here: python -m nltk.downloader {lists}"
        else:
            what = f"cannot be made here: {type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{name} {what}") from error
    while isinstance(env, textarena.Wrapper):
        env = env.env
    return env


@contextmanager
def _nothing_downloaded() -> Iterator[None]:
    """Games load NLTK's data when they are imported and made; what is not on the machine stays away."""
    download = nltk.download
    nltk.download = lambda *args, **options: False
    try:
        yield
    finally:
        nltk.download = download
