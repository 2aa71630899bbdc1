"""The contract between environments and agents: a `gymnasium.Env` with text or chat messages as observations.

An action is the text that the agent sampled. `terminated` means that the environment reached a final state, `truncated`
that a limit cut the episode; never both. An environment draws from its own generator (`self.np_random`) only, so
replicas are independent and a seed fixes the instance.

A message is a dict with `role` and `content`, as chat templates take them; the content is text, or a list of parts if
it holds images (envs/images.py). The first message of an observation may carry directions to the agent (DIRECTIONS),
which the model does not see:

    tools          list of JSON schemas: the callable tools, for the tool section of the chat template
    reset_context  true: the context is cleared, and a new segment begins with these messages
    continue_turn  true: the content is appended to the agent's last turn, which continues from there
    max_tokens     upper bound on the tokens of the next turn, within the limit of the recipe
    opponent       true: the other seat of a game is to move, which another policy of the run plays

Keys of `info` that Manta reads:

    success    bool, on the last step: the environment's own verdict, if it has one
    malformed  bool: the action could not be parsed (the environment decides whether that ends the episode)
    rewards    dict, name -> number: the components of the step's reward, for methods that weight them
    costs      dict, name -> number of 0 or more: what the step cost; no part of the reward (limits: docs/algorithms.md)
    seat       0 or 1, in self-play: who made the move (see `seat_of`)
    tools      dict, outcome -> number: outcomes of the tool calls in this turn (CallOutcome, envs/tools/tool_env.py)
    ended      dict with `terminated`, `truncated`, `success` and `malformed` of an end that further turns follow (an
               agent part asks for them). If the episode is cut in those turns, it counts as ended like this. None
               revokes it.

If a worker is lost, its episodes are resumed elsewhere. If the seed fixes everything an environment does, its actions
are replayed, and it needs nothing else. A slow or nondeterministic environment may implement `Snapshots`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, Protocol, TypeVar, get_args, runtime_checkable

import gymnasium as gym
from gymnasium import spaces

Message = dict[str, Any]
Observation = str | list[Message]
Info = dict[str, Any]
Split = Literal["all", "train", "heldout"]
Instance = TypeVar("Instance")

DIRECTIONS = ("tools", "reset_context", "continue_turn", "max_tokens", "opponent")
RENAMED_DIRECTIONS = {"forget": "reset_context", "go_on": "continue_turn"}  # refused with the new name
_END_KEYS = ("terminated", "truncated", "success", "malformed")  # of `ended` in an info
HELD_OUT = 8  # one of this many instances is held out
MAX_DRAWS = 10_000  # attempts at drawing an instance; options that admit none must fail instead of hanging
PRINTABLE = "".join(map(chr, range(32, 127))) + "\n\t"


def messages_of(observation: Observation) -> list[Message]:
    """Copy an observation as chat messages; plain text becomes a message of the user.

    TypeError for an observation that is neither text nor a non-empty list of messages; ValueError for an old direction.
    """
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}]
    if not isinstance(observation, list) or not all(isinstance(message, dict) for message in observation):
        raise TypeError(f"an observation must be a str or a list of message dicts, got {type(observation)}")
    if not observation:
        raise TypeError("an observation must hold at least one message")
    for old in RENAMED_DIRECTIONS.keys() & observation[0].keys():
        raise ValueError(f"the key {old!r} of a message is called {RENAMED_DIRECTIONS[old]!r} now")
    return [dict(message) for message in observation]


def for_opponent(text: str) -> list[Message]:
    """An observation of the seat that another policy of the run plays."""
    return [{"role": "user", "content": text, "opponent": True}]


def as_number(value: Any, what: str) -> float:
    """Convert a reward of any numeric type to float. TypeError for text, even if it spells a number."""
    if isinstance(value, str | bytes | bytearray):
        raise TypeError(f"{what} is the text {value!r:.80}; give a number")
    return float(value)


def named_rewards(info: Info) -> dict[str, float] | None:
    """The components of a step's reward; None if the info names none. TypeError or ValueError for other values."""
    named = info.get("rewards")
    return (
        None
        if named is None
        else {str(key): as_number(value, f"the reward {key}") for key, value in named.items()}
    )


def named_costs(info: Info) -> dict[str, float]:
    """The costs of a step, empty if the info names none. TypeError or ValueError for other values than numbers >= 0."""
    given = info.get("costs", {})
    if not isinstance(given, Mapping):
        raise TypeError(f"info['costs']={given!r:.80} must be a dict, name -> number")
    costs = {str(key): as_number(value, f"the cost {key}") for key, value in given.items()}
    for name, cost in costs.items():
        if not 0 <= cost < math.inf:
            raise ValueError(f"the cost {name} is {cost}; a cost must be a finite number of 0 or more")
    return costs


