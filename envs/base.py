"""The contract between environments and agents: a `gymnasium.Env` that talks.

An observation is text, or chat messages; an action is the text the agent wrote. `terminated` says that the environment
reached a final state, `truncated` that a limit cut the episode: they are never the same thing. An environment draws
from its own generator (`self.np_random`) only, so replicas are independent and a seed fixes the instance.

A message is a dict with `role` and `content`, as chat templates take them: text, or a list of parts where it shows
pictures (envs/images.py). The first one of an observation may direct
the agent besides (DIRECTIONS, which the model never sees):

    tools       list of JSON schemas: what can be called, for the chat template's own tool section
    forget      true: the conversation begins anew with these messages, as a segment of its own
    go_on       true: the content is put behind what the agent wrote last, whose turn goes on from there
    max_tokens  the next turn may sample so many tokens at most, where the recipe allows more

Keys of `info` that mean something to Manta:

    success    bool, on the last step: the environment's own verdict, where it has one
    malformed  bool: the action could not be read (whether that ends the episode is the environment's choice)
    rewards    dict, name -> number: what the step's reward is made of, for methods that weigh the parts
    tools      dict, reason -> number: what became of the calls in this turn (Reason in envs/tools/tool_env.py)
    ended      dict: there has been an end, with these `terminated`, `truncated`, `success` and `malformed`, and further
               turns are about it (a part asks for them). An episode that has no such turn left, or is cut in them,
               ended so. None takes it back.

An episode goes on after its worker is lost. An environment whose seed fixes all it does needs nothing for that: its
actions are played again. One that is slow or does not repeat itself may offer `Snapshots`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal, Protocol, TypeVar, get_args, runtime_checkable

import gymnasium as gym
from gymnasium import spaces

Message = dict[str, Any]
Observation = str | list[Message]
Info = dict[str, Any]
Split = Literal["all", "train", "heldout"]
Instance = TypeVar("Instance")

DIRECTIONS = ("tools", "forget", "go_on", "max_tokens")
_END = ("terminated", "truncated", "success", "malformed")  # what `ended` of an info may say
HELD_OUT = 8  # one instance in so many is held out
MAX_DRAWS = 10_000  # instances tried for one that fits; options that leave none must fail, not wait
PRINTABLE = "".join(map(chr, range(32, 127))) + "\n\t"


def messages_of(observation: Observation) -> list[Message]:
    """Copy an observation as chat messages; plain text becomes a message of the user.

    TypeError for an observation that is neither text nor a non-empty list of messages.
    """
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}]
    if not isinstance(observation, list) or not all(isinstance(message, dict) for message in observation):
        raise TypeError(f"an observation must be a str or a list of message dicts, got {type(observation)}")
    if not observation:
        raise TypeError("an observation must hold at least one message")
    return [dict(message) for message in observation]


def as_number(value: Any, what: str) -> float:
    """A reward as a float, whatever type of number it has. TypeError for text, also where it says a number."""
    if isinstance(value, str | bytes | bytearray):
        raise TypeError(f"{what} is the text {value!r:.80}; give a number")
    return float(value)


def named_rewards(info: Info) -> dict[str, float] | None:
    """The parts of a step's reward; None where the environment names none. TypeError, ValueError for junk."""
    named = info.get("rewards")
    return (
        None
        if named is None
        else {str(key): as_number(value, f"the reward {key}") for key, value in named.items()}
    )


def end_behind(info: Info) -> Info:
    """What an info says of an end that lies behind, as {"ended": None or four bools at most}; empty: nothing."""
    ended = info.get("ended")
    if isinstance(ended, dict):
        ended = {key: bool(ended[key]) for key in _END if ended.get(key) is not None}
    elif ended is not None:  # another's word for something else
        return {}
    return {"ended": ended} if "ended" in info else {}


def seat_of(info: Info) -> int | None:
    """Who made a step's move where the agent moves for both sides: 0, whom rewards are for; 1, whom they are against.

    None where the environment does not say. ValueError for another seat: what is good for one is bad for the other only
    where there are two.
    """
    seat = info.get("seat")
    if seat not in (None, 0, 1):
        raise ValueError(f"info['seat']={seat!r} must be 0 or 1")
    return None if seat is None else int(seat)


def held_out(content: str) -> bool:
    """Whether an instance belongs to the held-out part: decided by its content, the same everywhere."""
    return hashlib.sha256(content.encode()).digest()[0] % HELD_OUT == 0


def in_split(content: str, split: Split) -> bool:
    """Whether an instance with this content belongs to the split; "all" holds both parts."""
    return split == "all" or held_out(content) == (split == "heldout")


def drawn(
    attempt: Callable[[], Instance | None], content: Callable[[Instance], str], split: Split
) -> Instance:
    """The first attempt that gives an instance (None: it came to nothing) of the split; ValueError after MAX_DRAWS."""
    for _ in range(MAX_DRAWS):
        instance = attempt()
        if instance is not None and in_split(content(instance), split):
            return instance
    raise ValueError(f"none of {MAX_DRAWS} instances drawn fits and lies in split={split}; use other options")


def check_options(level: int, levels: Collection[int], split: str, max_turns: int | None) -> None:
    """Refuse wrong values of the options that every environment with levels has: a ValueError says what is right."""
    if level not in levels:
        raise ValueError(f"level={level!r} must be {', '.join(map(str, levels))}")
    if split not in get_args(Split):
        raise ValueError(f"split={split!r} must be all, train or heldout")
    if max_turns is not None and max_turns < 1:
        raise ValueError(f"max_turns={max_turns} leaves no turn to play; use 1 or more")


def lower_case_words(texts: Iterable[str]) -> tuple[str, ...]:
    """The words of two lower-case letters and more that stand in these texts, each once, in order of the alphabet.

    For an environment's WORDS: what observations without the rules, and a player's actions, are made of, so that a
    small tokenizer can have a token for each. A lone letter is a character like any other.
    """
    found = (re.findall("(?<![A-Za-z])[a-z]{2,}(?![A-Za-z])", text) for text in texts)
    return tuple(sorted({word for words in found for word in words}))


def text_space(max_length: int = 4096) -> spaces.Text:
    """Printable ASCII text of at most `max_length` characters, the empty text included."""
    return spaces.Text(min_length=0, max_length=max_length, charset=PRINTABLE)


class ChoiceSpace(spaces.Text):
    """Text of which some texts are actions: anything may be said, and what is drawn at random is one of them."""

    def __init__(self, texts: Iterable[str]) -> None:
        super().__init__(256, min_length=0, charset=PRINTABLE)
        self.texts = tuple(texts)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        return self.texts[self.np_random.integers(len(self.texts))]


class TalkSpace(spaces.Space[Observation]):
    """Whatever an environment may say: text, or chat messages whose contents are text or parts."""

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
    """Base of environments that are text from the start: text in, text out.

    reward_range: the least and the most that the rewards of an episode come to; a class with another says so.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own convention
    reward_range: tuple[float, float] = (0.0, 1.0)

    observation_space: spaces.Space[Any] = text_space()
    action_space = text_space(256)


@runtime_checkable
class Snapshots(Protocol):
    """What an environment may offer: its whole state as bytes that another replica can go on from.

    `snapshot` is asked for after every step that did not end the episode. `restore` is called on a replica that was
    just reset with the same seed; what was said so far is not said again.
    """

    def snapshot(self) -> bytes: ...

    def restore(self, snapshot: bytes) -> None: ...
