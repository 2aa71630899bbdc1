"""Output of `manta envs` and `manta check-env`: the available environments, and the check of one."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from deploy.report.console import Cell, Console, busy, write, write_table
from envs import registry
from envs.adapters import RandomPlayer
from envs.checks.check import check
from envs.checks.findings import Issue
from envs.registry import EnvironmentUnknown
from rollout.external import external_env as foreign
from rollout.external.external_env import PROGRAM

SHOWN_CHARACTERS = 2000  # of a prompt and of an action


def show_environments(console: Console) -> None:
    """List Manta's environments, the suites with their extras and ids, and Gymnasium's with a text form."""
    ours: list[tuple[Cell, ...]] = []
    for env_id in registry.registered():
        try:
            told = registry.describe(env_id)
        except EnvironmentUnknown as error:  # one of its packages is missing
            ours.append((env_id, (str(error), "yellow"), "", ""))
        else:
            ours.append((env_id, told.about, told.levels, "yes" if told.has_player else ""))
    ours.append((PROGRAM, (inspect.getdoc(foreign) or "").partition("\n")[0], "", ""))
    write_table(console, ("environment", "about", "levels", "player"), ours)
    _show_suites(console)
    known, fit = newest_of_gymnasium(), gymnasium_ids()
    write(
        console,
        f"Any gymnasium.make id with a text form works; here {len(fit)} of {len(known)} "
        f"(others need further packages, or show pictures): {', '.join(fit)}",
        wrap=True,
    )


def _show_suites(console: Console) -> None:
    """List each suite's extra, and the ids of installed ones, which imports them."""
    suites: list[tuple[Cell, ...]] = []
    listed: list[str] = []
    for suite in registry.SUITES:
        found = suite.command
        if suite.installed:
            try:
                ids = registry.suite_ids(suite)
            except EnvironmentUnknown as error:  # a package of its is missing
                found = str(error)
            else:
                found = f"yes, {len(ids)}"
                listed.append(f"{suite.about}: {', '.join(ids)}")
        suites.append((suite.about, f"{suite.prefix}...", suite.extra, found))
    write_table(console, ("suite", "ids", "extra", "here"), suites)
    for line in listed:
        write(console, f"{line}\n", wrap=True)


def newest_of_gymnasium() -> list[str]:
    """The registered Gymnasium ids, each in its newest version."""
    newest: dict[tuple[str | None, str], EnvSpec] = {}
    for spec in gym.registry.values():
        key = (spec.namespace, spec.name)
        if key not in newest or (spec.version or 0) > (newest[key].version or 0):
            newest[key] = spec
    return sorted(spec.id for spec in newest.values())


def gymnasium_ids() -> list[str]:
    """The newest Gymnasium ids that can be made here and have a text form."""
    fit = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for env_id in newest_of_gymnasium():
            try:
                registry.make(env_id).close()
            except EnvironmentUnknown:
                continue
            fit.append(env_id)
    return fit


def check_environment(
    env_id: str, options: dict[str, Any], seconds: float, turns: int, console: Console
) -> int:
    """Check an environment and print the findings; returns the exit status, 1 if there are any.

    EnvironmentUnknown for a wrong id or option.
    """
    if env_id == PROGRAM:
        raise EnvironmentUnknown(
            f"environment {PROGRAM} is an agent of your own, which only a run can check; see docs/foreign_agents.md"
        )
    with busy(console, f"checking {env_id}"):
        findings = check(env_id, options, seconds=seconds, turns=turns)
    show_findings(env_id, findings, console)
    if not findings:
        show_first_turn(env_id, options, console)
    return int(bool(findings))


def show_first_turn(env_id: str, options: dict[str, Any], console: Console) -> None:
    """Print the first prompt of a sound environment and an example action."""
    env = registry.make(env_id, **options)
    try:
        observation, _ = env.reset(seed=0)
        player = registry.player(env_id)(0.0, 0) if registry.has_player(env_id) else RandomPlayer(env, 0)
        action = player.act(observation)
    finally:
        env.close()
    said = observation if isinstance(observation, str) else json.dumps(observation, ensure_ascii=False)
    write(console, f"first prompt (seed 0):\n{_shortened(said)}\nexample action:\n{_shortened(action)}")


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters)"


def show_findings(env_id: str, findings: Sequence[Issue], console: Console) -> None:
    """Print one row for each issue, or one line without any."""
    if not findings:
        write(console, f"{env_id}: sound", "green")
        return
    rows = [((finding.kind, "red"), finding.what, finding.where, finding.advice) for finding in findings]
    write_table(console, ("found", "what", "where", "what to do"), rows)
    write(console, f"{env_id}: {len(findings)} problem{'s' * (len(findings) != 1)} found", "red")
