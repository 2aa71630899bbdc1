"""The rewards of a recipe: ours by kind, a user's own as "module:function", several with weights and names.

    rewards = "number"
    rewards = [{ kind = "number" }, { kind = "mine:brevity", weight = 0.2, words = 40 }]

Each gives a number; ours, but for that of a reward model, within [0, 1]. The reward is their weighted sum, and each is
stored under its name. The first says whether the answer is right: it is where it gives 1. With `cost = true` a number
is a cost instead: 0 or more, no part of the sum, and something that the learner can hold within a limit.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from envs.base import Message, as_number
from envs.rewards import answers, checked
from envs.rewards.judge import judge
from envs.rewards.reward_model import reward_model
from envs.user_functions import load_function, settled

KINDS: dict[str, Callable[..., float]] = {
    "exact": answers.exact,
    "number": answers.number,
    "math": checked.mathematics,
    "choice": answers.choice,
    "contains": answers.contains,
    "regex": answers.regex,
    "json": checked.json_schema,
    "code": checked.code,
    "judge": judge,
    "model": reward_model,
}
_UNBOUNDED = ("model",)
_REPEATED = ("exact", "number", "choice", "contains")  # which a repetition of the right answer satisfies
_NEEDS = {"math": ("math_verify", "math"), "judge": ("openai", "judge")}  # kind -> (module, extra)
_OWN = ("kind", "weight", "name", "cost")


@dataclass(frozen=True, slots=True)
class Said:
    """What a reward is given: the last answer, what is right, the row, and all messages until that answer."""

    completion: str
    truth: Any
    row: dict[str, Any]
    trajectory: Sequence[Message]
    posed: int  # messages that posed the task, the first ones

    @property
    def task(self) -> str:
        """The last message that posed the task, as text."""
        return _text(self.trajectory[self.posed - 1])

    @property
    def conversation(self) -> str:
        """All messages, as text."""
        return "\n\n".join(f"{each['role']}: {_text(each)}" for each in self.trajectory)


def _text(message: Message) -> str:
    content = message["content"]
    parts = [{"text": content}] if isinstance(content, str) else content
    return "\n".join(str(part["text"]) for part in parts if "text" in part)


_FOREIGN = ("solution_str", "completions")  # parameters of functions that are called as verl's and as TRL's


@dataclass(frozen=True)
class Reward:
    """One reward of a recipe. ValueError for a kind that is none, options that it does not take, a missing package."""

    kind: str
    weight: float = 1.0
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    cost: bool = False  # it is none: a cost, with weight 0

    @classmethod
    def of(cls, section: str | dict[str, Any]) -> Reward:
        """The reward that a section of a recipe means; a text is its kind."""
        held = {"kind": section} if isinstance(section, str) else dict(section)
        if not isinstance(kind := held.get("kind"), str):
            raise ValueError(
                f"a reward has a kind: {', '.join(KINDS)}, or module:function; found {section!r}"
            )
        cost = held.get("cost", False)
        if cost is not True and cost is not False:
            raise ValueError(f"cost={cost!r} of {kind} must be true or false")
        if cost and "weight" in held:
            raise ValueError(f"{kind} is a cost, which has no weight in the reward; remove weight or cost")
        given = held.get("weight", 0.0 if cost else 1.0)
        if not math.isfinite(weight := as_number(given, f"the weight of {kind}")):
            raise ValueError(f"the weight of {kind} is {weight}; give a finite number")
        options = {name: value for name, value in held.items() if name not in _OWN}
        reward = cls(kind, weight, str(held.get("name", kind.rpartition(":")[2])), options, cost)
        reward._require_options()
        return reward

    def __call__(self, said: Said) -> float:
        """The number that this reward gives. ValueError, TypeError for what is no finite number."""
        if self.kind == "model":
            return reward_model(said.trajectory, **self.options)
        if self.kind in KINDS:
            beside = (said.task, said.conversation) if self.kind == "judge" else ()
            return KINDS[self.kind](said.completion, said.truth, *beside, **self.options)
        number = as_number(settled(self._called(said)), f"what {self.kind} returned")
        if not math.isfinite(number):
            raise ValueError(f"{self.kind} returned {number}; a reward has to be a finite number")
        return number

    def can_give(self, truth: Any) -> bool:
        """Whether some answer is right where this is: for kinds that compare the two, one that repeats it."""
        if self.kind not in _REPEATED:
            return True
        said = [
            f"the answer is {each}" if self.kind == "choice" else str(each) for each in answers.several(truth)
        ]
        return any(text.strip() and KINDS[self.kind](text, truth, **self.options) for text in said)

    def _called(self, said: Said) -> Any:
        """A user's function, called as its parameters say: Manta's, verl's or TRL's way."""
        function = load_function(self.kind)
        names = inspect.signature(function).parameters
        if (
            "solution_str" in names
        ):  # verl: compute_score(data_source, solution_str, ground_truth, extra_info)
            given = {
                "data_source": said.row.get("data_source"),
                "solution_str": said.completion,
                "ground_truth": said.truth,
                "extra_info": said.row.get("extra_info"),
            }
            returned = function(**given, **self.options)
            return returned["score"] if isinstance(returned, dict) else returned
        if "completions" in names:  # TRL: reward(prompts, completions, **columns) -> list, here of one
            chat = isinstance(said.row.get("prompt"), list)
            answer = [{"role": "assistant", "content": said.completion}] if chat else said.completion
            columns = {
                name: [value] for name, value in said.row.items() if name not in ("prompt", "completion")
            }
            given = {"prompts": [said.row.get("prompt")], "completions": [answer]} | columns | self.options
            if not any(each.kind is each.VAR_KEYWORD for each in names.values()):
                given = {name: value for name, value in given.items() if name in names}
            return settled(function(**given))[0]
        whole = {"trajectory": [*said.trajectory]} if "trajectory" in names else {}
        return function(said.completion, said.row, **whole, **self.options)

    def _require_options(self) -> None:
        function = KINDS.get(self.kind)
        if function is None:
            if ":" not in self.kind:
                raise ValueError(
                    f"there is no reward {self.kind!r}; there are {', '.join(KINDS)}, and module:function"
                )
            function = load_function(self.kind)
        elif self.kind in _NEEDS and importlib.util.find_spec(_NEEDS[self.kind][0]) is None:
            module, extra = _NEEDS[self.kind]
            raise ValueError(
                f"reward {self.kind} needs the package {module}: pip install 'manta-rl[{extra}]'"
            )
        signature = inspect.signature(function)
        taken = signature.parameters.values()
        if self.kind not in KINDS and signature.parameters.keys().isdisjoint(_FOREIGN):
            whole = dict.fromkeys(signature.parameters.keys() & {"trajectory"})
            try:
                signature.bind("completion", "row", **whole, **self.options)
            except TypeError as error:
                raise ValueError(
                    f"reward {self.kind} is called with completion, row and its options: {error}"
                ) from error
            return
        if any(each.kind is each.VAR_KEYWORD for each in taken):
            return
        have = [each.name for each in taken if self.kind not in KINDS or each.kind is each.KEYWORD_ONLY]
        missing = [
            each.name for each in taken if each.kind is each.KEYWORD_ONLY and each.default is each.empty
        ]
        for name in self.options:
            if name not in have:
                raise ValueError(
                    f"reward {self.kind} has no option {name!r}; it has {', '.join(have) or 'none'}"
                )
        for name in missing:
            if name not in self.options:
                raise ValueError(f"reward {self.kind} needs the option {name!r}")


def rewards_of(sections: str | dict[str, Any] | Sequence[str | dict[str, Any]]) -> tuple[Reward, ...]:
    """The rewards of a recipe. ValueError for none, for wrong ones, and for two of one name."""
    several = [sections] if isinstance(sections, str | dict) else list(sections)
    rewards = tuple(map(Reward.of, several))
    names = [reward.name for reward in rewards]
    if not rewards or len(set(names)) < len(names):
        raise ValueError(f"rewards have names of their own, at least one: found {', '.join(names) or 'none'}")
    if rewards[0].cost:
        raise ValueError(
            f"{names[0]} is a cost; the first reward says whether the answer is right, put one there"
        )
    return rewards


def reward_range(rewards: Sequence[Reward]) -> tuple[float, float]:
    """The least and the most that the weighted sum comes to; a user's own reward and a model's have no bounds."""
    summed = [reward for reward in rewards if not reward.cost]
    if any(reward.kind not in KINDS or reward.kind in _UNBOUNDED for reward in summed):
        return -math.inf, math.inf
    weights = [reward.weight for reward in summed]
    return sum(min(weight, 0.0) for weight in weights), sum(max(weight, 0.0) for weight in weights)
