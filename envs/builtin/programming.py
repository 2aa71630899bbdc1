"""Programming: write a Python function, which is judged by hidden tests.

Observation: the first one says what the function returns and shows examples, as

    times(x) returns x times 7.
    times(3) == 21

later ones say what was wrong with the program: the first failed example and how it failed, or the last line of the
error. Hidden tests are never revealed, only that one failed; messages about examples come from a run without them.
Action: the whole program as text, or in a ```python block (the last if there are several); it must define the function.
Reward: 1 when the examples and all hidden tests pass, else 0. In `info["rewards"]`, "solved" is the reward, and "tests"
the share of hidden tests that the last program passed. Horizon: `max_turns` programs.
Levels: 1 one line; 2 loops and text; 3 small algorithms; 4 compositions of several steps.
Ends: solved (terminated), programs used up (truncated), no program or one longer than 4,000 characters (malformed).

Programs run in a sandbox (envs.sandbox.sandbox), which gets the tests' inputs but not the expected results: it returns
results as text, which are compared outside. So the only way to pass is to be right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.base import Info, Split, TextEnv, check_options, text_space
from envs.builtin.programming_compositions import COMPOSITIONS
from envs.builtin.programming_functions import FUNCTIONS
from envs.builtin.programming_tasks import Arguments, ProgrammingTask, draw_inputs, draw_task
from envs.sandbox import sandbox
from envs.sandbox.sandbox import ExitReason, SandboxLimits, SandboxResult

FAMILIES = (*FUNCTIONS, *COMPOSITIONS)
LEVELS = 4
MAX_PROGRAM = 4000  # characters
SHOWN = 200  # characters of a result or error in an observation

_INSTRUCTIONS = (
    "Write a Python function that does what is asked, not for the examples alone: it will be called with other values "
    "too. Answer with the whole program and nothing else.\n"
)
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_CUT = {
    ExitReason.TIMED_OUT: "took too long",
    ExitReason.MEMORY: "used too much memory",
    ExitReason.OUTPUT: "printed too much",
}

# Runs in the sandbox. Prints one line per call: "=" and the result, or "!" and the error. The program's own output
# goes to standard error, which is ignored.
_HARNESS = """
import json, os, sys, traceback
order = json.load(sys.stdin)
results = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
def say(sign, text):
    results.write(sign + text + "\\n")
    results.flush()
def told(error):
    return ascii(traceback.format_exception_only(error)[-1].strip())[1:-1]
scope = {"__name__": "program"}
try:
    exec(compile(order["program"], "program.py", "exec"), scope)
    for arguments in order["inputs"]:
        try:
            say("=", ascii(scope[order["name"]](*arguments)))
        except BaseException as error:
            say("!", told(error))
except BaseException as error:
    say("!", told(error))
