"""A corridor with a door at its end that asks for what was said at its beginning.

Observation: at the start a line per fact ("ann chose red"), after every step an irrelevant object that is passed ("a
lamp marked two"), and at the door the question ("what did ann choose"). Nothing is repeated, so an agent that sees only
the last observation has to guess at the door, with probability one over the number of values.
Action: walk, or one of the values, which is an answer at the door; elsewhere "nothing happens".
Reward: 1 for the right answer, else 0. Horizon: `max_turns`; the door is `LEVELS` steps away.
Levels: 1 to 4, ever more steps and facts to keep apart, of which one is asked for (`LEVELS`).
Ends: an answer at the door (terminated), turns used up (truncated), any other word (malformed).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.base import Info, Split, TextEnv, check_options, draw_valid

LEVELS = {1: (3, 1), 2: (6, 2), 3: (12, 3), 4: (24, 4)}  # steps to the door, facts
NAMES = ("ann", "bob", "eve", "tom")
VALUES = ("red", "green", "blue", "yellow", "one", "two", "three", "four", "left", "right", "up", "down")
OBJECTS = ("lamp", "chair", "clock", "plant", "carpet", "mirror", "statue", "vase", "crate", "bench")
WALK = "walk"
ACTIONS = (WALK, *VALUES)
NOTHING, OPENS, SHUT, UNREAD = "nothing happens", "the door opens", "the door stays shut", "no such word"
# The words of observations (without instructions) and actions.
WORDS = tuple(
    dict.fromkeys(
        f"{' '.join((*ACTIONS, *NAMES, *OBJECTS))} chose a marked what did choose "
        f"{NOTHING} {OPENS} {SHUT} {UNREAD}".split()
    )
)
INSTRUCTIONS = (
    "Remember who chose what. Then walk to the door at the end of the corridor, which asks for one of the choices; "
    "what you pass on the way means nothing. Answer with one word: walk, or the choice the door asks for, which is "
    f"one of {', '.join(VALUES)}.\n"
)


def paid(answer: str, asked: str, facts: dict[str, str]) -> float:
    """The reward of an answer at the door."""
    return float(answer == facts[asked])


class MemoryCorridor(TextEnv):
    """The environment.

    level: 1 to 4, see above. max_turns: actions before truncation. split: "train" and "heldout" divide the instances by
    the objects that are passed. The facts are drawn independently of the split; else some answers would be likelier in
    one part and could be guessed. instructions: begin with the rules in English. Raises ValueError for values that
    leave nothing to play.
    """

    def __init__(
        self, level: int = 1, max_turns: int = 32, split: Split = "all", instructions: bool = True
    ) -> None:
        check_options(level, LEVELS, split, max_turns)
        self._steps, self._told = LEVELS[level]
        if max_turns <= self._steps:
            raise ValueError(
                f"max_turns={max_turns} ends before level {level} can be answered; use {self._steps + 1} or more"
            )
        self._max_turns = max_turns
        self._split = split
        self._opening = INSTRUCTIONS if instructions else ""
        self._facts: dict[str, str] = {}
        self._asked = ""
        self._passed: list[str] = []
        self._place = 0  # steps from the start
        self._turns = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        rng = self.np_random
        names, values = (rng.permutation(len(each))[: self._told].tolist() for each in (NAMES, VALUES))
        self._facts = {NAMES[name]: VALUES[value] for name, value in zip(names, values, strict=True)}
        self._asked = NAMES[names[rng.integers(self._told)]]
        self._passed = draw_valid(lambda: _draw_passed(rng, self._steps - 1), "\n".join, self._split)
        self._place = self._turns = 0
        return self._opening + self._observed(), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if not self._facts:
            raise RuntimeError("step() was called before reset()")
        word = action.strip().lower()
        if word not in ACTIONS:
            return UNREAD, 0.0, True, False, {"malformed": True, "success": False}
        self._turns += 1
        at_door = self._place == self._steps
        if at_door and word != WALK:
            reward = paid(word, self._asked, self._facts)
            return OPENS if reward else SHUT, reward, True, False, {"success": reward > 0}
        walks = word == WALK and not at_door
        self._place += walks
        truncated = self._turns >= self._max_turns
        observation = self._observed() if walks else f"{NOTHING}\n{self._observed()}"
        return observation, 0.0, False, truncated, {"success": False} if truncated else {}

    def _observed(self) -> str:
        if self._place == 0:
            return "\n".join(f"{name} chose {value}" for name, value in self._facts.items())
        if self._place == self._steps:
            return f"what did {self._asked} choose"
        return self._passed[self._place - 1]


class Player:
    """Remembers the facts; with probability `error_rate` it answers with a random value. One per episode."""

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)
        self._facts: dict[str, str] = {}

    def act(self, observation: str) -> str:
        """The next word. Before the door it never errs: only walking changes anything."""
        for line in observation.splitlines():
            name, _, value = line.partition(" chose ")
            if name in NAMES:
                self._facts[name] = value
        *_, asked, last = ("", *observation.split())
        if last != "choose":
            return WALK
        if self._rng.random() < self._error_rate:
            return VALUES[self._rng.integers(len(VALUES))]
        return self._facts[asked]


def _draw_passed(rng: np.random.Generator, count: int) -> list[str]:
    objects = rng.integers(len(OBJECTS), size=count).tolist()
    values = rng.integers(len(VALUES), size=count).tolist()
    return [f"a {OBJECTS[item]} marked {VALUES[value]}" for item, value in zip(objects, values, strict=True)]
