"""A home and an instruction: from "turn on the light" to errands through several rooms.

Observation, line by line: "task: " and the unfinished parts of the instruction (every turn; without `remind` only at
first); the player's room; each device in it ("light off"); each place in it and what lies on it ("table: cup");
"carried: " and what is carried; "exits: " and the ways to rooms entered before; "new: " and the ways to others. What
the task names without a room is in this room. After a command without effect, the first line is "nothing happens".
Action: go ROOM, turn on DEVICE, turn off DEVICE, open DEVICE, close DEVICE, take THING, put THING PLACE; all but go act
in the player's room. Reward: 1 when everything the instruction asks for holds, else 0. Horizon: `max_turns`.
Levels: 1 asks for a device in the room one stands in, 2 for one elsewhere, 3 for two or three in several rooms ("every
light" counts as one), 4 for one or two things to be brought to other rooms, and a device or every one of a kind.
Ends: everything asked for holds (terminated, success), the player changed something that the instruction does not name
(terminated), turns used up (truncated), an action outside the grammar (malformed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from envs.base import Info, Split, TextEnv, check_options, draw_valid

HALL = "hall"  # every other room is connected to the hall only
FITTINGS = {  # in addition to a light; a room has two of these
    HALL: ("door", "heater", "radio"),
    "kitchen": ("window", "heater", "fan", "radio"),
    "bedroom": ("window", "curtain", "heater", "fan"),
    "bathroom": ("window", "heater", "fan"),
    "lounge": ("window", "curtain", "fan", "radio"),
    "study": ("window", "curtain", "heater", "radio"),
}
PLACES = {
    HALL: ("bench",),
    "kitchen": ("table", "shelf"),
    "bedroom": ("bed", "drawer"),
    "bathroom": ("sink", "shelf"),
    "lounge": ("sofa", "table"),
    "study": ("desk", "shelf"),
}
ROOMS = tuple(PLACES)
THINGS = ("cup", "book", "key", "towel", "plate")
SWITCHED = ("light", "heater", "fan", "radio")
OPENED = ("window", "curtain", "door")
# The state that a command causes, and the command that changes a state.
BRINGS = {"turn on": "on", "turn off": "off", "open": "open", "close": "closed"}
CHANGES = {"on": "turn off", "off": "turn on", "open": "close", "closed": "open"}

Command = tuple[str, ...]  # verb, object and, for put, place
Device = tuple[str, str]  # room, kind
Spot = tuple[str, str]  # room, place
CARRIED: Spot = ("", "")
EVERYWHERE = ""  # the room of a goal about every device of a kind
_Item = TypeVar("_Item")


def _grammar() -> dict[str, Command]:
    places = dict.fromkeys(place for room in ROOMS for place in PLACES[room])
    commands: list[Command] = [("go", room) for room in ROOMS]
    commands += [(verb, kind) for verb in ("turn on", "turn off") for kind in SWITCHED]
    commands += [(verb, kind) for verb in ("open", "close") for kind in OPENED]
    commands += [("take", thing) for thing in THINGS]
    commands += [("put", thing, place) for thing in THINGS for place in places]
    return {" ".join(command): command for command in commands}


COMMANDS = _grammar()
NOTHING, DONE = "nothing happens", "done"
UNASKED, UNREAD = "that was not asked", "no such command"
# The words of observations (without instructions) and actions.
WORDS = tuple(
    dict.fromkeys(
        f"task and the every bring to carried exits new {NOTHING} {DONE} {UNASKED} {UNREAD} "
        f"{' '.join(BRINGS.values())} {' '.join(COMMANDS)}".split()
    )
)
INSTRUCTIONS = (
    "You are at home. Do what the task says; change nothing that it does not name. What it names without a room is in "
    'this one. You see the room, its devices, its places with what lies on them, and the ways out: "new" ones lead '
    "where you have not been. Answer with one command: go ROOM, turn on DEVICE, turn off DEVICE, open DEVICE, "
    "close DEVICE, take THING or put THING PLACE.\n"
)


@dataclass(slots=True)
class Home:
    """Where everything is and its state: the environment's, or as much of it as a player knows."""

    here: str
    rooms: dict[str, bool]  # whether it was entered
    devices: dict[Device, str]
    things: dict[str, Spot]

    @property
    def new(self) -> list[str]:
        """The rooms not entered yet."""
        return [room for room, entered in self.rooms.items() if not entered]

    def exits(self) -> list[str]:
        return [room for room in self.rooms if room != HALL] if self.here == HALL else [HALL]

    def seen(self) -> list[str]:
        """The player's room, line by line."""
        here, ways = self.here, self.exits()
        lines = [here, *(f"{kind} {state}" for (room, kind), state in self.devices.items() if room == here)]
        for place in PLACES[here]:
            lying = [thing for thing, spot in self.things.items() if spot == (here, place)]
            lines.append(f"{place}: {' '.join(lying)}" if lying else place)
        for name, said in (
            ("carried", [thing for thing, spot in self.things.items() if spot == CARRIED]),
            ("exits", [room for room in ways if self.rooms[room]]),
            ("new", [room for room in ways if not self.rooms[room]]),
        ):
            if said:
                lines.append(f"{name}: {' '.join(said)}")
        return lines

    def possible(self) -> list[str]:
        """The commands that would change something now."""
        here, things = self.here, self.things.items()
        can = [f"go {room}" for room in self.exits()]
        can += [f"{CHANGES[state]} {kind}" for (room, kind), state in self.devices.items() if room == here]
        can += [f"take {thing}" for thing, spot in things if spot[0] == here]
        can += [f"put {thing} {place}" for thing, spot in things if spot == CARRIED for place in PLACES[here]]
        return can

    def obey(self, command: Command) -> bool:
        """Execute a command if it is possible; return whether anything changed."""
        if " ".join(command) not in self.possible():
            return False
        verb, what = command[:2]
        if verb == "go":
            self.here = what
            self.rooms[what] = True
        elif verb == "take":
            self.things[what] = CARRIED
        elif verb == "put":
            self.things[what] = (self.here, command[2])
        else:
            self.devices[self.here, what] = BRINGS[verb]
        return True