def earlier_end(info: Info) -> Info:
    """The `ended` entry of an info, reduced to bools: {"ended": None or up to four bools}; empty without an entry."""
    ended = info.get("ended")
    if isinstance(ended, dict):
        ended = {key: bool(ended[key]) for key in _END_KEYS if ended.get(key) is not None}
    elif ended is not None:  # a key of the environment's own with another meaning
        return {}
    return {"ended": ended} if "ended" in info else {}


def seat_of(info: Info) -> int | None:
    """The player who made this step's move in self-play: 0, to whom the rewards belong, or 1, the opponent.

    None if the info does not name one. ValueError for other values: only two-player games are zero-sum.
    """
    seat = info.get("seat")
    if seat not in (None, 0, 1):
        raise ValueError(f"info['seat']={seat!r} must be 0 or 1")
    return None if seat is None else int(seat)


def held_out(content: str) -> bool:
    """Whether an instance is held out: a hash of its content decides, so it is the same on every machine."""
    return hashlib.sha256(content.encode()).digest()[0] % HELD_OUT == 0


def in_split(content: str, split: Split) -> bool:
    """Whether an instance with this content belongs to the split; "all" contains both parts."""
    return split == "all" or held_out(content) == (split == "heldout")


def draw_valid(
    attempt: Callable[[], Instance | None], content: Callable[[Instance], str], split: Split
) -> Instance:
    """The first instance drawn that belongs to the split; an attempt may return None. ValueError after MAX_DRAWS."""
    for _ in range(MAX_DRAWS):
        instance = attempt()
        if instance is not None and in_split(content(instance), split):
            return instance
    raise ValueError(f"none of {MAX_DRAWS} drawn instances is valid and in split={split}; use other options")


def check_options(level: int, levels: Collection[int], split: str, max_turns: int | None) -> None:
    """Check the options shared by all environments with levels. ValueError names the valid values."""
    if level not in levels:
        raise ValueError(f"level={level!r} must be one of {', '.join(map(str, levels))}")
    if split not in get_args(Split):
        raise ValueError(f"split={split!r} must be all, train or heldout")
    if max_turns is not None and max_turns < 1:
        raise ValueError(f"max_turns={max_turns} leaves no turn to play; use 1 or more")


def vocabulary(texts: Iterable[str]) -> tuple[str, ...]:
    """The distinct words of at least two lower-case letters in these texts, sorted.

    For an environment's WORDS: the vocabulary of its observations (without instructions) and actions, so that a small
    tokenizer can hold a token for each. Single letters are ordinary characters.
    """
    found = (re.findall("(?<![A-Za-z])[a-z]{2,}(?![A-Za-z])", text) for text in texts)
    return tuple(sorted({word for words in found for word in words}))


def text_space(max_length: int = 4096) -> spaces.Text:
    """Printable ASCII text of 0 to `max_length` characters."""
    return spaces.Text(min_length=0, max_length=max_length, charset=PRINTABLE)


class ChoiceSpace(spaces.Text):
    """Text space that contains any text and samples from a list of valid actions."""

    def __init__(self, texts: Iterable[str]) -> None:
        super().__init__(256, min_length=0, charset=PRINTABLE)
        self.texts = tuple(texts)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        return self.texts[self.np_random.integers(len(self.texts))]


class TalkSpace(spaces.Space[Observation]):
    """Space of all observations: text, or chat messages whose contents are text or parts."""

    def contains(self, x: Any) -> bool:
        messages = [{"role": "user", "content": x}] if isinstance(x, str) else x
        return (
            isinstance(messages, list)
            and bool(messages)
            and all(
                isinstance(each, dict)
                and isinstance(each.get("role"), str)
                and _is_content(each.get("content"))
                for each in messages
            )
        )

    def sample(self, mask: None = None, probability: None = None) -> str:
        return str(text_space(16).sample())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TalkSpace)


def _is_content(content: Any) -> bool:
    return isinstance(content, str) or (
        isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)
    )


class TextEnv(gym.Env[str, str]):
    """Base class of text environments: text observations, text actions.

    reward_range: lower and upper bound on the return of an episode; override it in the class if it differs.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own convention
    reward_range: tuple[float, float] = (0.0, 1.0)

    observation_space: spaces.Space[Any] = text_space()
    action_space = text_space(256)


@runtime_checkable
class Snapshots(Protocol):
    """Optional interface of an environment: its whole state as bytes, from which another replica can continue.

    `snapshot` is called after every step that does not end the episode. `restore` is called on a replica that was just
    reset with the same seed; earlier observations are not repeated.
    """

    def snapshot(self) -> bytes: ...

    def restore(self, snapshot: bytes) -> None: ...
