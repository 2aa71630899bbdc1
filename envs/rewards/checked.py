"""Rewards that another program checks: mathematics, a JSON schema, code in the sandbox; within [0, 1]."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema

from envs.rewards.answers import answer_in
from envs.sandbox.sandbox import ExitReason, SandboxFailed, SandboxLimits, refusal, run

_FENCED = re.compile(r"```[\w+-]*\n(.*?)```", re.DOTALL)


def mathematics(completion: str, truth: Any) -> float:
    """1 where the last formula or number equals the truth, as the package math-verify (extra `math`) compares them."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # Without time limits: they are signals, which only a main thread receives; the environment's own limit holds.
    gold = parse(_as_latex(str(truth)), parsing_timeout=None)
    if not gold:
        return 0.0
    forms = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    said = parse(answer_in(completion), extraction_config=forms, parsing_timeout=None)
    return float(bool(said) and verify(gold, said, timeout_seconds=None))


def json_schema(completion: str, truth: Any, *, schema: dict[str, Any] | None = None) -> float:
    """1 where the answer, or its last fenced block, is JSON that fits a schema: the option's, else the row's own."""
    try:
        held = json.loads(_last_block(answer_in(completion)))
    except json.JSONDecodeError:
        return 0.0
    asked = schema if schema is not None else json.loads(truth) if isinstance(truth, str) else truth
    return float(jsonschema.validators.validator_for(asked)(asked).is_valid(held))


def code(completion: str, truth: Any, *, seconds: float = 10.0, memory_mib: int = 256) -> float:
    """The share of tests that the last fenced block of Python passes, each in a sandbox of its own.

    The truth is a list of tests, or one: lines of Python that are run behind the block (`assert f(2) == 4`), or
    {"input": ..., "output": ...} of a program that reads and writes.
    """
    tests = json.loads(truth) if isinstance(truth, str) and truth.lstrip().startswith(("[", "{")) else truth
    if isinstance(tests, dict) and isinstance(
        tests.get("inputs"), list
    ):  # as APPS and verl's code datasets store them
        tests = [{"input": i, "output": o} for i, o in zip(tests["inputs"], tests["outputs"], strict=True)]
    tests = tests if isinstance(tests, list) else [tests]
    limits = SandboxLimits(
        cpu_seconds=max(1, round(seconds)), wall_seconds=seconds, memory_bytes=memory_mib << 20
    )
    program = _last_block(completion)
    return sum(_passes(program, test, limits) for test in tests) / len(tests) if tests else 0.0


def _passes(program: str, test: Any, limits: SandboxLimits) -> bool:
    typed = isinstance(test, dict)
    result = run(program if typed else f"{program}\n\n{test}\n", str(test["input"]) if typed else "", limits)
    if result.reason is ExitReason.REFUSED:
        raise SandboxFailed(refusal() or "no isolation")
    if result.reason is not ExitReason.OK:
        return False
    return not typed or result.stdout.split() == str(test["output"]).split()


def _last_block(text: str) -> str:
    """The last fenced block; the whole text where there is none."""
    blocks = _FENCED.findall(text)
    return str(blocks[-1] if blocks else text).strip()


def _as_latex(truth: str) -> str:
    """A formula without delimiters, as tables hold it, with them."""
    return truth if "$" in truth or "\\boxed" in truth else f"${truth}$"
