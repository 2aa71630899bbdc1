"""The reference pages are what the code says, and they say everything."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from random import Random

import pytest
import torch
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from deploy.assembly.build import load_tokenizer
from deploy.cli import app
from deploy.commands.reference import stale_pages
from deploy.config.config import RunConfig
from deploy.config.config_errors import option_names
from deploy.config.declared_metrics import METRICS
from deploy.config.load import load_config
from deploy.report.metrics import read_metrics, stage_folder
from learner.algorithm.preferences import DpoLoss, Pairs, bradley_terry
from learner.stage_metrics import STAGES
from rollout.engines.engine import Engine
from rollout.engines.scripted_engine import ScriptedEngine
from tests.deploy.command import Manta, command
from tests.deploy.small_run import configured, train, with_experts

FOLDER = Path(__file__).parents[3] / "docs" / "reference"
# An environment that names a reward and a cost, and a tool: what neither a plain run nor a critic's writes.
MODULE = """
from envs.base import TextEnv


class Sums(TextEnv):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "2 + 2?", {}

    def step(self, action):
        right = float("4" in action)
        said = {"success": bool(right), "rewards": {"goal": right}, "costs": {"letters": float(len(action))}}
        return "", right, True, False, said


def double(number: int) -> int:
    \"\"\"Twice a number.\"\"\"
    return 2 * number
"""
CRITIC = (
    "learner.algorithm={advantage={kind='gae'}, critic={kind='own'}, proximal='learner', corrections=[{kind='tis'}], "
    "kl={coefficient=0.1}, skip_zero_advantage=false}"
)


@pytest.fixture
def manta() -> TyperGroup:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return group


def _page(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def test_the_pages_are_current(manta: TyperGroup) -> None:
    assert stale_pages(manta, FOLDER) == [], "run manta docs"


def test_pages_are_written_and_a_stale_one_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run: Manta = command(monkeypatch, capsys)
    code, out, err = run("docs", "--check", str(tmp_path / "reference"))
    assert (code, out) == (1, "") and "metrics.md" in err and err.count("\n") == 1
    assert run("docs", str(tmp_path / "reference"))[0] == 0
    assert run("docs", "--check", str(tmp_path / "reference")) == (0, "", "")
    (tmp_path / "reference" / "metrics.md").write_text("# Metrics\n", encoding="utf-8")
    code, _, err = run("docs", "--check", str(tmp_path / "reference"))
    assert code == 1 and "metrics.md" in err and "configuration.md" not in err


def _described() -> dict[str, list[str]]:
    """The cells of every option's row, by its dotted name, as a reader finds them: under the heading of its section."""
    section, found = "", {}
    for line in _page("configuration.md").splitlines():
        if heading := re.match(r"#+ (?:`([\w.]+)`|Top level)", line):
            section = heading[1] or ""
        elif row := re.match(r"\| \[?`(\w+)`", line):
            found[f"{section}.{row[1]}".lstrip(".")] = [each.strip() for each in line.split("|")[2:-1]]
        elif same := re.match(r"The options of \[`([\w.]+)`\]", line):
            inner = {name: cells for name, cells in found.items() if name.startswith(f"{same[1]}.")}
            found |= {f"{section}{name.removeprefix(same[1])}": cells for name, cells in inner.items()}
    return found


def test_every_option_has_a_row_under_its_section_with_a_description() -> None:
    described, names = _described(), set(option_names(RunConfig))
    assert set(described) <= names
    assert all(name.endswith(".kind") for name in names - set(described))  # a heading says which
    assert [name for name, (*_, about) in described.items() if len(about) < 12] == []


def test_the_defaults_of_the_page_are_those_of_a_recipe_that_says_nothing() -> None:
    bare = RunConfig.model_validate({"steps": 1, "env": {"id": "frozen_lake"}})
    described = _described()
    assert described["steps"][1] == described["env.id"][1] == "*required*"
    for name in (
        "seed",
        "buffer.max_lag",
        "rollout.group_size",
        "learner.optim.betas",
        "supervision.max_restarts",
        "agent.memory",
    ):
        value = bare
        for part in name.split("."):
            value = getattr(value, part)
        shown = described[name][1].strip("`")
        assert tomllib.loads(f"x = {shown}")["x"] == (list(value) if isinstance(value, tuple) else value)
    assert described["learner.model.lora"][1] == "not set"
    assert described["learner.algorithm.loss"][1] == "kind `ppo`"
    assert described["buffer.max_lag"][0] == "integer ≥ 0, weight versions"
    assert described["sampling.top_p"][0] == "number in (0, 1]"
    assert described["cluster.step_timeout_seconds"][0] == "number > 0, s"