@dataclass(frozen=True, slots=True)
class Subgoal:
    """One part of an instruction: a state of a device (or of every one of a kind), or a place for a thing."""

    verb: str  # of `BRINGS`, or "bring"
    what: str
    room: str
    place: str = ""

    def holds(self, home: Home) -> bool:
        if self.place:
            return home.things.get(self.what) == (self.room, self.place)
        state = BRINGS[self.verb]
        if self.room == EVERYWHERE:
            return all(each == state for (_, kind), each in home.devices.items() if kind == self.what)
        return home.devices.get((self.room, self.what)) == state

    def names(self, what: str, room: str) -> bool:
        """Whether it is about this object in this room."""
        return what == self.what and (bool(self.place) or self.room in (EVERYWHERE, room))

    def said(self, here: str) -> str:
        """The goal in words, as told in room `here`."""
        if self.room == EVERYWHERE:
            return f"{self.verb} every {self.what}"
        room = "" if self.room == here else f"{self.room} "
        if self.place:
            return f"bring the {self.what} to the {room}{self.place}"
        return f"{self.verb} the {room}{self.what}"

    @classmethod
    def read(cls, text: str, here: str) -> Subgoal:
        """Parse a goal from the text of `said(here)`."""
        words = text.split()
        room = words[-2] if words[-2] in ROOMS else here
        if words[0] == "bring":
            return cls("bring", words[2], room, words[-1])
        verb = " ".join(words[: 2 if words[0] == "turn" else 1])
        return cls(verb, words[-1], EVERYWHERE if "every" in words else room)


def fulfilled(goals: Sequence[Subgoal], home: Home) -> bool:
    """Whether everything asked for holds; then the reward is paid."""
    return all(goal.holds(home) for goal in goals)


