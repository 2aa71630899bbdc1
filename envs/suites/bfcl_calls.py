"""Function-calling tasks of the Berkeley Function Calling Leaderboard, scored by its own checker (package bfcl-eval).

Observation: the messages of a task; its functions are announced as tools, for the tool section of the chat template, or
with announce="system" in a system message, for templates that have none.
Action: calls in the form of envs/tools/tool_calls.py, hermes style, any text around them.
Reward: 1 if the package's checker accepts the calls, else 0; it compares names, types and values with lists of possible
answers. In irrelevance tasks only no call is right, in relevance tasks any call is. Horizon: one answer.
Levels: none; each id is a category.
Ends: an answer (terminated); a call that cannot be parsed is a wrong answer, and malformed.

The seed modulo the number of tasks says which. The package's own requirements (numpy 1.26 and the clients of a dozen
services) conflict with Manta's, and none of them is needed: its data and its checker are.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, get_args

import numpy as np

from envs.base import (
    Info,
    Message,
    Observation,
    Split,
    TalkSpace,
    TextEnv,
    check_options,
    in_split,
    text_space,
)
from envs.tools.tool_calls import CLOSE, OPEN, MalformedCall, ToolCall, parse_calls, spoken, write_call

PREFIX = "bfcl/"
IRRELEVANCE, RELEVANCE = ("irrelevance", "live_irrelevance"), ("live_relevance",)
CATEGORIES = (
    *("simple_python", "multiple", "parallel", "parallel_multiple"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"),
    *IRRELEVANCE,
    *RELEVANCE,
)
IDS = tuple(f"{PREFIX}{category}" for category in CATEGORIES)
MAX_ANSWER = 1 << 14  # characters
_MODEL = "manta"  # the name under which the checker looks up whether dots of names were replaced
# Types of the package's function documents -> JSON schema.
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string", "String": "string"}

Task = dict[str, Any]
Announce = Literal["template", "system"]
SYSTEM = (
    "You may call these functions:\n{functions}\nFor each call, write a JSON object of its name and arguments between "
    f"{OPEN} and {CLOSE}, such as:\n{OPEN}\n"
    '{{"name": "f", "arguments": {{"x": 1}}}}'
    f"\n{CLOSE}\n"
    "If no function fits, call none."
)


class BfclCalls(TextEnv):
    """The environment.

    env_id: "bfcl/" and a category. split: "train" and "heldout" divide the tasks by their text, regardless of the seed.
    announce: where the functions are told, see above. ValueError for other values.
    """

    action_space = text_space(MAX_ANSWER)
    observation_space = TalkSpace()

    def __init__(self, env_id: str, split: Split = "all", announce: Announce = "template") -> None:
        check_options(1, (1,), split, None)
        if announce not in get_args(Announce):
            raise ValueError(f"announce={announce!r} must be template or system")
        self._announce = announce
        self._category = category_of(env_id)
        self._tasks = tasks_of(self._category, split)
        self._check = _checker()
        self._task: Task = {}

    @classmethod
    def count_tasks(cls, env_id: str, split: Split = "all", **_: Any) -> int:
        """The number of tasks: the seed modulo it says which."""
        return len(tasks_of(category_of(env_id), split))

    def reset(  # type: ignore[override]  # observations are messages
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(len(self._tasks))) if seed is None else seed
        self._task = self._tasks[drawn % len(self._tasks)]
        messages: list[Message] = deepcopy(self._task["question"][0])
        tools = tools_of(self._task["function"])
        if self._announce == "system":
            return _told_in_text(messages, tools), {"task": self._task["id"]}
        return [messages[0] | {"tools": tools}, *messages[1:]], {"task": self._task["id"]}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if not self._task:
            raise RuntimeError("step() was called before reset()")
        _, calls = parse_calls(spoken(action))
        read = [{call.name: call.arguments} for call in calls if isinstance(call, ToolCall)]
        malformed = any(isinstance(call, MalformedCall) for call in calls)
        right = not malformed and self._is_right(read)
        info: Info = {"success": right} | ({"malformed": True} if malformed else {})
        return "", float(right), True, False, info

    @property
    def possible_answer(self) -> list[dict[str, Any]]:
        """The package's possible answers: calls whose arguments are lists of accepted values."""
        return deepcopy(self._task.get("ground_truth", []))

    def _is_right(self, calls: list[dict[str, Any]]) -> bool:
        if self._category in IRRELEVANCE:
            return not calls
        if self._category in RELEVANCE:
            return bool(calls)
        return self._check(self._task, calls, self._category)