def test_every_command_and_option_of_the_help_is_in_the_page(manta: TyperGroup) -> None:
    page = _page("cli.md")
    for name in manta.commands:
        section = page.partition(f"\n## manta {name}\n")[2].partition("\n## ")[0]
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        flags = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown)) - {"--help"}
        assert section and {flag for flag in flags if flag not in section} == set(), name


async def _talker(config: RunConfig, name: str, path: str) -> Engine:
    def say(prompt: str, rng: Random) -> str:
        return rng.choice(("double(2)", "4", "5"))

    return ScriptedEngine(load_tokenizer(path), say, name=name, record=False)


def test_every_metric_that_a_run_writes_is_in_the_page_and_every_one_of_the_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sums.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with_critic = configured(
        "evaluation={tasks=2, every_steps=2}",
        "buffer.max_lag=1",
        "buffer.reuse={groups=1, max_lag=3}",
        CRITIC,
    )
    small = (
        "steps=2",
        "evaluation.tasks=0",
        "rollout.group_size=4",
        "buffer.groups_per_step=2",
        "tiny.layers=1",
    )
    with_tools = load_config(
        "scratch",
        [
            *small,
            "env=",
            "envs=[{name='own', id='sums:Sums', host={where='inline'}}, {name='other', id='arithmetic', agent={}}]",
            "agent={parts=[{kind='tools', functions=['sums:double'], style='plain'}]}",
            "learner.algorithm.constraints=[{name='letters', limit=1.0, update={kind='dual', rate=0.1}}]",
            "rollout.context_tokens=400",
            "sampling.max_tokens=20",
        ],
    )
    train(with_critic, tmp_path / "critic")
    train(with_tools, tmp_path / "tools", _talker)
    taught = f"learner.algorithm.distill={{teacher={str(tmp_path / 'critic')!r}}}"
    shared = ("cluster.colocate=turns", "engine.kind=transformers")
    train(configured("steps=1", "evaluation.tasks=0", taught, *shared), tmp_path / "taught")
    of_turns = ("advantage={kind='turns'}", "critic={kind='turns'}")
    turns = [f"learner.algorithm.{section}" for section in of_turns]
    train(configured("steps=1", "evaluation.tasks=0", *turns), tmp_path / "turns")
    routed = ("tiny=", f"learner.model.path={with_experts(tmp_path)}", "learner.model.router_balance=0.1")
    train(
        configured("steps=1", "evaluation.tasks=0", "learner.model.dtype=float32", *routed),
        tmp_path / "routed",
    )
    runs = ("critic", "tools", "taught", "turns", "routed")
    written = {name for run in runs for row in read_metrics(tmp_path / run) for name in row}
    page = _page("metrics.md")
    declared = {metric.name: metric for metric in METRICS}
    assert len(declared) == len(METRICS)
    assert all(f"| `{name}` |" in page for name in declared)
    assert {name for name in written if not any(metric.covers(name) for metric in METRICS)} == set()
    missing = {name for name, metric in declared.items() if not any(map(metric.covers, written))}
    assert missing == {"workers"}  # of a run on Ray: tests/deploy/cluster/test_ring_ranks.py


def test_the_metrics_of_stages_are_those_of_the_page(tmp_path: Path) -> None:
    of_kind = {
        kind: {each.name for each in STAGES.metrics if f"`{kind}`" in each.when}
        for kind in ("preference", "kto", "reward_model", "ilql")
    }
    said, *others = STAGES.metrics
    assert {each.name for each in others} == set().union(*of_kind.values())
    played = "source={kind='player', episodes=4}"
    stages = f"stages=[{{kind='sft', {played}}}, {{kind='ilql', {played}}}, {{kind='kto', {played}}}]"
    train(configured("steps=0", "evaluation.tasks=0", stages), tmp_path / "run")
    sft, ilql, judged = (
        {name for row in read_metrics(stage_folder(tmp_path / "run", index)) for name in row}
        for index in (0, 1, 2)
    )
    assert sft - {said.name} == set(re.findall(r"`(\w+)`", STAGES.about)) - {"sft", *of_kind}
    assert said.name in sft and ilql - sft == of_kind["ilql"]
    assert "reference_point" in judged and judged - sft <= of_kind["kto"]
    compared = {*bradley_terry(*[torch.ones(1)] * 3)[1]}
    assert of_kind["reward_model"] == compared | {"heldout_accuracy", "heldout_loss", "head_grad_norm"}
    assert of_kind["preference"] == {*DpoLoss()(Pairs(*[torch.ones(1)] * 6))[1]}
    assert all(f"| `{each.name}` |" in _page("metrics.md") for each in STAGES.metrics)