def left(goals: Sequence[Subgoal], home: Home) -> list[Subgoal]:
    """The goals that a player cannot know to hold: unmet ones, and those about every room while rooms are new."""
    unsure = bool(home.new)
    return [goal for goal in goals if not goal.holds(home) or (unsure and goal.room == EVERYWHERE)]


class Household(TextEnv):
    """The environment.

    level: 1 to 4, see above. remind: repeat the unfinished parts of the instruction in every observation, so that the
    last one suffices; else the whole instruction is given once. max_turns: commands before truncation. split: "train"
    and "heldout" divide the instances by the first observation, instruction included; "all" contains both.
    instructions: begin with the rules in English. Raises ValueError for values that leave nothing to play.
    """

    def __init__(
        self,
        level: int = 1,
        remind: bool = True,
        max_turns: int = 32,
        split: Split = "all",
        instructions: bool = True,
    ) -> None:
        check_options(level, (1, 2, 3, 4), split, max_turns)
        self._level = level
        self._remind = remind
        self._max_turns = max_turns
        self._split = split
        self._opening = INSTRUCTIONS if instructions else ""
        self._home: Home | None = None
        self._goals: tuple[Subgoal, ...] = ()
        self._turns = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        self._turns = 0
        return self._opening + draw_valid(self._drawn_opening, str, self._split), {}

    def _drawn_opening(self) -> str:
        self._home = draw_home(self.np_random)
        self._goals = draw_goals(self.np_random, self._home, self._level)
        return self._observed(self._home, task=True)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if self._home is None:
            raise RuntimeError("step() was called before reset()")
        command = COMMANDS.get(action.strip().lower())
        if command is None:
            return UNREAD, 0.0, True, False, {"malformed": True, "success": False}
        self._turns += 1
        home = self._home
        changed = home.obey(command)
        if (
            changed
            and command[0] != "go"
            and not any(each.names(command[1], home.here) for each in self._goals)
        ):
            return UNASKED, 0.0, True, False, {"success": False}
        if fulfilled(self._goals, home):
            return DONE, 1.0, True, False, {"success": True}
        truncated = self._turns >= self._max_turns
        observation = self._observed(home, task=self._remind)
        if not changed:
            observation = f"{NOTHING}\n{observation}"
        return observation, 0.0, False, truncated, {"success": False} if truncated else {}

    def _observed(self, home: Home, task: bool) -> str:
        lines = home.seen()
        if task:
            said = " and ".join(goal.said(home.here) for goal in left(self._goals, home))
            lines.insert(0, f"task: {said}")
        return "\n".join(lines)


