"""TextArena's games for one and two players, unmodified, played from one seat. Needs the extra textarena.

Observation: the game's messages to the agent's seat since its last move, each as a line "[GAME] ..." or
"[Player 1] ..."; the first holds the game's own prompt. The agent's own words are not repeated. The package's
observation wrappers, which repeat the whole history, are left out; its action wrappers stay.
Action: any text that the game parses, mostly something in square brackets.
Reward, Horizon, Moves, Opponents: see `envs/suites/turn_taking.py`. A game for one pays its own reward, in [0, 1]; a
game for two pays 1 for a win, 0.5 for a draw, 0 for a loss. Games judge moves themselves: most warn once, then end.

The package draws from the global generators and prints; both are isolated. NLTK's downloads are disabled: word games
need its data on the machine, and games that query a model over the network cannot be played.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nltk

from envs.registry import Env
from envs.suites.rng_isolation import IsolatedRng, suppress_stdout
from envs.suites.turn_taking import RANDOM, GameResult, MoveStatus, TurnGame, scaled

with suppress_stdout():
    import textarena
    from textarena.envs.registration import ENV_REGISTRY

PREFIX = "textarena/"
_GAMES = sorted(name for name in ENV_REGISTRY if re.search(r"-v\d+$", name))  # variants have longer names
IDS = tuple(f"{PREFIX}{name}" for name in _GAMES)
WORD_LISTS = ("words", "averaged_perceptron_tagger_eng")

# Raised by games that lack an API key, files, a dependency or a newer Python, or that reject an option.
_UNMADE = (ValueError, TypeError, LookupError, AttributeError, ImportError, OSError, SyntaxError)
_LISTED = re.compile(r"(?:available|valid) (?:moves|actions): (.+)", re.IGNORECASE)
_BRACKETED = re.compile(r"\[[^\[\]]+\]")
_LONG_NUMBER = re.compile(r"\d{19}")  # games read numbers with int(), which raises at thousands of digits


def textarena_game(
    env_id: str, seat: int | None = None, opponent: str = RANDOM, max_turns: int = 100, **options: Any
) -> Env:
    """A replica of "textarena/" and the package's own id. options: the game's own; others: see TurnGame.

    opponent="random" works if the game lists the available moves; it has no effect in games for one.
    """
    return TurnGame(TextArenaGame(env_id.removeprefix(PREFIX), options), seat, opponent, max_turns)


class TextArenaGame:
    """A `Game` of TextArena. ValueError for an unknown name or option, or a game that cannot be played here."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name = name
        self._generators = IsolatedRng()
        with self._generators.entered(), _no_downloads():
            self._game = _make(name, options)
            self.seats = self._seats()
        self._env = self._game
        self._last_shown: dict[int, str] = {}  # last observation of each seat

    def start(self, seed: int) -> None:
        self._generators.seed(seed)
        self._env = self._game
        for wrapper in ENV_REGISTRY[self.name].default_wrappers or ():
            if issubclass(wrapper, textarena.ActionWrapper):
                self._env = wrapper(self._env)
        with self._generators.entered():
            self._env.reset(num_players=self.seats, seed=seed)
        self._last_shown = dict.fromkeys(range(self.seats), "")

    @property
    def to_move(self) -> int:
        return int(self._game.state.current_player_id)

    def observation(self, seat: int) -> str:
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
        self._last_shown[seat] = "\n".join(said)
        return self._last_shown[seat]

    def legal_moves(self) -> list[str] | None:
        listed = _LISTED.findall(self._last_shown[self.to_move])
        return _BRACKETED.findall(listed[-1]) or None if listed else None

    def check_move(self, move: str) -> MoveStatus:
        return "fine" if move and not _LONG_NUMBER.search(move) else "unreadable"

    def play(self, move: str) -> None:
        with self._generators.entered():
            self._env.step(action=move)

    def result(self, seat: int) -> GameResult | None:
        state = self._game.state
        if not state.done:
            return None
        if state.rewards is None:
            raise RuntimeError(f"{self.name} ended without a reward")
        reward = float(state.rewards.get(seat, 0.0))
        at_fault = bool(state.game_info[seat].get("invalid_move"))
        return GameResult(scaled(reward, 0.0 if self.seats == 1 else -1.0, 1.0), at_fault)

    def _seats(self) -> int:
        """The number of players that the game is for: two or one."""
        for seats in (2, 1):  # some games for two accept one player but do not work
            try:
                self._game.reset(num_players=seats, seed=0)
            except (AssertionError, ValueError):
                continue
            return seats
        raise ValueError(f"{self.name} is not for one or two players")


def _make(name: str, options: dict[str, Any]) -> Any:
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
def _no_downloads() -> Iterator[None]:
    """Disable NLTK's downloads, which games start when they are imported and made."""
    download = nltk.download
    nltk.download = lambda *args, **options: False
    try:
        yield
    finally:
        nltk.download = download
