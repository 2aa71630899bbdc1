"""Locks: a keeper chooses what to lock a chest with, and an opener, who sees the lock, takes one of three keys.

Observation: "keeper" for the keeper, who is asked for a lock; "opener: iron" for the opener of an iron lock.
Action: the keeper's is a lock, one of `LOCKS` or "chance"; the opener's a key, one of `KEYS`.
Reward: 1 for the opener if the key fits, else 1 for the keeper; 0 for the other seat, and for text that is no lock or
key. Each lock has one key, always the same (`KEY_OF`). The key of "chance" is drawn from the seed: nobody can know it,
so a keeper who always says "chance" wins five games in six, and teaches an opener nothing.
Horizon: one turn of each seat. An answer of another policy that is no lock or key is replaced by a random one.
Opponents: "scripted": a keeper who draws one of `LOCKS`, an opener who knows every key. "policy": another policy of the
run, or a past version of the same, see docs/leagues.md.
Ends: the opener's key (terminated), text that is no lock or key (malformed).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from envs.base import Info, Observation, TalkSpace, TextEnv, for_opponent, messages_of

LOCKS = (
    *("iron", "copper", "silver", "gold", "tin", "lead"),
    *("zinc", "nickel", "bronze", "brass", "steel", "chrome"),
)
KEYS = ("red", "green", "blue", "white", "black", "yellow")
KEY_OF = {lock: KEYS[place % len(KEYS)] for place, lock in enumerate(LOCKS)}
CHANCE = "chance"
CHOICES = (*LOCKS, CHANCE)
Seat = Literal["keeper", "opener"]
KEEPER, OPENER = get_args(Seat)
OPENED, SHUT, UNREADABLE = "opened", "shut", "no such word"
WORDS = (*CHOICES, *KEYS, KEEPER, OPENER, OPENED, SHUT, "no", "such", "word")
INSTRUCTIONS = {
    KEEPER: f"Lock the chest so that it stays shut. Answer with one lock: {', '.join(CHOICES)}.\n",
    OPENER: f"Open the chest. Every lock has one key. Answer with one key: {', '.join(KEYS)}.\n",
}


class Locks(TextEnv):
    """The environment.

    seat: the agent's; None draws it from the seed. opponent: "scripted" or "policy", see above. instructions: begin
    each observation with the rules. Raises ValueError for other values.
    """

    observation_space = TalkSpace()

    def __init__(
        self,
        seat: Seat | None = None,
        opponent: Literal["scripted", "policy"] = "scripted",
        instructions: bool = True,
    ) -> None:
        if seat not in (None, KEEPER, OPENER):
            raise ValueError(f"seat={seat!r} must be keeper or opener; omit it to draw it from the seed")
        if opponent not in ("scripted", "policy"):
            raise ValueError(f"opponent={opponent!r} must be scripted or policy")
        self._fixed = seat
        self._scripted = opponent == "scripted"
        self._instructions = instructions
        self._seat: str = KEEPER
        self._lock: str | None = None  # None before the keeper has chosen
        self._chance = KEYS[0]  # the key of "chance" in this game
        self._running = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        super().reset(seed=seed)
        drawn = (KEEPER, OPENER)[self.np_random.integers(2)]
        self._chance = KEYS[self.np_random.integers(len(KEYS))]
        self._seat, self._lock, self._running = self._fixed or drawn, None, True
        if self._seat == OPENER and self._scripted:
            self._lock = LOCKS[self.np_random.integers(len(LOCKS))]
        return self._observation(), {}

    def step(self, action: str) -> tuple[Any, float, bool, bool, Info]:
        if not self._running:
            raise RuntimeError("step() was called without a running game; call reset() first")
        word, choices = action.strip().lower(), CHOICES if self._lock is None else KEYS
        if word not in choices:
            if self._mover == self._seat:
                self._running = False
                return UNREADABLE, 0.0, True, False, {"malformed": True, "success": False}
            word = choices[self.np_random.integers(len(choices))]
        if self._lock is not None:
            return self._opened(word)
        self._lock = word
        if self._scripted:
            return self._opened(KEY_OF.get(word) or KEYS[self.np_random.integers(len(KEYS))])
        return self._observation(), 0.0, False, False, {}

    @property
    def _mover(self) -> str:
        return KEEPER if self._lock is None else OPENER

    def _observation(self) -> Observation:
        said = KEEPER if self._lock is None else f"{OPENER}: {self._lock}"
        text = (INSTRUCTIONS[self._mover] if self._instructions else "") + said
        return text if self._mover == self._seat else for_opponent(text)

    def _opened(self, key: str) -> tuple[Any, float, bool, bool, Info]:
        assert self._lock is not None
        fits = key == KEY_OF.get(self._lock, self._chance)
        won = fits == (self._seat == OPENER)
        self._running = False
        return OPENED if fits else SHUT, float(won), True, False, {"success": won}


class Player:
    """Locks with any lock, and takes the right key, a wrong one with probability `error_rate`. One per episode."""

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)

    def act(self, observation: Observation) -> str:
        """The next word, for the seat that is to move."""
        said = str(messages_of(observation)[0]["content"])
        _, opens, lock = said.splitlines()[-1].partition(f"{OPENER}: ")
        if not opens:
            return self._drawn(CHOICES)
        right = KEY_OF.get(lock) or self._drawn(KEYS)
        wrong = [key for key in KEYS if key != right]
        return self._drawn(wrong) if self._rng.random() < self._error_rate else right

    def _drawn(self, words: Sequence[str]) -> str:
        return str(words[int(self._rng.integers(len(words)))])
