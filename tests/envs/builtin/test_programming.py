"""The programming environment: solutions, messages about wrong programs, and attempts to cheat."""

from __future__ import annotations

import json
from typing import Any

import pytest

from envs import registry
from envs.builtin import programming
from envs.builtin.programming import MAX_PROGRAM, Player, Programming
from envs.registry import EnvironmentUnknown
from envs.sandbox import sandbox
from envs.tools.python_tool import python, python_unsafe

pytestmark = pytest.mark.skipif(sandbox.refusal() is not None, reason=str(sandbox.refusal()))

WRONG = "The examples pass, but a hidden test fails."


def opened(name: str, **options: Any) -> tuple[Programming, str]:
    """An instance of one kind, for programs that are written for it."""
    env = Programming(instructions=False, **options)
    seed = next(seed for seed in range(1000) if env.reset(seed=seed)[0].startswith(f"{name}("))
    return env, env.reset(seed=seed)[0]


def table(env: Programming, otherwise: str) -> str:
    """A program of `at_least` that knows the examples and says the same of all else."""
    shown = {each[0]: env._task.expected(each) for each in env._examples}
    return f"def at_least(x):\n    if x in {shown}: return {shown}[x]\n    {otherwise}\n"


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_a_player_without_errors_solves_every_level(level: int) -> None:
    env = Programming(level=level)
    for seed in range(3):
        action = Player(0.0, seed).act(env.reset(seed=seed)[0])
        _, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated, truncated) == (1.0, True, False)
        assert info == {"success": True, "rewards": {"solved": 1.0, "tests": 1.0}}


def test_a_player_that_always_errs_writes_programs_that_solve_nothing() -> None:
    env = Programming(level=3, max_turns=1)
    for seed in range(4):
        _, reward, terminated, truncated, info = env.step(Player(1.0, seed).act(env.reset(seed=seed)[0]))
        assert (reward, terminated, truncated, info["success"]) == (0.0, False, True, False)
        assert "malformed" not in info


def test_what_is_shown_is_the_sentence_and_true_examples() -> None:
    _, observation = opened("at_least")
    sentence, *examples = observation.splitlines()
    k = int(sentence.removeprefix("at_least(x) returns x, but ").split()[0])
    assert sentence == f"at_least(x) returns x, but {k} where x is less."
    assert len(examples) == 3
    for example in examples:
        x, result = map(int, example.removeprefix("at_least(").split(") == "))
        assert result == max(x, k)
    assert Programming().reset(seed=0)[0].startswith("Write a Python function")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return 'a'", "{call} gave 'a', not {right}."),
        ("return 1 / 0", "{call} ended with ZeroDivisionError: division by zero, not {right}."),
        ("return x +", "{call} ended with SyntaxError: invalid syntax, not {right}."),
        ("raise SystemExit", "{call} ended with SystemExit, not {right}."),
        ("return 'x' * 1000", "{call} gave '" + "x" * 199 + "..., not {right}."),
        ("import os; os._exit(0)", "The program ended early."),
        ("while True: print('x' * 1000)", "The program printed too much."),
        ("while True: pass", "The program took too long."),
        ("return bytearray(1 << 40)", "{call} ended with MemoryError, not {right}."),
    ],
)
def test_what_was_wrong_is_said_of_the_first_example(body: str, says: str) -> None:
    env, observation = opened("at_least", cpu_seconds=1, max_turns=2)
    call, right = observation.splitlines()[1].split(" == ")
    said, *outcome = env.step(f"def at_least(x):\n    {body}\n")
    assert said == says.format(call=call, right=right)
    assert outcome == [0.0, False, False, {}]


CHEATS = {
    "says that all is well": "print('All tests passed.')\ndef at_least(x): return True",
    "ends as if all were well": "import sys\ndef at_least(x): return 1\nsys.exit(0)",
    "ends without a word": "import os\ndef at_least(x): os._exit(0)",
    "equals everything": """
class Any(int):
    def __eq__(self, other): return True
    def __hash__(self): return 0
    def __repr__(self): return "True"
def at_least(x): return Any()""",
    "replaces what writes results": """
import builtins, sys
scope = sys._getframe(1).f_globals
def at_least(x): return x
scope["ascii"] = builtins.ascii = lambda value: "True"
scope["say"] = lambda sign, text: scope["results"].write("=True\\n")""",
    "writes results itself, on every descriptor": """
import os
for descriptor in range(64):
    for guess in range(-30, 31):
        try: os.write(descriptor, f"={guess}\\n".encode())
        except OSError: break
def at_least(x): return x""",
    "looks for what is expected": """
import gc, sys
held = [each for each in gc.get_objects() if isinstance(each, dict) and "expected" in each]
held += [frame for frame in (sys._getframe(1),) if "expected" in frame.f_globals]
def at_least(x): return held[0]["expected"]""",
    "asks whoever drew the task": """
import sys
sys.path += ["/work", "/tmp", "."]
from envs.builtin.programming_functions import FUNCTIONS
def at_least(x): return FUNCTIONS""",
}