"""


class Programming(TextEnv):
    """The environment.

    level: 1 to 4, see above. split: "train" and "heldout" divide the tasks by their text, parameters included.
    instructions: begin with the rules in English. max_turns: programs before truncation. examples, hidden: numbers of
    visible and hidden tests. cpu_seconds: CPU time per run of a program. allow_unsafe: run programs with limits alone
    only if no isolation is available; without it, that is a ValueError. A step takes tenths of a second.
    """

    action_space = text_space(MAX_PROGRAM)

    def __init__(
        self,
        level: int = 1,
        split: Split = "all",
        instructions: bool = True,
        max_turns: int = 3,
        examples: int = 3,
        hidden: int = 8,
        cpu_seconds: int = 2,
        allow_unsafe: bool = False,
    ) -> None:
        check_options(level, range(1, LEVELS + 1), split, max_turns=None)
        for name, value, least in (
            ("max_turns", max_turns, 1),
            ("examples", examples, 1),
            ("hidden", hidden, 2),
        ):
            if value < least:
                raise ValueError(f"{name}={value} is too few; use {least} or more")
        if not allow_unsafe and (refusal := sandbox.refusal()) is not None:
            raise ValueError(refusal)
        self._limits = SandboxLimits(
            cpu_seconds=cpu_seconds, wall_seconds=10.0 + 5 * cpu_seconds, processes=2
        )
        self._allow_unsafe = allow_unsafe
        self._families = [family for family in FAMILIES if family.level == level]
        self._split = split
        self._opening = _INSTRUCTIONS if instructions else ""
        self._max_turns = max_turns
        self._counts = (examples, hidden)
        self._task: ProgrammingTask | None = None
        self._examples: list[Arguments] = []
        self._hidden: list[Arguments] = []
        self._turns = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        self._task = draw_task(self._families, self._split, self.np_random)
        self._examples, self._hidden = draw_inputs(self._task, *self._counts, self.np_random)
        self._turns = 0
        lines = [f"{self._task.signature} returns {self._task.says}."]
        lines += [f"{_called(self._task, each)} == {self._task.expected(each)!a}" for each in self._examples]
        return self._opening + "\n".join(lines), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if self._task is None:
            raise RuntimeError("step() was called before reset()")
        program = program_in(action, self._task.name)
        if program is None:
            return (
                f"That defines no {self._task.name}.",
                0.0,
                True,
                False,
                {"malformed": True} | _verdict(0, 0.0),
            )
        self._turns += 1
        wrong, passed = self._judge(self._task, program)
        if wrong is None:
            return "All tests passed.", 1.0, True, False, _verdict(1, 1.0)
        if self._turns >= self._max_turns:
            return wrong, 0.0, False, True, _verdict(0, passed)
        return wrong, 0.0, False, False, {}

    def snapshot(self) -> bytes:
        return str(self._turns).encode()

    def restore(self, snapshot: bytes) -> None:
        self._turns = int(snapshot)

    def _judge(self, task: ProgrammingTask, program: str) -> tuple[str | None, float]:
        """What is wrong with a program (None if nothing), and the share of hidden tests that it passes."""
        lines, result = self._run(task, program, self._examples)
        for index, arguments in enumerate(self._examples):
            expected = ascii(task.expected(arguments))
            if index >= len(lines):
                return f"The program {_CUT.get(result.reason, 'ended early')}.", 0.0
            if lines[index] != f"={expected}":
                gave = ("gave " if lines[index].startswith("=") else "ended with ") + _shown(lines[index][1:])
                return f"{_called(task, arguments)} {gave}, not {expected}.", 0.0
        lines, _ = self._run(task, program, self._hidden)
        right = [f"={task.expected(arguments)!a}" for arguments in self._hidden]
        passed = sum(line == each for line, each in zip(lines, right, strict=False)) / len(right)
        return None if passed == 1 else "The examples pass, but a hidden test fails.", passed

    def _run(
        self, task: ProgrammingTask, program: str, inputs: Sequence[Arguments]
    ) -> tuple[list[str], SandboxResult]:
        """The harness's output lines, one per input that was reached, and how the run ended."""
        order = json.dumps({"program": program, "name": task.name, "inputs": inputs})
        result = sandbox.run(_HARNESS, order, self._limits, self._allow_unsafe)
        if result.reason is ExitReason.REFUSED:
            raise RuntimeError(result.stderr)
        return result.stdout.split("\n")[:-1], result


class Player:
    """Writes the task's solution; with probability `error_rate` a trivial guess. One per episode."""

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)
        self._task: ProgrammingTask | None = None

    def act(self, observation: str) -> str:
        """The next program; the first observation contains the task."""
        for name, says in re.findall(r"^(\w+)\(.*\) returns (.*)\.$", observation, re.MULTILINE):
            self._task = next(family for family in FAMILIES if family.name == name).recognized(says)
        if self._task is None:
            raise ValueError("the first observation contains no task")
        if self._rng.random() >= self._error_rate:
            return self._task.solution
        guesses = (*self._task.family.takes, "0", "1", "True", "False", '""', "[]")
        return f"def {self._task.signature}:\n    return {guesses[self._rng.integers(len(guesses))]}\n"


def program_in(action: str, name: str) -> str | None:
    """The program in an action; None if there is none that defines `name`."""
    program = blocks[-1] if (blocks := _BLOCK.findall(action)) else action
    defines = re.search(rf"^def {name}[ \t]*\(", program, re.MULTILINE) is not None
    return program if defines and len(action) <= MAX_PROGRAM else None


def _called(task: ProgrammingTask, arguments: Arguments) -> str:
    return f"{task.name}({', '.join(map(ascii, arguments))})"


def _shown(text: str) -> str:
    printable = "".join(
        character if character.isprintable() and character.isascii() else "?" for character in text
    )
    return printable if len(printable) <= SHOWN else printable[:SHOWN] + "..."


def _verdict(solved: int, tests: float) -> Info:
    return {"success": bool(solved), "rewards": {"solved": float(solved), "tests": tests}}
