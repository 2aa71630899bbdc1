"""Two policies learn in one run, and a run that was stopped goes on to the same bits of both."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from deploy.config import run_folder
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.load import load_config
from deploy.config.policies import configurations, of_policy, opponents_of
from deploy.report.metrics import read_metrics
from deploy.run.drive import Drive, run
from deploy.run.finished import told_finished
from deploy.run.local import LocalRuntime
from deploy.run.several import Line, train_several
from learner.training.checkpoint import versions
from rollout.buffer.segments import read_rows
from rollout.wire.kept_versions import KeptVersions
from tests.deploy.small_run import Stopped, _stop, ledger, parameters, same_bits, trained_rows

PAGE = Path(__file__).resolve().parents[3] / "docs" / "leagues.md"
POLICIES = ("keeper", "opener")
SMALL = (
    "steps=6", "tiny.layers=1", "tiny.width=32", "tiny.mlp=64", "stages.0.source.episodes=192",
    "checkpoint.every_steps=2",
    "evaluation.tasks=8", "rollout.group_size=4", "rollout.concurrent_groups=4", "buffer.groups_per_step=6",
    "league.every_versions=1", "league.keep=3", "league.latest_share=0.25",
)  # fmt: skip
TWO = (
    'policies.keeper={share=1, env={options={seat="keeper"}}, learner={optim={learning_rate=5e-4}}}',
    'policies.opener={share=2, env={options={seat="opener"}}}',
)


def configured(*overrides: str) -> RunConfig:
    return load_config("locks", [*SMALL, *overrides])


def trained(
    config: RunConfig, folder: Path, resume: bool = False, stop: tuple[str, int] | None = None
) -> dict[str, Any]:
    """The run of several policies; stop: the driver of one is interrupted in the wait for the step after so many."""
    if not resume:
        run_folder.create(config, folder)
    torch.set_num_threads(1)

    def make_ring(own: RunConfig, *given: Any, **named: Any) -> LocalRuntime:
        ring = LocalRuntime(own, *given, **named)
        if stop is not None and own.policy == stop[0]:
            _stop(ring, stop[1])
        return ring

    console = Console(file=io.StringIO())
    return asyncio.run(train_several(config, folder, console, resume, make_ring=make_ring))


def folders(run: Path) -> list[Path]:
    return [run_folder.of_policy(run, name) for name in POLICIES]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "run"
    trained(configured(*TWO), folder)
    return folder


def test_rows_and_ledger_tell_policies_and_versions_apart(uninterrupted: Path) -> None:
    for name, folder, groups in zip(POLICIES, folders(uninterrupted), (2, 4), strict=True):
        (other,) = set(POLICIES) - {name}
        met = ledger(folder, "SELECT policy, opponent, opponent_version, issue_version, state FROM groups")
        assert len(met) == 6 * groups, "the shares divide the groups of a step"
        assert {(policy, opponent, state) for policy, opponent, *_, state in met} == {
            (name, other, "trained")
        }
        assert all(opponent_version <= issued for *_, opponent_version, issued, _ in met)
        assert len({version for _, _, version, *_ in met}) >= 3, "past versions are met"
        rows = trained_rows(folder)
        assert {row["policy"] for row in rows} == {name} and {row["opponent"] for row in rows} == {other}
        of_groups = {row["group_id"]: row["opponent_version"] for row in rows}
        stored = ledger(folder, "SELECT group_id, opponent_version FROM groups")
        assert of_groups == dict(stored)
        seats = {"keeper" if row["observation"].count("keeper") else "opener" for row in rows}
        assert seats == {name}, "only the policy's own turns are rows"
        assert all(set(row["versions"]) == {row["issue_version"]} for row in rows), (
            "no lag, no other's tokens"
        )
        evaluated = read_rows(folder / "evaluations" / "after").to_pylist()
        assert {(row["policy"], row["opponent"]) for row in evaluated} == {(name, None)}


def test_each_policy_has_its_own_learner_versions_and_metrics(uninterrupted: Path) -> None:
    bits = [parameters(folder) for folder in folders(uninterrupted)]
    assert any((bits[0][name] != bits[1][name]).any() for name in bits[0])
    rates = []
    for name, folder in zip(POLICIES, folders(uninterrupted), strict=True):
        rows = read_metrics(folder)
        assert [row["step"] for row in rows] == list(range(1, 7))
        rates.append(rows[-1]["learning_rate"])
        kept = KeptVersions(folder / "versions")
        assert {0, 4, 5, 6} <= set(kept.versions)
        assert {kept.open(version).manifest.policy for version in kept.versions} == {name}
        assert versions(folder) == [4, 6]
    assert rates == [5e-4, 1e-3]
    summary = json.loads((uninterrupted / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["policies"]) == set(POLICIES) and summary["steps"] == 6
    said = io.StringIO()
    assert told_finished(configured(*TWO), uninterrupted, Console(file=said, width=500))
    assert all(str(folder / "report.html") in said.getvalue() for folder in folders(uninterrupted))


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param([("opener", 1)], id="before the first checkpoint of a step"),
        pytest.param([("keeper", 3), ("opener", 1)], id="twice, and by either policy"),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    stops: Sequence[tuple[str, int]], uninterrupted: Path, tmp_path: Path
) -> None:
    config, folder = configured(*TWO), tmp_path / "run"
    for number, stop in enumerate(stops):
        with pytest.raises(Stopped):
            trained(config, folder, resume=number > 0, stop=stop)
    trained(config, folder, resume=True)
    assert_same(uninterrupted, folder)


def test_a_run_that_died_between_the_checkpoints_of_two_policies_goes_back_to_what_both_have(
    uninterrupted: Path, tmp_path: Path
) -> None:
    config, folder = configured(*TWO), tmp_path / "run"
    with pytest.raises(Stopped):
        trained(config, folder, stop=("keeper", 5))
    ahead, behind = folders(folder)
    assert versions(ahead)[-1] == versions(behind)[-1] == 4
    shutil.rmtree(behind / "checkpoints" / "version-00000004")
    trained(config, folder, resume=True)
    assert_same(uninterrupted, folder)


def assert_same(left: Path, right: Path) -> None:
    chosen = "SELECT group_id, seed, opponent, opponent_version, reward_sum FROM groups ORDER BY group_id"
    for one, other in zip(folders(left), folders(right), strict=True):
        assert same_bits(one, other)
        assert ledger(one, chosen) == ledger(other, chosen)
        assert [row["reward"] for row in read_metrics(one)] == [row["reward"] for row in read_metrics(other)]


def test_a_single_policy_meets_its_own_past_and_keeps_no_more_than_it_can_meet(tmp_path: Path) -> None:
    config = configured("steps=10", "buffer.max_lag=1", "league.keep=2")
    run(Drive(config, tmp_path / "run", Console(file=io.StringIO()), local=True))
    met = ledger(tmp_path / "run", "SELECT DISTINCT policy, opponent FROM groups")
    assert met == [("policy", "policy")]
    kept = KeptVersions(tmp_path / "run" / "versions").versions
    # The oldest checkpoint is of 4 when the last version is published, or of 6 if that of 8 has landed by then. Groups
    # that are issued one version before it, or later, meet version 0 and what is newer than the version before that.
    assert kept in ([0, *range(2, 11)], [0, *range(4, 11)])


def test_the_recipe_of_the_page_is_whole(tmp_path: Path) -> None:
    recipe, policies = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[:2]
    (tmp_path / "my_league.toml").write_text(recipe, encoding="utf-8")
    few = ["steps=3", "evaluation.tasks=8", "stages.0.source.episodes=64", "league.every_versions=1"]
    config = load_config(str(tmp_path / "my_league.toml"), few)
    run(Drive(config, tmp_path / "run", Console(file=io.StringIO()), local=True))
    assert len(ledger(tmp_path / "run", "SELECT DISTINCT opponent_version FROM groups")) > 1
    (tmp_path / "two.toml").write_text(recipe + policies, encoding="utf-8")
    both = configurations(load_config(str(tmp_path / "two.toml"))).values()
    assert [each.env and each.env.options["seat"] for each in both] == ["keeper", "opener"]
    assert [opponents_of(each) for each in both] == [("opener",), ("keeper",)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["league="], r"env\.options\.opponent='policy' is played by policies of the run; add the section league"),
        (["env.options.opponent=scripted"], r"no effect: env\.id='locks' with env\.options\.opponent='scripted' never"),
        (
            [*TWO, "env.options.opponent=scripted"],
            r"no effect: env\.id='locks' .*'scripted' never meets a past version; set env\.options\.opponent='policy'",
        ),
        (["env.id=frozen_lake", "env.options=", "evaluation.options="], r"no effect: env\.id='frozen_lake' never"),
        (["evaluation.options="], r"an evaluation has no opponents of the run; set evaluation\.options\.opponent"),
        ([*TWO, "buffer.groups_per_step=4"], r"policies\.keeper\.share gives it 1\.33333 of .*=4 groups"),
        ([*TWO, "checkpoint.keep=1"], r"checkpoint\.keep=1 may leave several policies without a version"),
        ([*TWO, "policy=x"], r"policy='x' names the only policy of a run, but there are several"),
        ([TWO[0]], r"policies\.keeper has no opponents; name some in policies\.keeper\.opponents"),
        ([*TWO, 'policies.keeper.opponents=["thief"]'], r"names 'thief'; the run's policies: keeper, opener"),
        ([*TWO, "policies.keeper.learner.optim.rate=1"], r"policies\.keeper\..*learner\.optim\.rate"),
    ],
)  # fmt: skip
def test_a_mistake_in_policies_is_told_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        configured(*overrides)
    assert "\n" not in str(raised.value)


def test_a_league_needs_one_environment_that_may_meet_it() -> None:
    games = 'envs=[{name="met", id="locks", options={opponent="policy"}}, {name="other", id="frozen_lake"}]'
    assert load_config("locks", ["env=", "evaluation.tasks=0", games]).league is not None
    own = ["env.id=my.games:Game", "env.options=", "evaluation.options="]
    assert load_config("locks", own).league is not None, (
        "which may ask for an opponent's move without an option"
    )


def test_one_policy_of_several_is_not_trained_alone(tmp_path: Path) -> None:
    config = configured(*TWO)
    with pytest.raises(ConfigError, match="policy 'keeper' is one of several: train them together"):
        run(Drive(of_policy(config, "keeper"), tmp_path / "run", Console(file=io.StringIO()), local=True))


def test_policies_at_different_versions_do_not_go_on() -> None:
    async def meet() -> None:
        line = Line(POLICIES)
        crossed: list[str] = []

        async def come(policy: str, version: int) -> None:
            await line.cross(policy, version)
            crossed.append(policy)

        first = asyncio.create_task(come("keeper", 1))
        await asyncio.sleep(0)
        assert crossed == []
        await come("opener", 1)
        await first
        await come("opener", 1)  # made again after a loss
        assert crossed == ["opener", "keeper", "opener"]
        await asyncio.gather(come("keeper", 2), come("opener", 3))

    with pytest.raises(RuntimeError, match=r"stand at different versions: \{'keeper': 2, 'opener': 3\}"):
        asyncio.run(meet())