@pytest.mark.parametrize("cheat", CHEATS.values(), ids=CHEATS.keys())
def test_a_program_that_cheats_solves_nothing(cheat: str) -> None:
    env, _ = opened("at_least", max_turns=1)
    _, reward, terminated, truncated, info = env.step(cheat)
    assert (reward, terminated, truncated, info["rewards"]) == (
        0.0,
        False,
        True,
        {"solved": 0.0, "tests": 0.0},
    )


def test_a_table_of_the_examples_passes_them_alone() -> None:
    env, _ = opened("at_least", max_turns=2)
    said, reward, *_, info = env.step(table(env, "return None"))
    assert (said, reward, info) == (WRONG, 0.0, {})
    least = max(env._task.expected(each) for each in env._hidden)
    said, reward, _, truncated, info = env.step(table(env, f"return {least}"))
    passed = sum(env._task.expected(each) == least for each in env._hidden) / 8
    assert 0 < passed < 1 and truncated
    assert info == {"success": False, "rewards": {"solved": 0.0, "tests": passed}}


def test_of_hidden_inputs_nothing_is_ever_said() -> None:
    env, _ = opened("at_least", max_turns=4)
    for leak in (
        "raise ValueError(repr(x))",
        "return x * 1000",
        "print(x); return x",
        "import os; os._exit(x)",
    ):
        assert env.step(table(env, leak))[0] == WRONG
    env, _ = opened("at_least")
    told = env.step(
        "import sys\nseen = sys._getframe(1).f_globals['order']['inputs']\ndef at_least(x): raise ValueError(seen)"
    )[0]
    assert str([list(each) for each in env._examples]) in told


def test_what_is_expected_never_enters_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[dict[str, Any]] = []
    run = sandbox.run

    def recorded(source: str, stdin: str, *rest: Any) -> sandbox.SandboxResult:
        assert source == programming._HARNESS
        entered.append(json.loads(stdin))
        return run(source, stdin, *rest)

    monkeypatch.setattr(sandbox, "run", recorded)
    env, _ = opened("at_least")
    program = {"program": env._task.solution, "name": "at_least"}
    assert env.step(env._task.solution)[1] == 1.0
    assert entered == [
        program | {"inputs": [list(each) for each in kept]} for kept in (env._examples, env._hidden)
    ]


def test_a_block_is_taken_out_of_what_stands_around_it() -> None:
    for before in ("", "Let me see.\n```python\ndef f(): pass\n```\nNo:\n"):
        env, _ = opened("at_least")
        assert env.step(f"{before}```python\n{env._task.solution}```\n")[1] == 1.0


@pytest.mark.parametrize(
    "action",
    [
        "",
        "x",
        "return max(x, 3)",
        "def at_leastx(x): return x",
        "# def at_least(x): return x",
        "at_least = lambda x: x",
        "```python\nx = 1\n```",
        "at_least(x) returns x, but 3 where x is less.",
        "def at_least(x): return 1" + " " * MAX_PROGRAM,
    ],
)
def test_what_defines_no_such_function_is_malformed(action: str) -> None:
    env, _ = opened("at_least")
    _, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated) == (0.0, True, False)
    assert info == {"malformed": True, "success": False, "rewards": {"solved": 0.0, "tests": 0.0}}


def test_a_task_can_be_solved_after_a_wrong_program_and_from_a_snapshot() -> None:
    env, _ = opened("at_least", max_turns=2)
    assert env.step("def at_least(x): return 99")[2:4] == (False, False)
    other, _ = opened("at_least", max_turns=2)
    other.restore(env.snapshot())
    assert env.step(env._task.solution)[1:4] == (1.0, True, False)
    assert other.step("def at_least(x): return 99")[1:4] == (0.0, False, True)


def test_without_isolation_it_is_refused_when_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "find_isolation", lambda: (None, "user namespaces are switched off"))
    with pytest.raises(EnvironmentUnknown, match=r"switched off.*allow_unsafe=true") as refused:
        registry.make("programming")
    assert "\n" not in str(refused.value)
    with pytest.raises(RuntimeError, match="switched off"):
        python("print(1)")
    assert python_unsafe("print(1)") == "1\n"
    env = registry.make("programming", allow_unsafe=True)
    assert env.step(Player(0.0, 0).act(env.reset(seed=0)[0]))[1] == 1.0


@pytest.mark.parametrize(
    "options", [{"level": 0}, {"level": 5}, {"split": "x"}, {"max_turns": 0}, {"hidden": 1}]
)
def test_options_that_leave_nothing_to_do_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Programming(**options)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("print(6 * 7)", "42\n"),
        ("print(1)\nprint(1 / 0)", "1\nZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "It ended with exit status 3."),
        ("print('x' * 10000)", "x" * 4096 + "It was ended: it printed more than 4096 characters."),
        ("open('/etc/passwd')", "FileNotFoundError: [Errno 2] No such file or directory: '/etc/passwd'"),
    ],
)
def test_the_tool_says_what_was_printed_and_what_went_wrong(source: str, says: str) -> None:
    assert python(source) == says