class Player:
    """Does what is possible in this room, else goes where the first goal leads; errs with probability `error_rate`.

    Unseen objects are looked for in new rooms. An error is any command that would change something here. The player
    remembers the home; with `remind`, a new player every turn works as well.
    """

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)
        self._home = Home("", {}, {}, {})
        self._goals: list[Subgoal] = []

    def act(self, observation: str) -> str:
        """The next command."""
        self._read(observation)
        if self._rng.random() < self._error_rate:
            possible = self._home.possible()
            return possible[self._rng.integers(len(possible))]
        goals = left(self._goals, self._home)
        for goal in goals:
            if command := self._at_hand(goal):
                return command
        room = next((room for goal in goals if (room := self._where(goal))), HALL)
        return f"go {room if self._home.here == HALL else HALL}"

    def _read(self, observation: str) -> None:
        home, task = self._home, ""
        for line in observation.splitlines():
            name, _, said = line.partition(": ")
            kind, _, state = line.partition(" ")
            if name == "task":
                task = said
            elif line in ROOMS:
                home.here = line
                home.rooms[line] = True
            elif name in ("exits", "new"):
                home.rooms.update((room, name == "exits") for room in said.split())
            elif name == "carried":
                home.things.update((thing, CARRIED) for thing in said.split())
            elif name in PLACES[home.here or HALL]:
                home.things.update((thing, (home.here, name)) for thing in said.split())
            elif kind in SWITCHED + OPENED:
                home.devices[home.here, kind] = state
        if task and not self._goals:
            self._goals = [Subgoal.read(each, home.here) for each in task.split(" and ")]

    def _at_hand(self, goal: Subgoal) -> str:
        """The command for a goal in this room; empty if there is none."""
        home = self._home
        if goal.place:
            spot = home.things.get(goal.what)
            if spot == CARRIED:
                return f"put {goal.what} {goal.place}" if home.here == goal.room else ""
            return f"take {goal.what}" if spot and spot[0] == home.here else ""
        state = home.devices.get((home.here, goal.what))
        wrong = state is not None and state != BRINGS[goal.verb]
        return f"{goal.verb} {goal.what}" if wrong and goal.names(goal.what, home.here) else ""

    def _where(self, goal: Subgoal) -> str:
        """The room that a goal leads to; empty if it is unknown."""
        home = self._home
        unknown = next(iter(home.new), "")
        if goal.place:
            spot = home.things.get(goal.what)
            return goal.room if spot == CARRIED else spot[0] if spot else unknown
        if goal.room != EVERYWHERE:
            return goal.room
        seen = (room for room, kind in home.devices if kind == goal.what)
        return next((room for room in seen if home.devices[room, goal.what] != BRINGS[goal.verb]), unknown)


def draw_home(rng: np.random.Generator) -> Home:
    """The hall and two to four other rooms, each with three devices; two or three things; the player anywhere."""
    others = _some(rng, ROOMS[1:], int(rng.integers(2, 5)))
    rooms = [room for room in ROOMS if room == HALL or room in others]
    devices = {}
    for room in rooms:
        fitted = _some(rng, FITTINGS[room], 2)
        for kind, chance in zip(("light", *fitted), rng.integers(2, size=3), strict=True):
            devices[room, kind] = (("on", "off") if kind in SWITCHED else ("open", "closed"))[chance]
    things = {thing: _spot(rng, rooms) for thing in _some(rng, THINGS, int(rng.integers(2, 4)))}
    here = rooms[rng.integers(len(rooms))]
    return Home(here, {room: room == here for room in rooms}, devices, things)


def draw_goals(rng: np.random.Generator, home: Home, level: int) -> tuple[Subgoal, ...]:
    """An instruction of a level; none of its parts holds yet."""
    devices = _some(rng, list(home.devices), len(home.devices))
    if level <= 2:
        here = level == 1
        return (next(_change(home, each) for each in devices if (each[0] == home.here) == here),)
    room, kind = devices[0]
    first = _change(home, devices[0])
    several = sum(each[1] == kind for each in devices) > 1
    if several and rng.integers(2):
        goals = [Subgoal(first.verb, kind, EVERYWHERE)]
        others, more = [each for each in devices if each[1] != kind], 1
    else:
        goals = [first]
        others, more = [each for each in devices if each[0] != room], int(rng.integers(1, 3))
    if level == 3:
        goals += [_change(home, each) for each in others[:more]]
    else:
        for thing in _some(rng, list(home.things), int(rng.integers(1, 3))):
            target = _spot(rng, [each for each in home.rooms if each != home.things[thing][0]])
            goals.append(Subgoal("bring", thing, *target))
    return tuple(_some(rng, goals, len(goals)))


def _change(home: Home, device: Device) -> Subgoal:
    room, kind = device
    return Subgoal(CHANGES[home.devices[device]], kind, room)


def _spot(rng: np.random.Generator, rooms: list[str]) -> Spot:
    room = rooms[rng.integers(len(rooms))]
    return room, PLACES[room][rng.integers(len(PLACES[room]))]


def _some(rng: np.random.Generator, items: Sequence[_Item], count: int) -> list[_Item]:
    """`count` of the items, in random order."""
    return [items[index] for index in rng.permutation(len(items))[:count]]