def tools_of(functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The package's function documents as tools of a chat template."""
    named = ("name", "description", "parameters")
    return [
        {"type": "function", "function": _with_json_types({key: each[key] for key in named})}
        for each in functions
    ]


def _told_in_text(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """Messages whose first one, of the system, describes the tools."""
    told = SYSTEM.format(functions="\n".join(json.dumps(tool["function"]) for tool in tools))
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{told}"}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def _with_json_types(document: Any) -> Any:
    """A copy whose types are those of JSON schemas, at every depth."""
    if isinstance(document, list):
        return [_with_json_types(each) for each in document]
    if not isinstance(document, dict):
        return document
    copied = {key: _with_json_types(value) for key, value in document.items()}
    kind = copied.get("type")
    return copied | ({"type": _TYPES.get(kind, kind)} if isinstance(kind, str) else {})


def category_of(env_id: str, categories: tuple[str, ...] = CATEGORIES) -> str:
    """The category that an id names. ValueError for none of these."""
    category = env_id.removeprefix(PREFIX)
    if category not in categories:
        raise ValueError(f"no category {category!r}; use one of: {', '.join(categories)}")
    return category


@lru_cache(maxsize=32)
def tasks_of(category: str, split: Split) -> tuple[Task, ...]:
    """The tasks of a split, each with its possible answers, in the order of the package."""
    data = data_folder()
    [questions] = data.glob(f"BFCL_v[0-9]_{category}.json")
    answers = data / "possible_answer" / questions.name
    told = {each["id"]: each["ground_truth"] for each in lines_of(answers)} if answers.exists() else {}
    tasks = [task | {"ground_truth": told.get(task["id"], [])} for task in lines_of(questions)]
    return tuple(task for task in tasks if in_split(json.dumps(task["question"]), split))


def data_folder() -> Path:
    """The folder of the package's data; found without importing the package."""
    spec = importlib.util.find_spec("bfcl_eval")
    assert spec is not None and spec.submodule_search_locations, (
        "the registry checks that the package is there"
    )
    return Path(spec.submodule_search_locations[0]) / "data"


def lines_of(path: Path) -> list[Task]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@lru_cache(maxsize=1)
def _checker() -> Any:
    """The package's checker: task, calls and category -> whether they are right.

    Its module imports every client of the leaderboard for one fact about a model, whether it writes _ for the dots of
    names. A table of that fact stands in for the clients while the checker is imported.
    """
    table = ModuleType("bfcl_eval.constants.model_config")
    table.__dict__["MODEL_CONFIG_MAPPING"] = {_MODEL: SimpleNamespace(underscore_to_dot=False)}
    before = sys.modules.get(table.__name__)
    sys.modules[table.__name__] = table
    try:
        package = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
    finally:
        if before is None:
            del sys.modules[table.__name__]
        else:
            sys.modules[table.__name__] = before
    language = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON

    def check(task: Task, calls: list[dict[str, Any]], category: str) -> bool:
        asked = deepcopy((task["function"], calls, task["ground_truth"]))
        try:
            return bool(package.ast_checker(*asked, language, category, _MODEL)["valid"])
        except (
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            ValueError,
        ):  # for values of types it does not foresee
            return False

    return check


class Player:
    """Calls a function with what the question says: quoted words and numbers, then defaults; errs with `error_rate`.

    An error is any function with arguments of the right types drawn at random. One per episode.
    """

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)

    def act(self, observation: list[Message]) -> str:
        """One call."""
        functions = [tool["function"] for tool in observation[0]["tools"]]
        erring = self._rng.random() < self._error_rate
        words = str(observation[-1]["content"]).replace("?", " ").replace(",", " ").replace(".", " ").split()
        asked = {word.lower() for word in words}
        drawn = functions[self._rng.integers(len(functions))]
        function = drawn if erring else max(functions, key=lambda each: len(asked & _words(each)))
        parameters = function["parameters"]
        numbers = [int(word) for word in words if word.isdecimal() and len(word) < 10]
        names = [word.strip("'\"") for word in words[1:] if word[0].isupper() or word[0] in "'\""]
        given = {
            name: self._value(
                parameters["properties"][name], [] if erring else numbers, [] if erring else names
            )
            for name in parameters.get("required", ())
            if name in parameters["properties"]
        }
        return write_call(ToolCall(function["name"], given))

    def _value(self, schema: dict[str, Any], numbers: list[int], names: list[str]) -> Any:
        """A value of a type: the next one that the question says, else any."""
        kind = schema.get("type")
        if schema.get("enum"):
            return schema["enum"][self._rng.integers(len(schema["enum"]))]
        if kind in ("integer", "number"):
            return numbers.pop(0) if numbers else int(self._rng.integers(1, 100))
        if kind == "boolean":
            return True
        if kind == "array":
            items = schema.get("items", {})
            return [self._value(items, numbers, names) for _ in range(max(len(numbers), 1))]
        if kind == "object":
            return {}
        return names.pop(0) if names else "any"


def _words(function: dict[str, Any]) -> set[str]:
    """The words of a function's name and description."""
    return set(
        f"{function['name']} {function['description']}".lower().replace("_", " ").replace(".", " ").split()
    )
