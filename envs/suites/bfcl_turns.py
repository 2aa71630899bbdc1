"""Multi-turn tasks of the Berkeley Function Calling Leaderboard, with its own functions, states and checker.

Observation: the messages of the first user turn, with the functions as tools; after calls a message of role "tool" for
each, with the package's result; after an answer without calls the next user turn.
Action: calls in the form of envs/tools/tool_calls.py, hermes style; an answer without any ends the turn.
Reward: at the end, 1 if the package's checker accepts the calls of all turns: the states of its systems are those
of the right calls after each turn, and their results are among the results. Else 0. Horizon: 20 answers a turn.
Levels: none; each id is a category.
Ends: the last turn is over (terminated), a turn of more answers (truncated).

The package evaluates a call as Python text. Only the functions of the task are called here, with arguments that they
declare, written as literals; any other call gets an error and is not passed on.
"""

from __future__ import annotations

import importlib
import itertools
from copy import deepcopy
from functools import lru_cache
from typing import Any

from envs.base import Info, Message, Observation, Split, TalkSpace, TextEnv, check_options, text_space
from envs.suites.bfcl_calls import PREFIX, Task, category_of, data_folder, lines_of, tasks_of, tools_of
from envs.suites.rng_isolation import IsolatedRng
from envs.tools.tool_calls import MalformedCall, ToolCall, parse_calls, spoken

CATEGORIES = ("multi_turn_base", "multi_turn_miss_param", "multi_turn_long_context")
IDS = tuple(f"{PREFIX}{category}" for category in CATEGORIES)
MAX_ANSWER = 1 << 14  # characters
MAX_ANSWERS = 20  # of a turn, as in the package
_replicas = itertools.count()


class BfclTurns(TextEnv):
    """The environment.

    env_id: "bfcl/" and a multi-turn category. split: "train" and "heldout" divide the tasks by their text, regardless
    of the seed. ValueError for other values.
    """

    action_space = text_space(MAX_ANSWER)
    observation_space = TalkSpace()

    def __init__(self, env_id: str, split: Split = "all") -> None:
        check_options(1, (1,), split, None)
        self._category = category_of(env_id, CATEGORIES)
        self._tasks = tasks_of(self._category, split)
        self._utils = importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils")
        self._checker = importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker")
        # The package keeps the systems of a task in globals, under this name: each replica needs its own.
        self._name = f"manta_{next(_replicas)}_"
        self._generators = IsolatedRng()
        self._task: Task = {}
        self._functions: dict[str, set[str]] = {}
        self._calls: list[list[list[str]]] = []  # by turn and answer, as the package's checker takes them

    @classmethod
    def count_tasks(cls, env_id: str, split: Split = "all") -> int:
        """The number of tasks: the seed modulo it says which."""
        return len(tasks_of(category_of(env_id, CATEGORIES), split))

    def reset(  # type: ignore[override]  # observations are messages
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        super().reset(seed=seed)
        self._forget()
        drawn = int(self.np_random.integers(len(self._tasks))) if seed is None else seed
        self._task = self._tasks[drawn % len(self._tasks)]
        self._generators.seed(0)
        documents = [each for name in self._task["involved_classes"] for each in _documents(name)]
        self._functions = {each["name"]: set(each["parameters"]["properties"]) for each in documents}
        self._calls = [[]]
        first, *others = self._messages()
        return [first | {"tools": tools_of(documents)}, *others], {"task": self._task["id"]}

    def step(  # type: ignore[override]  # observations are messages
        self, action: str
    ) -> tuple[Observation, float, bool, bool, Info]:
        if not self._calls:
            raise RuntimeError("step() was called without a running episode; call reset() first")
        _, calls = parse_calls(spoken(action))
        if calls:
            results = [self._result(call) for call in calls]
            if len(self._calls[-1]) < MAX_ANSWERS:
                return results, 0.0, False, False, {}
            return self._end(results, 0.0, truncated=True)
        if len(self._calls) < len(self._task["question"]):
            self._calls.append([])
            return self._messages(), 0.0, False, False, {}
        return self._end("", float(self._is_right()), truncated=False)

    def close(self) -> None:
        self._forget()

    @property
    def right_calls(self) -> list[list[str]]:
        """The package's right calls of each turn, as Python text."""
        return deepcopy(self._task["ground_truth"])

    def _messages(self) -> list[Message]:
        return deepcopy(self._task["question"][len(self._calls) - 1])

    def _result(self, call: ToolCall | MalformedCall) -> Message:
        """Execute a call; the message with its result."""
        written = self._written(call)
        if written is None:
            name = call.name if isinstance(call, ToolCall) and call.name in self._functions else ""
            content = (
                f"Error: that is no call of a function with its own arguments: {', '.join(self._functions)}"
            )
            self._calls[-1].append([])
        else:
            name = written.partition("(")[0]
            content = self._executed([written])
            self._calls[-1].append([written])
        return {"role": "tool", "name": name, "content": content}

    def _written(self, call: ToolCall | MalformedCall) -> str | None:
        """A call as Python text whose arguments are literals; None unless function and arguments are the task's."""
        if isinstance(call, MalformedCall) or not set(call.arguments) <= self._functions.get(
            call.name, set()
        ):
            return None
        if call.name not in self._functions:
            return None
        return f"{call.name}({','.join(f'{key}={value!r}' for key, value in call.arguments.items())})"

    def _executed(self, calls: list[str]) -> str:
        with self._generators.entered():
            results, _ = self._utils.execute_multi_turn_func_call(
                calls,
                self._task["initial_config"],
                self._task["involved_classes"],
                self._name,
                self._task["id"],
                long_context="long_context" in self._category,
            )
        return "\n".join(map(str, results))

    def _is_right(self) -> bool:
        made = [[each for each in turn if each] for turn in self._calls]
        with self._generators.entered():
            verdict = self._checker.multi_turn_checker(
                made, self._task["ground_truth"], deepcopy(self._task), self._category, self._name
            )
        return bool(verdict["valid"])

    def _end(
        self, observation: Observation, reward: float, truncated: bool
    ) -> tuple[Observation, float, bool, bool, Info]:
        self._forget()
        self._calls = []
        return observation, reward, not truncated, truncated, {"success": reward == 1.0}

    def _forget(self) -> None:
        """Drop the systems of the last episode from the package's globals."""
        kept = vars(self._utils)
        for name in [each for each in kept if each.startswith(self._name)]:
            del kept[name]


@lru_cache(maxsize=16)
def _documents(class_name: str) -> tuple[dict[str, Any], ...]:
    """The documents of a system's functions."""
    config = importlib.import_module("bfcl_eval.constants.executable_backend_config")
    return tuple(
        lines_of(data_folder() / "multi_turn_func_doc" / config.MULTI_TURN_FUNC_DOC_FILE_MAPPING[class_name])
    )
